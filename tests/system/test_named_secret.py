"""Named secrets from a real key server to the guest's memory, over a simulated platform."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tdxd.core.config import Config, ServingConfig
from tdxd.core.secret import Secret
from tdxd.errors import DeniedError, WrongKindError
from tdxd.guest.attest import Attester, Bundles
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.named_secrets import NamedSecrets
from tdxd.guest.standstill import Standstill
from tdxd.owner.store.admin import put_secret, remove_secret, set_policy
from tests.certificates import self_signed
from tests.keyserver import Guest, Owner, opened_owner, policy_text
from tests.system.world import Daemon, World, free_port, ok, program, wait_for


@pytest.fixture
def owner(tmp_path: Path) -> Any:
    with opened_owner(tmp_path) as made:
        yield made


def put(owner: Owner, data: bytes, *, release: str = "", name: str = "web") -> int:
    file = owner.directory.parent / "policy.toml"
    file.write_text(policy_text(owner.platform) + release)
    row = put_secret(owner.directory, name, "tls-pem", Secret(data), 5, policy=file)
    return row.generation


@asynccontextmanager
async def guest(owner: Owner, tsm: Guest | None = None) -> AsyncIterator[NamedSecrets]:
    """A guest's secrets: each exchange is over TLS, with a quote of its own."""
    standstill, release = Standstill(), owner.config()

    async def fetch(ids: tuple[str, ...]) -> Bundles:
        return await owner.fetch_leased(*ids, tsm=tsm)

    config = Config(key_release=release, serving=ServingConfig(tls_secret="web"))
    async with trio.open_nursery() as nursery:
        attester = Attester(fetch, standstill)
        secrets = NamedSecrets(
            config=lambda: config,
            attester=attester,
            changes=Changes(),
            events=Events(),
            standstill=standstill,
            nursery=nursery,
        )
        nursery.start_soon(attester.run)
        nursery.start_soon(secrets.run)
        try:
            yield secrets
        finally:
            secrets.close()
            nursery.cancel_scope.cancel()


async def answered(secrets: NamedSecrets) -> None:
    with trio.fail_after(30):
        while not secrets.settled:
            await trio.sleep(0.01)


async def test_a_certificate_and_its_next_generation(owner: Owner) -> None:
    first, second = self_signed("localhost")[0], self_signed("localhost")[0]
    assert put(owner, first) == 1
    async with guest(owner) as secrets:
        await answered(secrets)
        assert secrets.pem("web") == first
        assert secrets.tag("web") == "web@1"
        assert put(owner, second) == 2
        secrets.ask_now()
        await answered(secrets)
        assert secrets.pem("web") == second
        assert secrets.tag("web") == "web@2"
        # The owner takes the newest back: an older one does not come in its place.
        remove_secret(owner.directory, "web", 2, 6)
        secrets.ask_now()
        await answered(secrets)
        assert secrets.tag("web") == "web@2"
        failure = secrets.failure("web")
        assert failure is not None
        assert failure.error.code == "secret-stale"
        assert put(owner, first) == 3
        secrets.ask_now()
        await answered(secrets)
        assert secrets.pem("web") == first


async def test_another_guest_does_not_get_it(owner: Owner) -> None:
    put(owner, self_signed("localhost")[0])
    other = owner.platform.report().mr_td[::-1]
    async with guest(owner, Guest(owner.platform, mr_td=other)) as secrets:
        await answered(secrets)
        assert secrets.pem("web") is None
        failure = secrets.failure("web")
        assert failure is not None
        assert isinstance(failure.error, DeniedError)
        assert "measurements" in failure.error.message
    assert owner.last().reason == "measurements"
    assert owner.last().volume_id == "web"


async def test_revocation_reaches_it_when_its_lease_is_over(owner: Owner) -> None:
    put(
        owner,
        self_signed("localhost")[0],
        release="\n[release]\nlease_s = 60\n",
    )
    async with guest(owner) as secrets:
        await answered(secrets)
        (shown,) = secrets.shown()
        assert shown.lease_left_s is not None
        assert 50 < shown.lease_left_s <= 60
        refusing = owner.directory.parent / "refusing.toml"
        refusing.write_text(policy_text(owner.platform, mrtd=f'["{"00" * 48}"]'))
        set_policy(owner.directory, "web", refusing, 6)
        secrets.ask_now()
        await answered(secrets)
        assert secrets.tag("web") == "web@1"  # until it is over
        failure = secrets.failure("web")
        assert failure is not None
        assert isinstance(failure.error, DeniedError)


