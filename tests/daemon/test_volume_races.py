"""What may come in the middle of a step of a volume: a reload, a stop, a late answer."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tdxd.core.foreign import AnyBundle
from tdxd.core.plan import VolumeState
from tdxd.core.secret import Secret
from tdxd.errors import BusyError, ConfigError, NotReadyError
from tdxd.guest import volume_device
from tdxd.guest.daemon import Daemon
from tdxd.host import images
from tdxd.host.images import ImageFile
from tdxd.host.ports import MappedVolume
from tdxd.host.workers import cancelled_error
from tests.daemon.test_daemon import World
from tests.daemon.test_foreign_volumes import WORD, ForeignWorld, until_asked, volume
from tests.daemon.test_reexec import first, run_next, until_mounted
from tests.fakes import FakeMapper


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.image()
    return made


def hold_open(world: World) -> None:
    """Let whatever is mounted be busy, so that closing takes its time."""
    world.mounts.busy.update(world.mounts.table)


def let_go(world: World, daemon: Daemon) -> None:
    world.mounts.busy.clear()
    daemon.changes.ring()


async def closing(daemon: Daemon) -> None:
    await daemon.until(lambda: volume(daemon)["state"] == "closing")


async def test_a_change_that_is_taken_back_while_the_volume_closes(
    world: World,
) -> None:
    before = world.config
    (spec,) = before.volume
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        hold_open(world)
        async with trio.open_nursery() as nursery:
            optional = dataclasses.replace(spec, required=False)
            world.config = dataclasses.replace(before, volume=(optional,))
            nursery.start_soon(daemon.reload)
            await closing(daemon)
            world.config = before
            nursery.start_soon(daemon.reload)
            await trio.testing.wait_all_tasks_blocked()
            let_go(world, daemon)
        assert daemon.readiness() == (True, [], 0)
        assert daemon.volumes.named("model").mounted


async def test_a_reload_does_not_hold_up_a_stop(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        hold_open(world)
        async with trio.open_nursery() as nursery:
            stopped = trio.Event()

            async def stop() -> None:
                await daemon.stop()
                stopped.set()

            async def reload() -> None:
                with contextlib.suppress(NotReadyError):  # for it ends meanwhile
                    await daemon.reload()

            nursery.start_soon(stop)
            await closing(daemon)
            nursery.start_soon(reload)
            await trio.testing.wait_all_tasks_blocked()
            let_go(world, daemon)
            with trio.fail_after(10):
                await stopped.wait()
            nursery.cancel_scope.cancel()


class ClosingMapper(FakeMapper):
    """Holds a look up until its device is being closed, and the closing until it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = False
        self.closing, self.close = threading.Event(), threading.Event()

    def intact(self, mapped: MappedVolume) -> bool:
        if self.slow:
            self.closing.wait(10)
            return False
        return super().intact(mapped)

    def unmap(self, mapped: MappedVolume) -> None:
        if self.slow:
            self.closing.set()
            self.close.wait(10)
        super().unmap(mapped)


async def test_a_look_that_ends_while_the_device_is_closed_is_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finds no device any more: a lease that ends must not look like a changed image."""
    monkeypatch.setattr(volume_device, "_GLANCE_S", 0.05)
    world, mapper = ForeignWorld(tmp_path), ClosingMapper()
    world.use(mapper)
    world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        await daemon.mount("model", Secret(WORD))
        mapper.slow = True
        daemon.changes.ring()
        one = daemon.volumes.named("model")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.unmount, "model")
            while not mapper.closing.is_set() or one.device._checking is not None:
                await trio.sleep(0.01)
            late = Secret(WORD)
            with pytest.raises(BusyError, match="is being closed"):
                await daemon.mount("model", late)
            assert late.wiped
            mapper.slow = False
            mapper.close.set()
        assert one.failure is None
        told = one.last_error
        assert told is None or told.code == "passphrase-needed"
        await daemon.mount("model", Secret(WORD))


async def test_writing_is_refused_in_words_also_with_a_passphrase(
    tmp_path: Path,
) -> None:
    world = ForeignWorld(tmp_path)
    world.configure(writable=True)
    world.luks2()
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("model").failure is not None)
        offered = Secret(WORD)
        with pytest.raises(ConfigError, match="writable needs the mapper dm"):
            await daemon.mount("model", offered)
        assert offered.wiped
        assert daemon.volumes.named("model").state is VolumeState.FAILED


async def test_a_wrong_block_is_seen_though_the_directory_does_not_answer(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a host could have a volume pass for mounted, and ready, that gives nothing but EIO."""
    monkeypatch.setattr(volume_device, "_GLANCE_S", 0.05)
    answers, hung = threading.Event(), threading.Event()
    real = images.candidates

    def candidates(pattern: str) -> tuple[ImageFile, ...]:
        if hung.is_set():
            answers.wait(60)
        return real(pattern)

    monkeypatch.setattr(images, "candidates", candidates)
    try:
        async with world.daemon() as daemon:
            await until_mounted(daemon)
            hung.set()
            daemon.changes.ring()
            await trio.testing.wait_all_tasks_blocked()
            world.mapper.broken.update(world.mapper.open)
            daemon.changes.ring()
            with trio.fail_after(10):
                await daemon.until(lambda: not daemon.readiness()[0])
                await daemon.until(lambda: not world.mapper.open)
            told = daemon.volumes.named("model").last_error
            assert told is not None
            assert told.code == "volume-integrity"
            answers.set()
    finally:
        answers.set()


class SlowMapper(FakeMapper):
    """Opens an image when it is told to, or stops when it was called off."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go_on = threading.Event(), threading.Event()

    def map_volume(
        self,
        image: str,
        bundle: AnyBundle,
        *,
        cancelled: Callable[[], bool],
        writable: bool = False,
    ) -> MappedVolume:
        self.inside.set()
        self.go_on.wait(10)
        if cancelled():
            raise cancelled_error(image)
        return super().map_volume(image, bundle, cancelled=cancelled, writable=writable)


async def test_a_mapping_that_was_called_off_is_no_failure(world: World) -> None:
    """Nobody wants it, and then somebody does, before the thread has noticed."""
    mapper = SlowMapper()
    world.mapper = mapper
    world.host = dataclasses.replace(world.host, mapper=mapper)  # type: ignore[arg-type]
    async with world.daemon() as daemon:
        await trio.to_thread.run_sync(mapper.inside.wait, 10)
        daemon.volumes.named("model").want(mounted=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.mount, "model")
            await trio.testing.wait_all_tasks_blocked()
            mapper.go_on.set()
        assert daemon.volumes.named("model").mounted
        assert daemon.volumes.named("model").last_error is None


async def test_what_was_leaving_leaves_in_the_next_program(world: World) -> None:
    """An older program could want what leaves: such a volume was neither there nor gone."""
    handed = await first(world, until_mounted)
    (one,) = handed.volumes
    torn = dataclasses.replace(one, wanted=True, leaving=True)
    handed = dataclasses.replace(handed, volumes=(torn,))

    async def use(daemon: Daemon) -> None:
        with trio.fail_after(10):
            await daemon.until(lambda: daemon.readiness()[0])

    await run_next(world, handed, use)
