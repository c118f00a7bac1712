"""A PCCS that lies, or is made to: collateral over real HTTP, floors in a real store.

Each test ends with a genuine quote: whatever the service answers, the quote opens nothing by it,
and once the service is honest again, the same quote passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tdxd.core import hpke
from tdxd.core.bundle import KeyBundle
from tdxd.core.secret import Secret
from tdxd.errors import (
    DataError,
    DeniedError,
    KeyReleaseError,
    Retry,
    UnavailableError,
)
from tdxd.owner.collateral.bundle import encode_bundle, parse_bundle
from tdxd.owner.collateral.cache import COLLATERAL_REASONS, CollateralCache
from tdxd.owner.collateral.files import CollateralFiles
from tdxd.owner.collateral.floors import StoreFloors
from tdxd.owner.collateral.pcs import PcsSource, fetch_collateral
from tdxd.owner.store.kek import create_kek
from tdxd.owner.store.store import Store
from tdxd.sim.collateral import Collateral
from tdxd.sim.pccs import Answer, PccsServer
from tdxd.sim.platform import SimPlatform
from tests.collateral import DAY, NOW, a_set, cache_of, failed, trust, verdict
from tests.keyserver import opened_owner


class Platform(SimPlatform):
    """Its collateral may be signed in another state, or changed after it was signed."""

    state: dict[str, Any]
    mangle: Any

    def collateral(self, now_s: int, **overrides: Any) -> Collateral:
        signed = super().collateral(now_s, **{**self.state, **overrides})
        changed: Collateral = self.mangle(signed)
        return changed


@dataclasses.dataclass
class World:
    """A platform, its PCCS, and a key server's store; `now_s` is everybody's clock."""

    platform: Platform
    directory: Path
    store: Store
    pccs: PccsServer
    now_s: int = NOW
    change: Any = None
    asked: list[str] = dataclasses.field(default_factory=list)

    def cache(self, url: str | None = None, timeout_s: float = 5.0) -> CollateralCache:
        """What a key server process has after its start."""
        source = PcsSource(url=url or self.pccs.url, timeout_s=timeout_s)
        return cache_of(
            lambda fmspc, ca: fetch_collateral(source, fmspc, ca),
            self.directory,
            self.platform,
            StoreFloors(self.store),
            files=CollateralFiles(self.directory, trust(self.platform).key_sha384),
        )

    def wipe_disk(self) -> None:
        """Lose the disk cache, as a new replica has none."""
        for path in (self.directory / "collateral").glob("*"):
            path.unlink()

    def refused(self, cache: CollateralCache | None = None) -> dict[str, str]:
        """Failed checks of a genuine quote; it must not be verified."""
        got = verdict(cache or self.cache(), self.platform, self.now_s)
        assert got.verified is None
        return {check.name: check.actual for check in got.checks if not check.ok}

    def passes(self, cache: CollateralCache | None = None) -> bool:
        got = verdict(cache or self.cache(), self.platform, self.now_s)
        return got.verified is not None

    def honest(self) -> None:
        """The service is itself again, half a minute later."""
        self.platform.state = {}
        self.platform.mangle = lambda one: one
        self.change = None
        self.now_s += 60


@pytest.fixture
def world(tmp_path):
    platform = Platform.create()
    assert isinstance(platform, Platform)
    platform.state, platform.mangle = {}, lambda one: one
    directory = tmp_path / "store"
    directory.mkdir()
    with Secret(os.urandom(hpke.SEED_BYTES)) as seed:
        create_kek(directory, seed)
    made: list[World] = []

    def change(path: str, right: Answer) -> Answer:
        made[0].asked.append(path)
        spoil = made[0].change
        spoilt: Answer = right if spoil is None else spoil(path, right)
        return spoilt

    pccs = PccsServer(
        platform, "127.0.0.1", 0, now_s=lambda: made[0].now_s, change=change
    )
    with contextlib.closing(pccs), Store.create(directory) as store:
        made.append(World(platform, directory, store, pccs))
        yield made[0]


def spoilt(part: str, **fields: Any) -> Any:
    """A change of one kind of answer."""

    def change(path: str, right: Answer) -> Answer:
        return dataclasses.replace(right, **fields) if part in path else right

    return change


def test_an_honest_service(world):
    assert world.passes()
    assert len(world.store.floors()) == 6


# --- the wrong signer ---------------------------------------------------------


def test_tcb_info_signed_by_a_pck_key(world):
    world.platform.state = {"signer": "pck"}
    got = world.refused()
    assert got["tcb_info_signer"] == "tdx-sim PCK Certificate"
    assert got["qe_identity_signer"] == "tdx-sim PCK Certificate"
    assert got["quote"] == "not tried"
    assert world.store.floors() == {}
    world.honest()
    assert world.passes()


def test_tcb_info_signed_by_a_pck_key_behind_a_pem_label(world):
    """dcap-qvl reads the block labelled FOO, `cryptography` does not."""
    pki = world.platform.pki
    chain = pki.pck.pem.replace("CERTIFICATE", "FOO") + pki.tcb_chain_pem
    world.platform.state = {"signer": "pck"}
    world.platform.mangle = lambda one: dataclasses.replace(
        one, tcb_info_issuer_chain=chain, qe_identity_issuer_chain=chain
    )
    got = world.refused()
    assert "tcb_info: wrong signature" in got["collateral_signature"]
    assert world.store.floors() == {}
    world.honest()
    assert world.passes()


def test_tcb_info_signed_by_the_pck_ca(world):
    world.platform.state = {"signer": "pck_ca"}
    pki = world.platform.pki
    world.platform.mangle = lambda one: dataclasses.replace(
        one,
        tcb_info_issuer_chain=pki.pck_ca_chain_pem,
        qe_identity_issuer_chain=pki.pck_ca_chain_pem,
    )
    assert world.refused()["tcb_info_signer"] == "tdx-sim PCK Platform CA"


def test_whole_set_of_another_root(world):
    """Anybody can make a PKI whose names are Intel's."""
    stranger = SimPlatform.create()
    world.platform.mangle = lambda _one: stranger.collateral(world.now_s)
    assert "ends at another root" in world.refused()["collateral_signature"]
    assert world.store.floors() == {}


