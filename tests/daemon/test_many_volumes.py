"""Ten volumes at once: one that fails or hangs costs no other one anything."""

from __future__ import annotations

import dataclasses
import errno
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tdxd.core.config import VolumeConfig
from tdxd.core.foreign import AnyBundle
from tdxd.core.plan import VolumeState
from tdxd.errors import DeniedError, HostError, NotReadyError, ReexecError, StalledError
from tdxd.guest import daemon as daemon_module
from tdxd.guest import opening, reconciler, volume_device
from tdxd.guest.daemon import Daemon
from tdxd.host import images
from tdxd.host.images import ImageFile
from tdxd.host.ports import MappedVolume
from tests.daemon.test_daemon import World
from tests.daemon.test_reexec import nothing
from tests.fakes import FakeMapper

TEN = tuple(f"m{number}" for number in range(10))


class HangingMapper(FakeMapper):
    """Lets volumes wait in their threads, as a disk that does not answer does."""

    def __init__(self) -> None:
        super().__init__()
        self.hang: set[str] = set()
        self.eio: set[str] = set()
        self.together = 0
        """The most that were ever inside at once."""
        self._inside = 0
        self._answers = threading.Event()
        self._lock = threading.Lock()
        self.all_here: threading.Barrier | None = None

    def map_volume(
        self,
        image: str,
        bundle: AnyBundle,
        *,
        cancelled: Callable[[], bool],
        writable: bool = False,
    ) -> MappedVolume:
        name = bundle.manifest.volume_id
        with self._lock:
            self._inside += 1
            self.together = max(self.together, self._inside)
        try:
            if self.all_here is not None:
                self.all_here.wait(10)
            if name in self.hang:
                self._answers.wait()
            if name in self.eio:
                raise HostError("read", image, errno.EIO)
            return super().map_volume(
                image, bundle, cancelled=cancelled, writable=writable
            )
        finally:
            with self._lock:
                self._inside -= 1

    def answer(self) -> None:
        self._answers.set()

    @property
    def answered(self) -> bool:
        return self._answers.is_set()


class ManyWorld(World):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.disk = HangingMapper()
        self.mapper = self.disk
        self.host = dataclasses.replace(self.host, mapper=self.disk)  # type: ignore[arg-type]
        self.have(*TEN)

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[Daemon]:
        """A disk that does not answer does so at the end, also of a test that fails."""
        async with super().daemon() as daemon:
            try:
                yield daemon
            finally:
                self.disk.answer()

    def have(self, *names: str, optional: tuple[str, ...] = ()) -> None:
        """Configure volumes and make their images."""
        for name in names:
            self.image(name)
        volumes = tuple(
            VolumeConfig(
                id=name,
                image=str(self.directory / f"{name}.img"),
                required=name not in optional,
            )
            for name in names
        )
        self.config = dataclasses.replace(self.make_config(), volume=volumes)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ManyWorld:
    """What hangs counts as hanging at once."""
    monkeypatch.setattr(opening, "_LEAST_S", 0.3)
    monkeypatch.setattr(opening, "_SLOWEST_BYTES_PER_S", 1e12)
    return ManyWorld(tmp_path)


def all_mounted(daemon: Daemon, names: set[str]) -> Callable[[], bool]:
    return lambda: all(daemon.volumes.named(name).mounted for name in names)


def mounted(daemon: Daemon) -> Callable[[str], bool]:
    """Say of an id whether it is mounted, also while none of that id is there."""
    return lambda name: any(
        one["id"] == name and one["state"] == "mounted"
        for one in daemon.status()["volumes"]
    )


async def test_ten_volumes_are_mapped_at_the_same_time(world: ManyWorld) -> None:
    """None begins to be mapped only when another one is done: all ten meet inside."""
    world.disk.all_here = threading.Barrier(10)
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.readiness()[0])
    assert world.disk.together == 10
    assert world.server.asked == [TEN]  # one attester, one quote


