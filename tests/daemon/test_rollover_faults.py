"""What may befall one generation while another one is open or on its way."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tdxd.core.bundle import KeyBundle
from tdxd.core.exposition import Family, text
from tdxd.core.foreign import AnyBundle
from tdxd.core.plan import VolumeState
from tdxd.errors import DeniedError, NotReadyError, UnreachableError
from tdxd.guest import metrics
from tdxd.guest.daemon import Daemon
from tdxd.host.ports import MappedVolume
from tdxd.host.workers import cancelled_error
from tests.daemon.test_daemon import World
from tests.daemon.test_reexec import until_mounted
from tests.daemon.test_rollover import (
    generations,
    image,
    newer,
    release,
    rolled_over,
    serving,
)
from tests.daemon.test_rollover import world as world  # noqa: PLC0414 — a fixture
from tests.fakes import FakeMapper


class SlowMapper(FakeMapper):
    """Takes its time with generation 2, until it is told or called off."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.most_of_2 = 0

    def map_volume(
        self,
        image: str,
        bundle: AnyBundle,
        *,
        cancelled: Callable[[], bool],
        writable: bool = False,
    ) -> MappedVolume:
        if bundle.manifest.generation == 2:
            self.begun.set()
            for _ in range(500):  # a test that failed ends, too
                if self.go_on.wait(0.01):
                    break
                if cancelled():
                    raise cancelled_error(image)
        made = super().map_volume(image, bundle, cancelled=cancelled, writable=writable)
        twos = [one for one in self.open.values() if one.manifest.generation == 2]
        self.most_of_2 = max(self.most_of_2, len(twos))
        return made


def use(world: World, mapper: FakeMapper) -> None:
    world.mapper = mapper
    world.host = dataclasses.replace(world.host, mapper=mapper)  # type: ignore[arg-type]


def break_first(world: World, daemon: Daemon) -> None:
    mapped = daemon.volumes.all[0].device.mapped
    assert mapped is not None
    world.mapper.broken.add(mapped.device)
    daemon.changes.ring()


@asynccontextmanager
async def both_open(world: World) -> AsyncIterator[Daemon]:
    """Generation 2 is mounted beside 1, and no server of it answers yet."""
    serving(world)
    async with world.daemon() as daemon:
        daemon.serving.serves = lambda *_: False  # type: ignore[method-assign]
        daemon.volumes.refuse = lambda *_: False  # type: ignore[method-assign]
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        await daemon.until(
            lambda: generations(daemon) == [1, 2] and daemon.volumes.all[1].mounted
        )
        yield daemon


async def test_a_new_one_being_mapped_goes_on_when_the_old_one_breaks(
    world: World,
) -> None:
    """The host may break a block just then; mapping may take minutes."""
    mapper = SlowMapper()
    use(world, mapper)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        await trio.to_thread.run_sync(mapper.begun.wait, 5)
        break_first(world, daemon)
        await daemon.until(lambda: len(daemon.volumes.all) == 1)
        mapper.go_on.set()
        with trio.fail_after(5):
            await daemon.until(rolled_over(daemon, 2))
        assert mapper.most_of_2 == 1
        assert len(world.server.asked) == 2


async def test_a_new_one_that_waits_goes_on_when_the_old_one_breaks(
    world: World,
) -> None:
    """The old one rests for good then, but its successor need not."""
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        world.server.errors["model"] = UnreachableError("no key server")
        with pytest.raises(NotReadyError):
            await daemon.reload()
        break_first(world, daemon)
        await daemon.until(lambda: not world.mounts.table)
        world.server.errors.clear()
        with trio.fail_after(5):
            await daemon.until(rolled_over(daemon, 2))


async def test_one_that_failed_for_good_leaves_and_the_old_one_comes_back(
    world: World,
) -> None:
    """The lease of 1 runs out for want of a network, and 2 has no file that fits."""
    world.server.lease_s = 1000
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2, content="half an upload")
        release(world, 2)
        with pytest.raises(NotReadyError):
            await daemon.reload()
        release(world, 1)
        world.boottime.offset_s += 1001
        daemon.changes.ring()
        with trio.fail_after(5):
            await daemon.until(rolled_over(daemon, 1))


async def test_one_file_is_never_open_twice(world: World) -> None:
    """The second reconciler is still closing generation 2 when the first one gets its key."""
    mapper = SlowMapper()
    mapper.go_on.set()
    use(world, mapper)
    async with both_open(world) as daemon:
        second = daemon.volumes.all[1]
        world.mounts.busy.add(second.mount_point)
        daemon.volumes.close_all("model")
        daemon.changes.ring()
        await daemon.until(lambda: generations(daemon) == [None, 2])
        daemon.volumes.named("model").want(mounted=True)
        await daemon.until(
            lambda: daemon.volumes.named("model").state is VolumeState.KEYED
        )
        await trio.sleep(0.1)
        assert mapper.most_of_2 == 1
        world.mounts.busy.clear()
        daemon.changes.ring()
        await daemon.until(lambda: daemon.volumes.named("model").mounted)
        assert generations(daemon) == [2]
        assert mapper.most_of_2 == 1