# --- the wrong time -----------------------------------------------------------


def test_expired_collateral(world):
    world.platform.state = {"issued_s": NOW - 31 * DAY}
    got = world.refused()
    assert "tcb_info expired" in got["collateral_dates"]
    world.honest()
    assert world.passes()


@pytest.mark.parametrize(
    "state",
    [
        {"issued_s": NOW + 60},
        {"pck_crl_issued_s": NOW + 60},
        {"root_crl_issued_s": NOW + 60},
    ],
)
def test_not_yet_valid_collateral(world, state):
    world.platform.state = state
    assert "issued 2026" in world.refused()["collateral_dates"]
    assert world.store.floors() == {}


# --- rollback -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("newer", "said"),
    [
        ({"eval_data_number": 21, "qe_eval_data_number": 20}, "tcb-evaluation 20"),
        ({"qe_eval_data_number": 21}, "qe-evaluation 20"),
        ({"pck_crl_number": 2}, "pck-crl 1"),
        ({"root_crl_number": 2}, "root-crl 1"),
    ],
    ids=["tcb-evaluation", "qe-evaluation", "pck-crl", "root-crl"],
)
def test_rolled_back_collateral(world, newer, said):
    """Old but unexpired, after a restart that lost the disk cache."""
    world.platform.state = newer
    assert world.passes()
    world.wipe_disk()
    world.platform.state = {}
    assert world.refused()["collateral_floor"] == said
    world.now_s += 60
    world.platform.state = newer
    assert world.passes()


@pytest.mark.parametrize("name", ["pck_crl_issued_s", "root_crl_issued_s"])
def test_rolled_back_crl_of_the_same_number(world, name):
    """Intel's CRLs have had the number 1 for years: the time of issue tells old from new."""
    assert world.passes()
    world.wipe_disk()
    world.platform.state = {name: NOW - 8 * DAY}
    assert "-crl-time 2026" in world.refused()["collateral_floor"]


def test_rolled_back_collateral_does_not_replace_newer(world):
    """While the process runs, the newer set that it has is used on."""
    cache = world.cache()
    world.platform.state = {"eval_data_number": 21}
    assert world.passes(cache)
    world.platform.state = {"eval_data_number": 20}
    world.now_s += DAY
    assert world.passes(cache)
    prepared = cache.get(world.platform.fmspc, "platform", world.now_s)
    assert prepared.tcb_evaluation == 21
    assert world.passes()  # a restart, too: the disk has the newer one


def test_crl_from_before_the_revocation(world):
    """A PCK that was once seen revoked stays so, though an old list has not expired."""
    world.platform.state = {"revoked": ("pck",)}
    assert "evoked" in world.refused()["quote"]
    world.wipe_disk()
    world.platform.state = {"pck_crl_issued_s": NOW - 8 * DAY}
    assert "pck-crl-time" in world.refused()["collateral_floor"]