async def test_each_kind_of_failure_leaves_the_others_alone(world: ManyWorld) -> None:
    world.server.errors["m1"] = DeniedError("policy says no")
    world.disk.eio = {"m2"}
    world.image("m3", generation=9)
    (world.directory / "m4.img").unlink()
    world.disk.hang = {"m5"}
    async with world.daemon() as daemon:
        await daemon.until(all_mounted(daemon, {"m0", "m6", "m7", "m8", "m9"}))
        await daemon.until(lambda: daemon.volumes.named("m5").stalled)
        await daemon.until(daemon.settled)
        shown = {one["id"]: one for one in daemon.status()["volumes"]}
        codes = {name: (shown[name]["error"] or {}).get("code") for name in TEN}
        assert codes == {
            **dict.fromkeys(TEN),
            "m1": "key-denied",
            "m2": "host",
            "m3": "volume-integrity",
            "m4": "volume-missing",
            "m5": "volume-stalled",
        }
        assert shown["m1"]["state"] == "denied"
        assert shown["m5"]["error"]["hint"]
        world.disk.answer()
        await daemon.until(all_mounted(daemon, {"m5"}))
        told = daemon.status()["volumes"][5]
        assert told["error"] is None


async def test_only_what_is_required_decides_readiness(world: ManyWorld) -> None:
    world.have(*TEN, optional=("m3", "m7"))
    world.server.errors["m3"] = DeniedError("policy says no")
    world.disk.hang = {"m7"}
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.readiness()[0])
        assert not daemon.volumes.named("m7").mounted
        world.server.errors["m1"] = DeniedError("policy says no")
        await daemon.unmount("m1")
        assert daemon.readiness()[1] == ["volume m1 is absent"]
        world.disk.answer()


async def test_serving_waits_for_an_optional_volume_only_for_a_while(
    world: ManyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "_LEAST_S", 1000.0)
    monkeypatch.setattr(reconciler, "_OPTIONAL_S", 0.2)
    world.have(*TEN, optional=("m7",))
    world.disk.hang = {"m7"}
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.readiness()[0])
        while daemon.volumes.served() is None:
            await trio.sleep(0.02)
        served = daemon.volumes.served()
        assert served is not None
        assert {one.volume_id for one in served} == set(TEN) - {"m7"}
        world.disk.answer()


async def test_serving_goes_on_without_a_required_volume_that_hangs(
    world: ManyWorld,
) -> None:
    world.disk.hang = {"m7"}
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("m7").stalled)
        await daemon.until(all_mounted(daemon, set(TEN) - {"m7"}))
        await daemon.until(lambda: daemon.volumes.served() is not None)
        served = daemon.volumes.served()
        assert served is not None
        assert len(served) == 9
        assert daemon.readiness()[1] == ["volume m7 is keyed"]
        assert daemon.readiness()[2] == 75
        world.disk.answer()


async def test_more_volumes_hang_than_trio_has_threads(world: ManyWorld) -> None:
    """Its own limit is forty, for all: the quote of the last volume needs one of them, too."""
    dead = tuple(f"d{number}" for number in range(45))
    world.have(*dead, "good")
    world.disk.hang = {*dead}
    async with world.daemon() as daemon:
        await daemon.until(all_mounted(daemon, {"good"}))
        await daemon.until(lambda: daemon.volumes.named("d44").stalled)
        world.disk.answer()


async def test_the_watchdog_does_not_end_all_for_one_that_hangs(
    world: ManyWorld,
) -> None:
    world.disk.hang = {"m0"}
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("m0").stalled)
        daemon.volumes.named("m0").want(mounted=False)  # and nobody can help it
        assert daemon.volumes.named("m0").beat_s > trio.current_time() + 3600
        world.disk.answer()


