"""RTMR3 and the log of what it was extended with: in order, once, and repaired after a crash."""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from pathlib import Path
from typing import Any, Literal

import pytest
import trio

from tdxd.core.config import PlatformConfig
from tdxd.core.plan import VolumeState
from tdxd.core.runtime_log import (
    MAX_RUNTIME_LOG_BYTES,
    RuntimeEvent,
    parse_runtime_log,
    replay_runtime,
    volume_event,
)
from tdxd.core.runtime_record import RuntimeHistory, parse_history
from tdxd.errors import HostError, RecordError
from tdxd.guest.daemon import Daemon
from tdxd.guest.events import Events
from tdxd.guest.runtime_record import RuntimeRecord
from tests.daemon.test_daemon import World, state
from tests.daemon.test_reexec import first, run_next, until_mounted
from tests.fakes import FakeRtmr, make_bundle

ONE, TWO = make_bundle("one").manifest, make_bundle("two").manifest
REFUSED = HostError("extend", "/sys/rtmr3", errno.EIO, hint="the module refused")
ABSENT = HostError("extend", "/sys/rtmr3", errno.ENOENT, hint="Linux 6.16")
Mode = Literal["required", "if-possible", "never"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "record" / "runtime-log"


def made(
    rtmr: FakeRtmr, path: Path, *, extend: Mode = "required", boot_id: str = "b1"
) -> RuntimeRecord:
    config = PlatformConfig(extend=extend, runtime_log=str(path))
    return RuntimeRecord(rtmr, config, events=Events(), boot_id=boot_id)


async def log_of(record: RuntimeRecord) -> tuple[RuntimeEvent, ...]:
    async with record.held() as log:
        return parse_runtime_log(log)


async def test_each_volume_extends_it_once_in_order(path: Path) -> None:
    rtmr = FakeRtmr()
    record = made(rtmr, path)
    assert not record.shows(ONE)
    for manifest in (TWO, ONE, TWO):
        await record.add(manifest)
        assert record.shows(manifest)
    assert rtmr.extended == [volume_event(TWO).digest(), volume_event(ONE).digest()]
    assert await log_of(record) == (volume_event(TWO), volume_event(ONE))
    assert replay_runtime(bytes(48), await log_of(record)) == rtmr.register
    assert record.status() == {"extend": "required", "events": 2, "error": None}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_extensions_at_the_same_time_come_one_after_the_other(path: Path) -> None:
    rtmr = FakeRtmr()
    record = made(rtmr, path)
    manifests = [make_bundle(f"m{number}").manifest for number in range(8)]
    async with trio.open_nursery() as nursery:
        for manifest in manifests:
            nursery.start_soon(record.add, manifest)
    events = await log_of(record)
    assert {one.payload for one in events} == {
        volume_event(one).payload for one in manifests
    }
    assert replay_runtime(bytes(48), events) == rtmr.register


async def test_nothing_is_extended_while_a_quote_is_made(path: Path) -> None:
    """The log of a request is the one that its quote shows."""
    rtmr = FakeRtmr()
    record = made(rtmr, path)
    await record.add(ONE)
    async with trio.open_nursery() as nursery, record.held() as log:
        nursery.start_soon(record.add, TWO)
        await trio.sleep(0.1)
        assert replay_runtime(bytes(48), parse_runtime_log(log)) == rtmr.register
        assert not record.shows(TWO)
    assert record.shows(TWO)


async def test_it_outlives_the_daemon(path: Path) -> None:
    rtmr = FakeRtmr()
    await made(rtmr, path).add(ONE)
    after = made(rtmr, path)
    assert after.shows(ONE)
    await after.add(ONE)
    await after.add(TWO)
    assert len(rtmr.extended) == 2
    assert await log_of(after) == (volume_event(ONE), volume_event(TWO))


async def test_the_log_of_an_earlier_boot_does_not_count(path: Path) -> None:
    await made(FakeRtmr(), path).add(ONE)
    rtmr = FakeRtmr()
    after = made(rtmr, path, boot_id="b2")
    assert not after.shows(ONE)
    assert await log_of(after) == ()
    await after.add(ONE)
    assert rtmr.extended == [volume_event(ONE).digest()]


async def test_it_begins_where_the_register_stood(path: Path) -> None:
    """Firmware or another program extended it before; that is not ours to tell."""
    rtmr = FakeRtmr()
    rtmr.extend(b"f" * 48)
    base = rtmr.register
    record = made(rtmr, path)
    await record.add(ONE)
    assert parse_history(path.read_bytes()).base == base
    assert replay_runtime(base, await log_of(record)) == rtmr.register


# --- the window between keeping and extending ---------------------------------------


def crashed(path: Path, *manifests: Any, boot_id: str = "b1") -> None:
    """Leave what a daemon leaves that was killed after it kept the last event."""
    events = tuple(volume_event(one) for one in manifests)
    history = RuntimeHistory(boot_id=boot_id, base=bytes(48), events=events)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(history.encode())


@pytest.mark.parametrize("before", [(), (TWO,)])
async def test_a_crash_before_the_extension_is_repaired_at_the_next_start(
    path: Path, before: tuple[Any, ...]
) -> None:
    rtmr = FakeRtmr()
    for one in before:
        rtmr.extend(volume_event(one).digest())
    crashed(path, *before, ONE)
    record = made(rtmr, path)
    assert record.shows(ONE)
    assert rtmr.extended[-1] == volume_event(ONE).digest()
    assert len(rtmr.extended) == len(before) + 1
    assert replay_runtime(bytes(48), await log_of(record)) == rtmr.register


async def test_a_crash_after_the_extension_extends_nothing_twice(path: Path) -> None:
    rtmr = FakeRtmr()
    rtmr.extend(volume_event(ONE).digest())
    crashed(path, ONE)
    record = made(rtmr, path)
    assert record.shows(ONE)
    assert len(rtmr.extended) == 1


async def test_a_crash_while_the_file_is_written_leaves_the_old_one(
    path: Path,
) -> None:
    rtmr = FakeRtmr()
    await made(rtmr, path).add(ONE)
    Path(f"{path}.new").write_bytes(b"half")
    after = made(rtmr, path)
    assert await log_of(after) == (volume_event(ONE),)
    await after.add(TWO)
    assert not Path(f"{path}.new").exists()


async def test_an_extension_that_is_refused_stays_out_of_the_log(path: Path) -> None:
    """Otherwise no later quote would fit the log."""
    rtmr = FakeRtmr()
    record = made(rtmr, path)
    await record.add(ONE)
    rtmr.lost = REFUSED
    with pytest.raises(HostError):
        await record.add(TWO)
    assert await log_of(record) == (volume_event(ONE),)
    assert replay_runtime(bytes(48), await log_of(record)) == rtmr.register
    rtmr.lost = None
    await record.add(TWO)
    assert await log_of(record) == (volume_event(ONE), volume_event(TWO))


async def test_a_register_that_takes_a_write_and_does_nothing(path: Path) -> None:
    rtmr = FakeRtmr()
    rtmr.extend = lambda _digest: None  # type: ignore[method-assign, assignment]
    record = made(rtmr, path)
    with pytest.raises(RecordError, match="did not change when it was extended"):
        await record.add(ONE)
    assert not record.shows(ONE)


# --- what does not fit ---------------------------------------------------------------


async def test_a_register_that_the_log_does_not_explain_is_named(path: Path) -> None:
    """Evidence goes out as it is: the key server judges it."""
    rtmr = FakeRtmr()
    record = made(rtmr, path)
    await record.add(ONE)
    rtmr.extend(b"x" * 48)
    assert await log_of(record) == (volume_event(ONE),)
    shown = record.status()["error"]
    assert shown["code"] == "runtime-record"
    assert rtmr.register.hex() in shown["message"]
    assert "reboot" in shown["hint"]
    with pytest.raises(RecordError, match="the 1 events of the runtime log lead to"):
        await record.add(TWO)
    assert record.shows(ONE)  # what was shown once stays in RTMR3's history


@pytest.mark.parametrize(
    "data",
    [b"", b"\x80", b"garbage", b"\x83\xa3log\xc4\x00\xa4base\xc4\x00\xa7boot_id\xa0"],
)
async def test_a_file_that_was_written_to_is_refused(path: Path, data: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(data)
    record = made(FakeRtmr(), path)
    assert record.status()["error"]["message"].startswith("runtime log: ")
    assert await log_of(record) == ()
    with pytest.raises(RecordError):
        await record.add(ONE)
    assert path.read_bytes() == data


async def test_a_full_log_is_an_error_not_a_request_too_large(path: Path) -> None:
    rtmr = FakeRtmr()
    big = RuntimeEvent(name="other", payload=bytes(MAX_RUNTIME_LOG_BYTES - 40))
    rtmr.extend(big.digest())
    history = RuntimeHistory(boot_id="b1", base=bytes(48), events=(big,))
    path.parent.mkdir()
    path.write_bytes(history.encode())
    record = made(rtmr, path)
    with pytest.raises(RecordError, match="runtime log is full: 2 events") as caught:
        await record.add(ONE)
    assert "reboot" in caught.value.hint
    assert len(await log_of(record)) == 1


async def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rtmr = FakeRtmr()
    record = made(rtmr, tmp_path / "file" / "runtime-log")
    with pytest.raises(HostError):
        await record.add(ONE)
    assert rtmr.extended == []  # nothing is extended that is not kept


# --- where the kernel cannot ---------------------------------------------------------


async def test_never_touches_nothing(path: Path) -> None:
    rtmr = FakeRtmr()
    rtmr.broken = ABSENT
    record = made(rtmr, path, extend="never")
    assert record.shows(ONE)
    await record.check()
    assert await log_of(record) == ()
    assert record.status() == {"extend": "never", "events": 0, "error": None}
    assert not path.exists()


async def test_if_possible_goes_on_and_says_so(path: Path) -> None:
    rtmr = FakeRtmr()
    rtmr.broken = ABSENT
    record = made(rtmr, path, extend="if-possible")
    await record.check()
    assert not record.shows(ONE)
    await record.add(ONE)
    assert record.shows(ONE)
    shown = record.status()["error"]
    assert (shown["code"], shown["hint"]) == ("host", "Linux 6.16")
    assert await log_of(record) == ()
    assert record.status()["error"] is not None


# --- in the daemon --------------------------------------------------------------------


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.image()
    return world


def names(daemon: Daemon) -> list[str]:
    return [str(one["event"]) for one in daemon.events.after(0)]


async def test_it_is_extended_before_the_volume_counts_as_open(world: World) -> None:
    seen: list[tuple[dict[str, str], VolumeState]] = []
    real = world.rtmr.extend

    def extend(digest: bytes) -> None:
        seen.append((dict(world.mounts.table), daemon.volumes.named("model").state))
        real(digest)

    world.rtmr.extend = extend  # type: ignore[method-assign]
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        ((table, shown),) = seen
        assert table  # it was mounted by then
        assert shown is VolumeState.MAPPED  # and nothing could be served from it
        found = names(daemon)
        assert found.index("runtime.extended") < found.index("volume.mounted")
        assert daemon.status()["runtime"]["events"] == 1


async def test_a_volume_that_is_opened_again_extends_nothing_more(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        await daemon.unmount("model")
        await daemon.mount("model")
        assert len(world.rtmr.extended) == 1


async def test_another_generation_is_another_event(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        await daemon.unmount("model")
        world.server.generations["model"] = 2
        world.image(generation=2)
        await daemon.mount("model")
        assert world.rtmr.extended == [
            volume_event(make_bundle("model", number).manifest).digest()
            for number in (1, 2)
        ]


async def test_no_key_is_asked_for_where_it_could_not_be_used(world: World) -> None:
    """A kernel before 6.16, and a configuration that does not say so."""
    world.rtmr.broken = ABSENT
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.BACKOFF))
        assert world.server.asked == []
        shown = daemon.status()["volumes"][0]["error"]
        assert shown["hint"] == "Linux 6.16"
        world.rtmr.broken = None  # the module was loaded
        await until_mounted(daemon)


async def test_what_cannot_be_recorded_is_closed_and_not_served(world: World) -> None:
    world.rtmr.lost = REFUSED
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.BACKOFF))
        assert (world.mounts.table, world.mapper.open) == ({}, {})
        assert not daemon.readiness()[0]
        assert "volume.mounted" not in names(daemon)
        world.rtmr.lost = None
        await until_mounted(daemon)