# --- a liar must not lock the owner out -----------------------------------------


@pytest.mark.parametrize("number", [21, 2**31 - 1])
def test_lying_pccs_raises_no_floor(world, number):
    """Invented numbers that no trusted key signed leave no trace."""
    stranger = SimPlatform.create()
    lies = {
        "eval_data_number": number,
        "pck_crl_number": number,
        "root_crl_number": number,
    }
    world.platform.mangle = lambda _one: stranger.collateral(world.now_s, **lies)
    assert "collateral_signature" in world.refused()
    world.platform.mangle = lambda one: one
    world.platform.state = {**lies, "signer": "pck"}
    world.now_s += 60
    assert "tcb_info_signer" in world.refused()
    assert world.store.floors() == {}
    world.honest()
    assert world.passes()
    assert (
        max(
            value for name, value in world.store.floors().items() if "-time" not in name
        )
        == 20
    )


def test_part_of_a_set_that_is_not_signed_raises_no_floor(world):
    """One bad part, and the good parts with their high numbers do not count either."""
    world.platform.state = {"eval_data_number": 30}
    world.platform.mangle = lambda one: dataclasses.replace(
        one, pck_crl=SimPlatform.create().collateral(NOW).pck_crl
    )
    assert "pck_crl: wrong signature" in world.refused()["collateral_signature"]
    assert world.store.floors() == {}


# --- revocation -----------------------------------------------------------------


def test_revoked_pck(world):
    world.platform.state = {"revoked": ("pck",)}
    assert "evoked" in world.refused()["quote"]


@pytest.mark.parametrize("name", ["tcb_signer", "pck_ca"])
def test_revoked_tcb_signer(world, name):
    world.platform.state = {"revoked": (name,)}
    assert "revoked: " in world.refused()["collateral_revocation"]
    assert world.store.floors() == {}


@pytest.mark.parametrize("part", ["pckcrl", "rootcacrl"])
@pytest.mark.parametrize(
    "fields", [{"status": 404}, {"body": b""}, {"body": b"\x30\x80\x00\x00"}]
)
def test_missing_crl(world, part, fields):
    world.change = spoilt(part, **fields)
    with pytest.raises(UnavailableError):
        world.passes()
    world.honest()
    assert world.passes()


def test_crl_of_the_other_ca(world):
    """A list on which this platform's key cannot stand."""
    world.platform.mangle = lambda one: dataclasses.replace(
        one, pck_crl=one.root_ca_crl
    )
    assert "pck_crl_issuer" in world.refused()


# --- answers that hurt ----------------------------------------------------------


@pytest.mark.parametrize("part", ["tcb", "identity", "pckcrl", "rootcacrl"])
def test_huge_answer(world, part):
    world.change = spoilt(part, body=b"x" * (2 * 1024 * 1024))
    with pytest.raises(UnavailableError, match="more than 1048576 bytes"):
        world.passes()


def test_answer_without_an_end(world):
    """No length, no end: it is cut where it is too much."""

    class Endless(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x" * 65536)

        def log_message(self, *args):
            pass

    with serving(Endless) as url, pytest.raises(UnavailableError, match="more than"):
        verdict(world.cache(url), world.platform)


def test_slow_answer(world):
    world.change = spoilt("identity", drip_s=0.05)
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="takes too long"):
        world.passes(world.cache(timeout_s=0.5))
    assert time.monotonic() - began < 5


def test_slow_answer_for_a_stranger_leaves_others_alone(world):
    """An unexpired set is given out at once while a question about another family hangs."""
    cache = world.cache(timeout_s=1.5)
    assert world.passes(cache)
    world.change = spoilt("tcb", drip_s=0.1)
    thread = threading.Thread(target=suppressed, args=(cache, "0" * 12))
    thread.start()
    began = time.monotonic()
    assert world.passes(cache)
    assert time.monotonic() - began < 1
    thread.join(20)


def suppressed(cache, fmspc):
    with contextlib.suppress(UnavailableError):
        cache.get(fmspc, "platform", NOW)


def test_redirect_to_elsewhere(world):
    """Also where the other place has what was asked for."""
    here = world.pccs.url

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(307)
            self.send_header("Location", here + self.path)
            self.end_headers()

        def log_message(self, *args):
            pass

    with serving(Elsewhere) as url, pytest.raises(UnavailableError, match="307"):
        verdict(world.cache(url), world.platform)
    assert world.asked == []


