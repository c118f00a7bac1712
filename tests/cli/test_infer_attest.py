"""tdx-infer --attest and its verb attest, as a person runs them, against a real front."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdxd.cli import tdx_infer
from tdxd.cli.boundary import show_error
from tdxd.errors import (
    EX_CONFIG,
    EX_DATAERR,
    EX_NOPERM,
    EX_OK,
    EX_UNAVAILABLE,
    EX_USAGE,
    TdxdError,
)
from tdxd.owner.appraisal.appraise import load_root
from tdxd.owner.collateral.bundle import CollateralSet, encode_bundle
from tdxd.sim.pccs import PccsServer
from tdxd.sim.platform import SimPlatform
from tests.certificates import self_signed
from tests.cli.test_tdx_infer import run
from tests.endpoint import Middleman, ProvingGuest, proving_guest
from tests.fakes import make_bundle
from tests.judged import policy_of
from tests.user.double import double_handlers

pytestmark = pytest.mark.root

VOLUME = make_bundle("m").manifest
DIGEST = VOLUME.digest().hex()
INPUT = "[[1.5, 2]]"


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def here(*arguments: object) -> Done:
    """Run it in this process, which takes a tenth of the time."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            code = tdx_infer._run([str(one) for one in arguments])
        except TdxdError as exc:
            show_error(tdx_infer.PROG, exc)
            code = exc.exit_code
    return Done(code, out.getvalue(), errors.getvalue())


@dataclasses.dataclass(slots=True)
class World:
    directory: Path
    platform: SimPlatform
    guest: ProvingGuest
    pccs: str
    requests: list[Any]

    def path(self, name: str) -> Path:
        return self.directory / name

    def proving(self, *more: object, policy: str = "policy.toml") -> list[object]:
        return [
            *("--attest", self.path(policy), "--attest-root", self.path("root.pem")),
            *(more or ("--pccs", self.pccs)),
        ]

    @property
    def question(self) -> tuple[object, ...]:
        return ("--model", "double", "--input", self.path("input.json"), "--json")

    def attest(self, *more: object, policy: str = "policy.toml") -> Done:
        proof = self.proving(*more, policy=policy)
        return here("attest", self.guest.address, *proof)

    def predict(
        self, *more: object, address: str = "", policy: str = "policy.toml"
    ) -> Done:
        where = address or self.guest.address
        proof = self.proving(*more, policy=policy)
        return here("predict", where, *self.question, *proof)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("attest")
    platform = SimPlatform.create()
    (directory / "policy.toml").write_text(policy_of(platform))
    (directory / "root.pem").write_text(platform.root_pem)
    other = policy_of(SimPlatform.create(), mrtd=f'["{"ab" * 48}"]')
    (directory / "other.toml").write_text(other)
    (directory / "input.json").write_text(INPUT)
    requests: list[Any] = []
    model = double_handlers(requests, threading.Event(), threading.Semaphore(0))
    with (
        contextlib.closing(PccsServer(platform, "127.0.0.1", 0)) as pccs,
        proving_guest(platform, model=model) as guest,
    ):
        guest.serve_volume(VOLUME)
        yield World(directory, platform, guest, pccs.url, requests)


def test_predict_proves_the_guest_first(world: World) -> None:
    proof = world.proving("--pccs", world.pccs, "--expect-volume", f"m:{DIGEST}")
    done = run("predict", world.guest.address, *world.question, *proof)
    assert done.returncode == EX_OK, done.stderr
    assert json.loads(done.stdout)["outputs"]["y"]["values"] == [[3.0, 4.0]]
    assert done.stderr.splitlines() == [
        f"tdx-infer: attested: volume m generation 1, manifest sha256:{DIGEST}",
        "tdx-infer: attested: warning: the platform is simulated and proves nothing",
    ]


def test_a_refused_guest_gets_no_data(world: World) -> None:
    before = len(world.requests)
    done = world.predict(policy="other.toml")
    assert (done.returncode, done.stdout) == (EX_NOPERM, "")
    assert "is not attested: the guest's firmware is another one (MRTD)" in done.stderr
    assert "tdx-infer attest shows every check" in done.stderr
    assert len(world.requests) == before


def test_a_volume_that_is_not_served_gets_no_data(world: World) -> None:
    before = len(world.requests)
    for wanted in ("bert", f"m:{'00' * 32}"):
        done = world.predict("--pccs", world.pccs, "--expect-volume", wanted)
        assert done.returncode == EX_NOPERM
        text = "the guest does not serve the volume that is expected"
        assert text in done.stderr
    assert len(world.requests) == before


def test_a_man_in_the_middle_gets_no_data(world: World) -> None:
    forged, _public = self_signed("localhost")
    before = len(world.requests)
    with Middleman(forged, world.guest.address) as middle:
        done = world.predict(address=middle.address)
        assert all(b"Predict" not in one for one in middle.heard)
    assert done.returncode == EX_NOPERM
    assert "the guest meant another certificate than this connection's" in done.stderr
    assert len(world.requests) == before


def test_bench_proves_the_guest_once(world: World) -> None:
    counts = ("--cnum", "2", "--loop", "3", "--warm-up", "1", "--quiet")
    what = (*world.question, *counts)
    done = run("bench", world.guest.address, *what, *world.proving())
    assert done.returncode == EX_OK, done.stderr
    assert done.stderr.count("attested: volume m") == 1


