"""A daemon whose one volume lies on a disk that hangs: it costs that volume, and no other one.

The disk is a FUSE file system that does not answer; as with a real one, not even SIGKILL ends what
waits for it. The watchdog would restart the daemon after 30 s: it must see no reason to.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tdxd.core.bundle import KeyBundle
from tdxd.core.config import VolumeConfig
from tdxd.core.plan import VolumeState
from tdxd.errors import ReexecError, TdxdError
from tdxd.guest import daemon as daemon_module
from tdxd.guest import opening, volume_device
from tdxd.guest.attest import Bundles
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.daemon import Daemon
from tdxd.guest.leased import Leased
from tdxd.host import loop
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.ports import Mapper
from tests import reference_image
from tests.attacks.faulty_file import FaultyFile, faulty_file
from tests.daemon.test_daemon import World, state
from tests.leftovers import held
from tests.reference_image import PAYLOAD_OFFSET, Reference

pytestmark = pytest.mark.root
pytest.importorskip("mfusepy", reason="mfusepy is not installed")

DATA_BLOCKS = 300
LIMIT_S = 20.0
LONG_S = 3600.0
GOOD, SLOW = f"hang-good-{os.getpid()}", f"hang-slow-{os.getpid()}"
"""Names of this process alone: devices are the whole machine's."""


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    before = held(str(tmp_path)).children
    yield
    assert held(str(tmp_path)).children == before
    assert devices() == ()


def devices() -> tuple[str, ...]:
    """Loop devices of our two volumes."""
    return tuple(
        one for name in (GOOD, SLOW) for one in loop.attached(f"/memfd:tdxd:{name}")
    )