@contextlib.contextmanager
def serving(handler):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# --- bundles --------------------------------------------------------------------


def test_bundle_with_one_bit_flipped(world):
    """Anywhere in it: the digest finds damage."""
    data = encode_bundle([a_set(world.platform)])
    for at in range(3, len(data) * 8, 997):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(DataError):
            parse_bundle(bytes(flipped), source="bundle")


def test_bundle_with_one_bit_flipped_and_a_new_digest(world):
    """By somebody who knows the format: Intel's signatures find it, and no floor moves."""
    good = a_set(world.platform, eval_data_number=25)
    cache = world.cache()
    for name in ("tcb_info", "qe_identity", "tcb_info_signature", "pck_crl"):
        text = good.collateral[name]
        for at in range(5, len(text), max(1, len(text) // 12)):
            letter = chr(ord(text[at]) ^ 1)
            fields = {**good.collateral, name: text[:at] + letter + text[at + 1 :]}
            (one,) = parse_bundle(
                encode_bundle([dataclasses.replace(good, collateral=fields)]),
                source="bundle",
            )
            with contextlib.suppress(DataError):  # it is not even collateral any more
                assert not cache.accept(one, NOW).ok, (name, at)
    assert world.store.floors() == {}
    assert not list(world.directory.glob("collateral/*"))
    assert cache.accept(good, NOW).ok


def test_old_bundle_after_a_newer_one(world):
    cache = world.cache()
    assert cache.accept(a_set(world.platform, eval_data_number=21), NOW).ok
    world.wipe_disk()
    got = cache.accept(a_set(world.platform), NOW)
    assert failed(got) == {"collateral_floor": "tcb-evaluation 20, qe-evaluation 20"}


def test_file_of_the_disk_cache_replaced_by_somebody(world):
    """Whoever writes to the store's directory can neither forge a set nor roll it back."""
    world.platform.state = {"eval_data_number": 21}
    assert world.passes()
    (file,) = (world.directory / "collateral").iterdir()
    for lie in (
        {"eval_data_number": 20},
        {"signer": "pck", "eval_data_number": 99},
    ):
        forged = a_set(world.platform, **lie)
        file.write_bytes(encode_bundle([forged]))
        world.asked.clear()
        assert world.passes()
        assert world.asked  # it was fetched anew
        world.now_s += 60


# --- through the whole key server -------------------------------------------------


async def test_denial_of_rolled_back_collateral_is_explained(tmp_path):
    with opened_owner(tmp_path) as owner:
        owner.add("v")
        root = trust(owner.platform).key_sha384[:16]
        with owner.store.transaction() as change:
            change.raise_floors({f"qe-evaluation/{root}": 21})
        got = (await owner.fetch("v"))["v"]
        assert isinstance(got, DeniedError)
        assert owner.last().reason == "collateral-rollback"
        failed_checks = owner.failed()
        assert failed_checks.pop("collateral_floor") == (
            "qe-evaluation >= 21",
            "qe-evaluation 20",
        )
        assert failed_checks.pop("quote")[1] == "not tried"
        assert not failed_checks


async def test_each_check_of_the_collateral_has_its_line(tmp_path):
    with opened_owner(tmp_path) as owner:
        owner.add("v")
        assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
        names = [check.name for check in owner.last().checks]
        assert {*COLLATERAL_REASONS} - {"collateral_age"} <= {*names}
        assert len(owner.store.floors()) == 6


async def test_forged_collateral_is_denied_by_name(tmp_path):
    with opened_owner(tmp_path) as owner:
        owner.add("v")
        stranger = SimPlatform.create()
        owner.platform.mangle = lambda one: dataclasses.replace(
            one, pck_crl=stranger.collateral(int(time.time())).pck_crl
        )
        assert isinstance((await owner.fetch("v"))["v"], DeniedError)
        assert owner.last().reason == "collateral-signature"
        assert owner.store.floors() == {}


async def test_expired_collateral_is_waited_for(tmp_path):
    """No denial by policy: the guest comes back soon."""
    with opened_owner(tmp_path) as owner:
        owner.add("v")
        owner.platform.state = {"next_update_s": int(time.time()) - 1}
        got = (await owner.fetch("v"))["v"]
        assert type(got) is KeyReleaseError
        assert owner.last().reason == "collateral-unavailable"
        assert "collateral_dates" in owner.failed()
        assert got.retry is Retry.BACKOFF