async def test_unmount_returns_when_no_generation_is_open(world: World) -> None:
    """Also of one that left before, and whose server drains."""
    async with both_open(world) as daemon:
        first = daemon.volumes.all[0]
        world.mounts.busy.add(first.mount_point)
        daemon.serving.serves = lambda *_: True  # type: ignore[method-assign]
        daemon.changes.ring()
        await daemon.until(lambda: first.leaving)
        unmounted = trio.Event()

        async def unmount() -> None:
            await daemon.unmount("model")
            unmounted.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(unmount)
            await daemon.until(lambda: len(world.mounts.table) == 1)
            await trio.sleep(0.1)
            assert not unmounted.is_set()
            world.mounts.busy.clear()
            daemon.changes.ring()
        assert not world.mapper.open


async def test_what_is_open_is_not_opened_again_as_the_older_one_of_an_answer(
    world: World,
) -> None:
    """Both generations may be served, but there is no file of 2 yet."""
    world.server.older["model"] = (1,)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2, content="half an upload")
        release(world, 2)
        with pytest.raises(NotReadyError, match="is generation 2"):
            await daemon.reload()
        assert generations(daemon) == [1, None]
        assert len(world.mapper.open) == 1
        assert all(
            one.secret.wiped
            for one in world.server.bundles
            if isinstance(one, KeyBundle)
        )


async def test_a_release_without_a_new_file_is_noticed_in_time(world: World) -> None:
    """The image came first: nothing on the disk changes when the owner releases it."""
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        await daemon.reload()
        assert generations(daemon) == [1]
        look = daemon.volumes._looks["model"]
        ahead_s = look.next_s - trio.current_time()
        assert 230 < ahead_s < 370
        release(world, 2)
        daemon.changes.ring()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert len(world.server.asked) == 2
        look.next_s = trio.current_time()
        daemon.changes.ring()
        await daemon.until(rolled_over(daemon, 2))


async def test_a_refused_generation_is_tried_again_when_told(world: World) -> None:
    async with both_open(world) as daemon:
        second = daemon.volumes.all[1]
        second.refuse(NotReadyError("no such op"))
        await daemon.until(lambda: second.state is VolumeState.FAILED)
        asked = len(world.server.asked)
        await trio.sleep(0.1)
        assert len(world.server.asked) == asked
        await daemon.retry("model")
        await daemon.until(lambda: second.mounted)
        assert second.generation == 2


async def test_the_last_step_of_a_rollover_hides_what_else_is_on_its_way(
    world: World,
) -> None:
    """The old one drains, which is no reason to serve without a volume that comes."""
    async with both_open(world) as daemon:
        first, second = daemon.volumes.all
        world.mounts.busy.add(first.mount_point)
        daemon.serving.uses = lambda *_: True  # type: ignore[method-assign]
        daemon.serving.serves = lambda *_: True  # type: ignore[method-assign]
        daemon.changes.ring()
        await daemon.until(lambda: first.leaving and first.closing)
        served = daemon.volumes.served()
        assert served is not None
        assert [one.generation for one in served] == [2]
        second.want(mounted=True)  # it must be looked at once more
        assert not second.settled
        assert daemon.volumes.served() is None
        daemon.serving.uses = lambda *_: False  # type: ignore[method-assign]
        world.mounts.busy.clear()


async def test_in_place_the_front_is_told_that_the_next_one_is_on_its_way(
    world: World,
) -> None:
    """So it stays, and says meanwhile that there is no server."""
    mapper = SlowMapper()
    use(world, mapper)
    serving(world)
    assert world.config.serving is not None
    in_place = dataclasses.replace(world.config.serving, strategy="replace-in-place")
    world.config = dataclasses.replace(world.config, serving=in_place)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        going_on = [daemon.volumes.replacing]
        image(world, 2)
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        await trio.to_thread.run_sync(mapper.begun.wait, 5)
        going_on.append(daemon.volumes.replacing)
        mapper.go_on.set()
        await daemon.until(
            lambda: generations(daemon) == [2] and daemon.volumes.all[0].mounted
        )
        assert [*going_on, daemon.volumes.replacing] == [False, True, False]


# --- metrics ----------------------------------------------------------------------


def samples(daemon: Daemon) -> list[tuple[str, str, float]]:
    families: list[Family] = metrics._volumes(daemon, daemon.status()["volumes"])
    lines = text(families).splitlines()
    return [_sample(line) for line in lines if not line.startswith("#")]


def _sample(line: str) -> tuple[str, str, float]:
    name, _, rest = line.partition("{")
    labels, _, value = rest.rpartition("} ")
    return name, labels, float(value)


async def test_two_generations_have_one_sample_of_each(world: World) -> None:
    async with both_open(world) as daemon:
        found = samples(daemon)
        assert len({one[:2] for one in found}) == len(found)
        assert ("tdxd_volume_generation", 'volume="model"', 1.0) in found
        daemon.serving.serves = lambda *_: True  # type: ignore[method-assign]
        world.mounts.busy.update(world.mounts.table)
        daemon.changes.ring()
        await daemon.until(lambda: daemon.volumes.all[0].leaving)
        found = samples(daemon)
        assert len({one[:2] for one in found}) == len(found)
        assert ("tdxd_volume_generation", 'volume="model"', 2.0) in found
        world.mounts.busy.clear()


async def test_a_rollover_that_fails_is_a_metric(world: World) -> None:
    sample = "tdxd_volume_rollover_failing", 'volume="model"'
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        assert (*sample, 0.0) in samples(daemon)
        image(world, 2)
        world.server.errors["model"] = DeniedError("policy says no")
        with pytest.raises(NotReadyError):
            await daemon.reload()
        assert newer(daemon).state is VolumeState.DENIED
        assert (*sample, 1.0) in samples(daemon)