async def test_a_volume_of_this_id_is_told(owner: Owner) -> None:
    owner.add("web")
    async with guest(owner) as secrets:
        await answered(secrets)
        failure = secrets.failure("web")
        assert failure is not None
        assert isinstance(failure.error, WrongKindError)
        assert secrets.pem("web") is None


# --- by the programs ------------------------------------------------------------


def key_lines(pem: Path) -> list[str]:
    """The lines of a file that nobody else may see."""
    text = pem.read_text().partition("-----END PRIVATE KEY-----")[0]
    return [line for line in text.splitlines() if not line.startswith("-----")]


def put_by_program(world: World, pem: Path) -> str:
    """Put a certificate from standard input; like the volume `m` in all else."""
    argv = ("put", world.directory / "keys", "alone", "--tls-pem", "-", "--like", "m")
    done = program("tdx-keyd", "secret", *argv, input=pem.read_text())
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def shown(daemon: Daemon) -> dict[str, Any]:
    (one,) = daemon.status()["secrets"]
    assert isinstance(one, dict)
    return one


def nowhere(world: World, daemon: Daemon, pem: Path) -> None:
    """Fail where a line of the key is seen outside the daemon's memory."""
    pid, run = daemon.process.pid, Path(f"/run/tdxd-system-{os.getpid()}")
    places = [daemon.log, world.directory / "keyd.log", world.directory / "tdxd.toml"]
    places += [Path(f"/proc/{pid}/{name}") for name in ("cmdline", "environ")]
    places += [one for one in run.rglob("*") if one.is_file()]
    places += [one for one in (world.directory / "keys").rglob("*") if one.is_file()]
    seen = {str(one): one.read_bytes() for one in places}
    seen["events"] = daemon.ctl("events", "--all").stdout.encode()
    seen["status"] = json.dumps(daemon.status()).encode()
    assert b"secret.received" in seen["events"]
    for where, data in seen.items():
        for line in key_lines(pem):
            assert line.encode() not in data, where


def memory_files(daemon: Daemon) -> list[str]:
    """The memory files with a secret that the daemon has open."""
    directory = Path(f"/proc/{daemon.process.pid}/fd")
    links = [os.readlink(one) for one in directory.iterdir()]
    return [one for one in links if "tdxd:secret" in one]


@pytest.mark.root
@pytest.mark.slow
def test_programs_take_it_keep_it_over_a_reexec_and_show_it_nowhere(
    world: World,
) -> None:
    first, second = world.directory / "server.pem", world.directory / "alone.pem"
    ok("tdx-seal", "cert", "localhost", "-o", second, "--cert-out", f"{second}.ca")
    assert put_by_program(world, first).startswith("put alone generation 1: ")
    tables: dict[str, Any] = {
        "volume": [{"id": "m", "image": "/nowhere/*.img", "required": False}],
        "serving": {"listen": f"127.0.0.1:{free_port()}", "tls_secret": "alone"},
    }
    with world.key_server(), world.daemon(**tables) as daemon:
        wait_for(lambda: shown(daemon)["generation"] == 1, "the secret")
        assert shown(daemon)["content"] == "tls-pem"
        nowhere(world, daemon, first)
        put_by_program(world, second)
        assert daemon.ctl("retry").returncode == 0
        wait_for(lambda: shown(daemon)["generation"] == 2, "the next generation")
        before = shown(daemon)
        assert len(memory_files(daemon)) == 1
        daemon.reexec()
        assert shown(daemon) == before
        assert len(memory_files(daemon)) == 1
        assert "alone" in daemon.ctl("status").stdout
        nowhere(world, daemon, second)
    listed = ok("tdx-keyd", "audit", "show", world.directory / "keys")
    assert "alone" in listed
