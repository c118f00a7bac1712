"""What a host draws out or breaks must cost no more than the volume that it concerns."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import trio

from tdxd.cli import tdxd
from tdxd.core import keyrelease, wire
from tdxd.core.bundle import KeyBundle, volume_key
from tdxd.core.plan import VolumeState
from tdxd.errors import IntegrityError
from tdxd.guest import attest
from tdxd.guest.attest import Attester, Bundles
from tdxd.guest.leased import Leased
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.standstill import Standstill
from tdxd.host.attempts import LONGEST_QUOTE_S
from tests.daemon.test_daemon import World, state
from tests.daemon.test_reexec import until_mounted
from tests.fakes import make_bundle


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.image()
    return made


async def test_a_failure_that_stands_keeps_no_key(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong image is the host's to give; the frames that met it had the key."""

    def map_volume(_image: str, bundle: KeyBundle, **_: object) -> None:
        with volume_key(bundle) as key:
            revealed = key.reveal()
            try:
                assert revealed == b""
            except AssertionError as exc:
                raise IntegrityError("does not open with the key") from exc

    monkeypatch.setattr(world.mapper, "map_volume", map_volume)
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.FAILED))
        failure = daemon.volumes.named("model").failure
        assert failure is not None
        error = failure.error
        kept = (error.__traceback__, error.__cause__, error.__context__)
        assert kept == (None, None, None)


@pytest.mark.parametrize("name", [b"\xff.img", b"\x1b[31m.img", b"a\nb.img"])
async def test_a_file_name_that_is_no_text_breaks_no_status(
    world: World, name: bytes
) -> None:
    """A pattern matches whatever the host puts there; it would stand in errors and events."""
    image = world.directory / "model.img"
    image.rename(os.fsdecode(os.fsencode(world.directory) + b"/" + name))
    (volume,) = world.config.volume
    pattern = dataclasses.replace(volume, image=str(world.directory / "*.img"))
    world.config = dataclasses.replace(world.config, volume=(pattern,))
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("model").settled)
        assert daemon.volumes.named("model").state is VolumeState.ABSENT
        wire.encode_frame(wire.reply(1, more=False, result=daemon.status()))
        world.image()
        await until_mounted(daemon)


async def test_the_watchdog_is_fed_while_the_host_makes_no_quote(world: World) -> None:
    """A silent quoting service is no hang of ours: what serves goes on serving."""
    entered = trio.Event()

    async def fetch(_loaded: object, _ids: object) -> Bundles:
        entered.set()
        await trio.sleep_forever()
        raise AssertionError

    world.server.fetch = fetch  # type: ignore[method-assign,assignment]
    async with world.daemon() as daemon:
        await entered.wait()
        ahead_s = min(daemon.beats()[1:-1]) - trio.current_time()
        timeout_s = daemon.config.key_release.timeout_s
        # It may have to wait for an exchange that others began.
        assert ahead_s > 2 * (LONGEST_QUOTE_S + timeout_s) - 5
        daemon.volumes.named("model").want(mounted=False)


async def test_the_watchdog_is_fed_while_a_quote_keeps_rtmr3_at_rest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    adding, made = trio.Event(), trio.Event()

    async def add(_record: object, _manifest: object) -> None:
        adding.set()
        await made.wait()

    monkeypatch.setattr(RuntimeRecord, "add", add)
    async with world.daemon() as daemon:
        await adding.wait()
        ahead_s = min(daemon.beats()[1:-1]) - trio.current_time()
        assert ahead_s > LONGEST_QUOTE_S - 5
        made.set()
        daemon.volumes.named("model").want(mounted=False)


async def test_more_volumes_than_one_request_carries() -> None:
    assert attest.BATCH_MAX == keyrelease.VOLUMES_MAX
    asked: list[tuple[str, ...]] = []

    async def fetch(ids: tuple[str, ...]) -> Bundles:
        asked.append(ids)
        await trio.lowlevel.checkpoint()
        return {one: Leased(bundle=make_bundle(one)) for one in ids}

    attester = Attester(fetch, Standstill())
    names = [f"v{number}" for number in range(keyrelease.VOLUMES_MAX + 6)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(attester.run)
        with trio.fail_after(5):
            async with trio.open_nursery() as asking:
                for name in names:
                    asking.start_soon(attester.bundle, name)
        nursery.cancel_scope.cancel()
    assert [len(ids) for ids in asked] == [keyrelease.VOLUMES_MAX, 6]
    assert sorted(asked[0] + asked[1]) == sorted(names)


def test_a_sweep_needs_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systemd sweeps after a crash: a configuration broken since then must not keep a mapping."""
    swept: list[str] = []
    monkeypatch.setattr(tdxd, "_sweep", lambda: swept.append("all"))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert tdxd._main(["--config", str(tmp_path / "none.toml"), "--sweep"]) == 0
    assert swept == ["all"]