def test_attest_shows_every_check(world: World) -> None:
    done = world.attest("--pccs", world.pccs, "--json")
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["attested"]) == (EX_OK, True)
    assert shown["volumes"] == [{"id": "m", "generation": 1, "manifest_sha256": DIGEST}]
    names = [one["name"] for one in shown["checks"]]
    assert names[:3] == ["certificate", "quote_format", "endpoint_proof"]
    assert {"quote", "mr_td", "rtmr3", "runtime_log", "simulated"} <= set(names)
    done = world.attest()
    assert done.stdout.startswith(f"ATTESTED: {world.guest.address} meets ")
    assert f"volume m generation 1, manifest sha256:{DIGEST}\n" in done.stdout
    done = world.attest(policy="other.toml")
    assert done.returncode == EX_NOPERM
    assert done.stdout.startswith("REFUSED: the guest's firmware is another one")
    assert "mr_td" in done.stdout
    done = world.attest("--pccs", world.pccs, "--json", policy="other.toml")
    shown = json.loads(done.stdout)
    assert (shown["attested"], shown["volumes"]) == (False, [])
    assert shown["conclusion"].startswith("the guest's firmware")


def test_the_attested_certificate_can_be_pinned(world: World) -> None:
    """For clients in any language: what was proved once is their only root."""
    out = world.path("leaf.pem")
    done = world.attest("--pccs", world.pccs, "--cert-out", out)
    assert done.returncode == EX_OK, done.stderr
    done = here("predict", world.guest.address, *world.question, "--ca", out)
    assert done.returncode == EX_OK, done.stderr
    again = world.attest("--pccs", world.pccs, "--cert-out", out)
    assert again.returncode != EX_OK
    assert "File exists" in again.stderr


def test_a_refused_certificate_is_not_written(world: World) -> None:
    out = world.path("refused.pem")
    world.attest("--pccs", world.pccs, "--cert-out", out, policy="other.toml")
    assert not out.exists()


def test_collateral_from_a_file(world: World) -> None:
    """One set as dcap-qvl reads it, or what `tdx-keyd collateral export` wrote."""
    now_s = int(time.time())
    collateral = world.platform.collateral(now_s)
    one, many = world.path("set.json"), world.path("sets.json")
    one.write_text(collateral.to_json())
    root = load_root(world.platform.root_der, simulated=True, source="root")
    kept = CollateralSet(
        root=root.key_sha384,
        fmspc=world.platform.fmspc,
        ca="platform",
        source="test",
        fetched_s=now_s,
        collateral=json.loads(collateral.to_json()),
    )
    many.write_bytes(encode_bundle([kept]))
    for path in (one, many):
        done = world.attest("--collateral", path)
        assert done.returncode == EX_OK, done.stdout + done.stderr
    many.write_bytes(encode_bundle([dataclasses.replace(kept, fmspc="00" * 6)]))
    done = world.attest("--collateral", many)
    assert done.returncode == EX_DATAERR
    assert f"no collateral for FMSPC {world.platform.fmspc}" in done.stderr


def test_a_ca_is_demanded_beside_the_proof(world: World) -> None:
    ca = world.path("ca.pem")
    ca.write_bytes(self_signed("localhost")[1])
    done = world.predict("--pccs", world.pccs, "--ca", ca)
    assert done.returncode == EX_UNAVAILABLE
    assert "no TLS connection: self-signed certificate" in done.stderr
    ca.write_bytes(world.guest.served.partition(b"-----END PRIVATE KEY-----\n")[2])
    assert world.predict("--pccs", world.pccs, "--ca", ca).returncode == EX_OK


def test_a_guest_that_gives_no_evidence(world: World) -> None:
    world.guest.wanted = False
    try:
        done = world.predict()
    finally:
        world.guest.wanted = True
    assert done.returncode == EX_UNAVAILABLE
    assert "evidence: HTTP status 404" in done.stderr
    assert "attest = true in [serving]" in done.stderr


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--attest", "p", "--plaintext"), "--plaintext and --attest exclude"),
        (("--ca", "c", "--expect-volume", "m"), "--expect-volume without --attest"),
        (("--ca", "c", "--pccs", "http://x"), "--pccs without --attest"),
        (("POLICY", "--expect-volume", "A B"), "--expect-volume"),
        (("POLICY", "--expect-volume", "m:12"), "not 64 hex digits"),
        (("POLICY", "ROOT"), "--attest-root without --pccs or --collateral"),
        (("POLICY", "--pccs", "ftp://x"), "--pccs 'ftp://x' is not an http"),
        (("POLICY", "--pccs", "http://x", "--collateral", "y"), "exclude each other"),
    ],
)
def test_wrong_options(world: World, options: tuple[str, ...], text: str) -> None:
    words: list[object] = []
    for one in options:
        known = {
            "POLICY": ("--attest", world.path("policy.toml")),
            "ROOT": ("--attest-root", world.path("root.pem")),
        }
        words += known.get(one, (one,))
    if "c" in options:
        ca = world.path("c.pem")
        ca.write_bytes(self_signed("localhost")[1])
        words[words.index("c")] = ca
    done = here("predict", world.guest.address, *world.question, *words)
    assert done.returncode == EX_USAGE, done.stderr
    assert text in done.stderr


def test_files_that_are_wrong(world: World) -> None:
    bad = world.path("bad.toml")
    bad.write_text("[tdx]\nmrtd = 1\n")
    assert world.predict(policy="bad.toml").returncode == EX_CONFIG
    bad.write_text("{}")
    done = world.attest("--collateral", bad)
    assert done.returncode == EX_DATAERR
    assert "collateral" in done.stderr


def test_attest_needs_a_policy(world: World) -> None:
    done = here("attest", world.guest.address, "--ca", world.path("root.pem"))
    assert done.returncode == EX_USAGE
    assert "--attest POLICY is missing" in done.stderr