class TwoVolumes(World):
    """A good volume, and one whose image is where `file` is; the mapper is the real one."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.config = self.make_config(GOOD, SLOW)
        data = os.urandom(DATA_BLOCKS * 4096)
        self.images: dict[str, Reference] = {
            name: reference_image.seal(
                data, directory / f"{name}.sealed", volume_id=name
            )
            for name in (GOOD, SLOW)
        }
        shutil.copy(self.images[GOOD].path, directory / f"{GOOD}.img")
        real = MemoryMapper(limit_bytes=2**30, workers=1)
        self.host = dataclasses.replace(self.host, mapper=real)
        self.server.fetch = self.fetch  # type: ignore[method-assign]

    def look_at(self, pattern: Path) -> None:
        """Let the slow volume's image be there."""
        good, slow = self.config.volume
        slow = dataclasses.replace(slow, image=str(pattern))
        self.config = dataclasses.replace(self.config, volume=(good, slow))

    async def fetch(self, _loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        await trio.lowlevel.checkpoint()
        answers: dict[str, Leased | TdxdError] = {}
        for name in ids:
            image = self.images[name]
            bundle = KeyBundle(
                manifest=image.bundle.manifest, secret=image.fresh_secret()
            )
            answers[name] = Leased(bundle=bundle)
        return answers


@pytest.fixture
def world(tmp_path: Path) -> TwoVolumes:
    return TwoVolumes(tmp_path)


@pytest.fixture
def file(world: TwoVolumes, tmp_path: Path) -> Iterator[FaultyFile]:
    with faulty_file(world.images[SLOW].path, tmp_path / "mnt") as made:
        world.look_at(made.path)
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever takes longer than a moment counts as hanging, so that no test waits a minute."""
    monkeypatch.setattr(opening, "_LEAST_S", 0.05)
    monkeypatch.setattr(volume_device, "_STEP_S", 0.05)


def hang(file: FaultyFile, block: int) -> None:
    start = PAYLOAD_OFFSET + block * 4096
    file.hang(start, start + 4096)


ROOT, DATA = DATA_BLOCKS, 7
PLACES = pytest.mark.parametrize(
    "block", [ROOT, DATA], ids=["in the daemon's thread", "in a worker process"]
)


@asynccontextmanager
async def running(world: World, file: FaultyFile) -> AsyncIterator[Daemon]:
    """A daemon; what hangs is let go at the end, whatever happens: nothing else would end it."""
    async with world.daemon() as daemon:
        try:
            yield daemon
        except BaseException:
            file.heal()
            with trio.move_on_after(LIMIT_S, shield=True):
                await daemon.stop()
            raise
        file.heal()


async def until_it_hangs(daemon: Daemon, file: FaultyFile) -> None:
    await trio.to_thread.run_sync(file.until_something_hangs)
    await daemon.until(state(daemon, VolumeState.MOUNTED, GOOD))


def shown(daemon: Daemon, name: str) -> dict[str, object]:
    (one,) = [one for one in daemon.status()["volumes"] if one["id"] == name]
    assert isinstance(one, dict)
    return one


@PLACES
async def test_the_other_volume_opens_and_the_watchdog_is_fed(world, file, block):
    """A read may take a minute and more: only what nobody waits for would be restarted."""
    hang(file, block)
    async with running(world, file) as daemon:
        await until_it_hangs(daemon, file)
        slow = daemon.volumes.named(SLOW)
        assert slow.beat_s > trio.current_time() + LONG_S
        daemon.volumes.named(GOOD).want(mounted=False)
        await daemon.until(state(daemon, VolumeState.ABSENT, GOOD))
        daemon.volumes.named(GOOD).want(mounted=True)
        await daemon.until(state(daemon, VolumeState.MOUNTED, GOOD))
        file.heal()
        await daemon.until(state(daemon, VolumeState.MOUNTED, SLOW))


@PLACES
async def test_it_is_told_and_ends_by_itself(world, file, block, impatient):
    hang(file, block)
    async with running(world, file) as daemon:
        await until_it_hangs(daemon, file)
        await daemon.until(lambda: daemon.volumes.named(SLOW).stalled)
        told = shown(daemon, SLOW)["error"]
        assert isinstance(told, dict)
        assert told["code"] == "volume-stalled"
        assert "the disk of the image" in str(told["hint"])
        assert shown(daemon, GOOD)["error"] is None
        file.heal()
        await daemon.until(state(daemon, VolumeState.MOUNTED, SLOW))
        assert shown(daemon, SLOW)["error"] is None


@PLACES
async def test_what_is_called_off_meanwhile_is_not_opened_later(world, file, block):
    hang(file, block)
    async with running(world, file) as daemon:
        await until_it_hangs(daemon, file)
        daemon.volumes.named(SLOW).want(mounted=False)
        file.heal()
        await daemon.until(state(daemon, VolumeState.ABSENT, SLOW))
        assert daemon.volumes.named(SLOW).device.mapped is None
        (only,) = devices()
        mapped = daemon.volumes.named(GOOD).device.mapped
        assert mapped is not None
        assert only == mapped.device


@PLACES
async def test_a_stop_does_not_wait_for_the_disk(world, file, block, monkeypatch):
    monkeypatch.setattr(daemon_module, "_STOP_DEADLINE_S", 0.2)
    under_way: list[str] = []
    ended, work = threading.Event(), opening.map_first

    def map_first(mapper: Mapper, spec: VolumeConfig, *args: Any, **more: Any) -> Any:
        under_way.append(spec.id)
        try:
            return work(mapper, spec, *args, **more)
        finally:
            under_way.remove(spec.id)
            if spec.id == SLOW:
                ended.set()

    monkeypatch.setattr(opening, "map_first", map_first)
    hang(file, block)
    async with trio.open_nursery() as nursery:
        daemon = world.make_daemon(nursery)
        daemon.start()
        with trio.fail_after(LIMIT_S):
            await until_it_hangs(daemon, file)
            await daemon.stop()
            await daemon.close()
        nursery.cancel_scope.cancel()
    assert under_way == [SLOW]
    assert devices() == ()
    file.heal()  # what the thread brings after all is nobody's: it must be no mapping
    assert await trio.to_thread.run_sync(ended.wait, LIMIT_S)
    assert devices() == ()


async def test_a_program_is_not_replaced_while_a_read_hangs(world, file):
    """An exec would wait for the read, and everything with it."""
    hang(file, ROOT)
    async with running(world, file) as daemon:
        await until_it_hangs(daemon, file)
        daemon.standstill.freeze()
        with pytest.raises(ReexecError, match=f"volume {SLOW}"):
            await daemon.standstill.reached(0.05)
        daemon.standstill.release()
        file.heal()
        await daemon.until(state(daemon, VolumeState.MOUNTED, SLOW))


async def test_a_directory_that_hangs_holds_up_no_other_volume(world, file, impatient):
    file.hang_names()
    async with running(world, file) as daemon:
        await until_it_hangs(daemon, file)
        await daemon.until(lambda: daemon.volumes.named(SLOW).stalled)
        assert daemon.volumes.named(SLOW).beat_s > trio.current_time() + LONG_S
        assert shown(daemon, GOOD)["state"] == "mounted"
        daemon.volumes.named(GOOD).want(mounted=False)
        await daemon.until(state(daemon, VolumeState.ABSENT, GOOD))
        file.heal()
        await daemon.until(state(daemon, VolumeState.MOUNTED, SLOW))


async def test_a_directory_that_hangs_later_closes_nothing(world, file, impatient):
    """What is open does not depend on the directory."""
    async with running(world, file) as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED, SLOW))
        file.hang_names()
        daemon.changes.ring()
        await trio.to_thread.run_sync(file.until_something_hangs)
        await daemon.until(lambda: daemon.volumes.named(SLOW).stalled)
        assert shown(daemon, SLOW)["state"] == "mounted"
        assert shown(daemon, GOOD)["state"] == "mounted"
        file.heal()
        await daemon.until(lambda: not daemon.volumes.named(SLOW).stalled)


async def test_a_disk_error_is_tried_again_by_itself(world, file):
    start = PAYLOAD_OFFSET + DATA * 4096
    file.fail(start, start + 4096)
    async with running(world, file) as daemon:
        await daemon.until(state(daemon, VolumeState.BACKOFF, SLOW))
        told = shown(daemon, SLOW)["error"]
        assert isinstance(told, dict)
        assert "Input/output error" in told["message"]
        file.heal()
        await daemon.until(state(daemon, VolumeState.MOUNTED, SLOW))


async def test_thousands_of_files_match_the_pattern(world, tmp_path):
    """The right one comes last; what is no image costs a read of one block each."""
    place = tmp_path / "many"
    place.mkdir()
    size = world.images[SLOW].path.stat().st_size
    (place / "0.img").write_bytes(b"")
    os.truncate(place / "0.img", size)
    for number in range(1, 1200):
        os.link(place / "0.img", place / f"{number}.img")
    shutil.copy(world.images[SLOW].path, place / "z.img")
    world.look_at(place / "*.img")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED, GOOD))
        await daemon.until(state(daemon, VolumeState.MOUNTED, SLOW))
        assert shown(daemon, SLOW)["image"] == str(place / "z.img")