async def test_if_the_register_is_not_ours_the_volume_fails(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        await daemon.unmount("model")
        world.rtmr.extend(b"x" * 48)
        world.server.generations["model"] = 2
        world.image(generation=2)
        with pytest.raises(RecordError):
            await daemon.mount("model")
        assert daemon.status()["runtime"]["error"]["code"] == "runtime-record"
        assert daemon.readiness()[2] == 65


@pytest.mark.parametrize("extend", ["never", "if-possible"])
async def test_a_configuration_that_says_so_serves_without(
    world: World, extend: Mode
) -> None:
    world.platform = dataclasses.replace(world.platform, extend=extend)
    world.config = world.make_config("model")
    world.rtmr.broken = ABSENT
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        shown = daemon.status()["runtime"]
        assert shown["extend"] == extend
        assert (shown["error"] is None) == (extend == "never")


async def test_a_reexec_extends_nothing_and_interrupts_nothing(world: World) -> None:
    handed = await first(world, until_mounted)

    async def use(daemon: Daemon) -> None:
        assert daemon.readiness() == (True, [], 0)
        await trio.sleep(0.1)
        assert names(daemon).count("volume.mounted") == 1

    await run_next(world, handed, use)
    assert len(world.rtmr.extended) == 1
    assert os.path.exists(world.platform.runtime_log)