async def test_a_directory_that_does_not_answer(
    world: ManyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the host's disk is looked at where the daemon's other work is done."""
    monkeypatch.setattr(volume_device, "_STEP_S", 0.3)
    answers, main = threading.Event(), threading.get_ident()
    real = images.candidates

    def candidates(pattern: str) -> tuple[ImageFile, ...]:
        assert threading.get_ident() != main
        if pattern.endswith("m0.img"):
            answers.wait()
        return real(pattern)

    monkeypatch.setattr(images, "candidates", candidates)
    try:
        async with world.daemon() as daemon:
            await daemon.until(all_mounted(daemon, set(TEN) - {"m0"}))
            await daemon.until(lambda: daemon.volumes.named("m0").stalled)
            with pytest.raises(
                StalledError, match=r"looking for .*m0\.img takes longer"
            ):
                await daemon.mount("m0")
            answers.set()
            await daemon.until(all_mounted(daemon, {"m0"}))
    finally:
        answers.set()


async def test_a_directory_that_does_not_answer_keeps_nothing_open(
    world: ManyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a host could hold off a revocation: the lease ends, and the volume is closed."""
    answers, hung = threading.Event(), threading.Event()
    real = images.candidates

    def candidates(pattern: str) -> tuple[ImageFile, ...]:
        if hung.is_set():
            answers.wait()
        return real(pattern)

    monkeypatch.setattr(images, "candidates", candidates)
    world.server.lease_s = 3600
    try:
        async with world.daemon() as daemon:
            await daemon.until(all_mounted(daemon, set(TEN)))
            hung.set()
            world.boottime.offset_s += 7200
            await daemon.until(lambda: not world.mapper.open)
            assert world.mounts.table == {}
        assert not answers.is_set()  # and the daemon's end did not wait for it
    finally:
        answers.set()


async def test_a_reload_with_one_that_hangs(world: ManyWorld) -> None:
    """What is configured anew is opened, and what hangs comes back as it is configured now."""
    world.disk.hang = {"m0"}
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("m0").stalled)
        world.have(*TEN[1:], "new")
        await daemon.reload()  # m0 is wanted no more: all that is required is there
        assert daemon.volumes.named("new").mounted
        assert [one.spec.id for one in daemon.volumes.all].count("m0") == 1
        world.have(*TEN)
        with pytest.raises(NotReadyError):  # the old one is still there
            await daemon.reload()
        world.disk.answer()
        await daemon.until(lambda: all(map(mounted(daemon), TEN)))


async def test_no_new_program_while_a_volume_hangs(
    world: ManyWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that cannot be ended would keep the exec from happening; all goes on."""
    monkeypatch.setattr(daemon_module, "_STANDSTILL_S", 0.2)
    world.disk.hang = {"m0"}
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("m0").stalled)
        with pytest.raises(ReexecError, match=r"still under way .*volume m0"):
            await daemon.reexec(nothing)
        await daemon.until(all_mounted(daemon, set(TEN) - {"m0"}))
        world.disk.answer()


async def test_the_end_does_not_wait_for_one_that_hangs(world: ManyWorld) -> None:
    """All others are closed at once, before any deadline; the one is left to the kernel."""
    world.disk.hang = {"m0"}
    async with trio.open_nursery() as nursery:
        daemon = world.make_daemon(nursery)
        daemon.start()
        try:
            with trio.fail_after(40):
                await daemon.until(all_mounted(daemon, set(TEN) - {"m0"}))
                await daemon.until(lambda: daemon.volumes.named("m0").stalled)
                async with trio.open_nursery() as stopping:
                    stopping.start_soon(daemon.stop)
                    await daemon.until(lambda: not world.mapper.open)
                    stopping.cancel_scope.cancel()  # as its deadline does
                assert world.mounts.table == {}
                await daemon.close()
            nursery.cancel_scope.cancel()
            assert not world.disk.answered
        finally:
            world.disk.answer()


async def test_what_one_volume_needs_is_wiped_for_each(world: ManyWorld) -> None:
    world.disk.eio = {"m2"}
    async with world.daemon() as daemon:
        await daemon.until(all_mounted(daemon, set(TEN) - {"m2"}))
        await daemon.until(
            lambda: daemon.volumes.named("m2").state is VolumeState.BACKOFF
        )
        assert all(one.secret.wiped for one in world.server.bundles)  # type: ignore[attr-defined]


async def test_a_reload_that_needs_what_still_hangs(world: ManyWorld) -> None:
    """It was optional and is required now: the reload says so, and does not wait for the disk."""
    world.have(*TEN, optional=("m0",))
    world.disk.hang = {"m0"}
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("m0").stalled)
        world.have(*TEN)
        with pytest.raises(NotReadyError, match="volume m0 is closing"):
            await daemon.reload()
        assert daemon.readiness()[2] == 75
        world.disk.answer()
        await daemon.until(lambda: all(map(mounted(daemon), TEN)))
