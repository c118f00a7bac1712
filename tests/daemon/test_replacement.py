"""One model server takes over from another: beside it or in its place, and what if it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import trio
import trio.lowlevel

from tdxd.core.config import (
    Config,
    ControlConfig,
    KeyReleaseConfig,
    ServingConfig,
    VolumeConfig,
)
from tdxd.core.plan import ServingState
from tdxd.errors import NoRoomError, NotReadyError, TdxdError
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.front import Front, front_key
from tdxd.guest.handover import ServedVolume
from tdxd.guest.server import ModelServer
from tdxd.guest.serving import ServingReconciler
from tdxd.guest.standstill import Standstill
from tdxd.host.ports import Cell, Child, ChildSpec, Host, PrivateTmp
from tests.core.test_serving_config import OURS
from tests.daemon.test_cut_off import FakeApi, FakeCell, FakeChild
from tests.daemon.test_daemon import KEY
from tests.fakes import FakeChildren, FakeVolumes, fake_host

pytestmark = pytest.mark.root

MIB = 2**20


class NoStreams(FakeApi):
    async def streams(self, slot: str) -> int:
        await trio.lowlevel.checkpoint()
        return 0


class Program(FakeChild):
    """Says what version it is; one that serves ends when it is told to."""

    def __init__(self, name: str, journal: list[str], said: str) -> None:
        super().__init__(name, journal)
        self.said = said
        self.ended = trio.Event()

    async def wait(self) -> int:
        await self.ended.wait()
        return 1

    async def lines(self) -> AsyncIterator[str]:
        await trio.lowlevel.checkpoint()
        for line in self.said.splitlines():
            yield line


class StartingChildren(FakeChildren):
    """Starts what takes part of a model server."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.started: dict[str, Program] = {}

    def make_cell(
        self,
        *,
        hide: str,
        binds: Sequence[tuple[str, str]],
        tmp: PrivateTmp | None = None,
    ) -> Cell:
        return FakeCell()

    def spawn(self, spec: ChildSpec) -> Child:
        if "--version" in spec.argv:
            return Program("version", [], OURS)
        self.journal.append(f"start {spec.name}")
        self.started[spec.name] = Program(spec.name, self.journal, "it broke")
        return self.started[spec.name]


class World:
    """Two generations of a volume on a disk; `blame` is who takes it."""

    def __init__(self, directory: Path, nursery: trio.Nursery, **serving: str) -> None:
        self.directory = directory
        self.journal: list[str] = []
        self.children = StartingChildren(self.journal)
        self.events, self.changes = Events(), Changes()
        self.served: tuple[ServedVolume, ...] | None = (self.volume(1),)
        self.refusals: list[tuple[tuple[ServedVolume, ...], TdxdError]] = []
        self.blame = True
        self.available_bytes, self.running_bytes = 2**40, MIB
        config = ServingConfig(
            user="nobody",
            command="/bin/true",
            strategy=serving.get("strategy", "side-by-side"),  # type: ignore[arg-type]
            listen="127.0.0.1:0",
        )
        host: Host = dataclasses.replace(
            fake_host(),
            children=self.children,
            available_memory_bytes=lambda: self.available_bytes,
            tree_memory_bytes=lambda _pid: self.running_bytes,
        )
        self.volumes = FakeVolumes(lambda: self.served, refuse=self.refused)
        self.one = ServingReconciler(
            host=host,
            config=Config(
                key_release=KeyReleaseConfig(
                    servers=("localhost:1",), ca="/ca", signing_key=KEY
                ),
                volume=(VolumeConfig(id="m", image="/none"),),
                serving=config,
                control=ControlConfig(runtime_dir=str(directory / "run")),
            ),
            standstill=Standstill(),
            changes=self.changes,
            events=self.events,
            volumes=self.volumes,
            nursery=nursery,
        )
        front = Front(
            key=front_key(config, supplied=True),
            active=None,
            child=FakeChild("front", self.journal),
            cell=FakeCell(),
            api=cast("object", NoStreams(self.journal)),  # type: ignore[arg-type]
        )
        front.sources = ("volume m@1",)
        self.one.door.front = front

    def volume(self, generation: int) -> ServedVolume:
        path = self.directory / f"m@{generation}"
        (path / "models" / "digits" / str(generation)).mkdir(
            parents=True, exist_ok=True
        )
        return ServedVolume(volume_id="m", generation=generation, mount_point=str(path))

    def refused(self, volumes: tuple[ServedVolume, ...], error: TdxdError) -> bool:
        self.refusals.append((volumes, error))
        if not self.blame or volumes[0].generation == 1:
            return False
        self.served = (self.volume(1),)
        return True

    def roll_over(self) -> None:
        self.served = (self.volume(2),)
        self.journal.clear()
        self.changes.ring()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(5):
            while not condition():
                await trio.sleep(0.01)

    async def until_serves(self, generation: int) -> None:
        await self.until(
            lambda: (
                self.one.serves("m", generation)
                and self.one.state is ServingState.READY
            )
        )

    def count(self, event: str) -> int:
        kinds = self.events.by_kind.items()
        return sum(count for key, count in kinds if key[0] == event)


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Which generations' servers are ready at once ("ready"), break ("broken"), or wait."""
    fate = {1: "ready", 2: "ready"}

    async def poll(self: ModelServer) -> None:
        await trio.lowlevel.checkpoint()
        mine = fate[self.volumes[0].generation]
        if mine == "broken":
            raise NotReadyError("model 'digits' version 2: no such op")
        self.ready = mine == "ready"

    monkeypatch.setattr(ModelServer, "poll", poll)
    return fate


@contextlib.asynccontextmanager
async def world_of(directory: Path, strategy: str) -> AsyncIterator[World]:
    os.makedirs(directory / "run" / "serve")
    async with trio.open_nursery() as nursery:
        made = World(directory, nursery, strategy=strategy)
        nursery.start_soon(made.one.run)
        await made.until_serves(1)
        yield made
        nursery.cancel_scope.cancel()


@pytest.fixture
async def beside(tmp_path: Path, generations: dict[int, str]) -> AsyncIterator[World]:
    async with world_of(tmp_path, "side-by-side") as made:
        yield made


@pytest.fixture
async def in_place(tmp_path: Path, generations: dict[int, str]) -> AsyncIterator[World]:
    async with world_of(tmp_path, "replace-in-place") as made:
        yield made


async def test_side_by_side_the_new_one_is_there_before_the_old_one_goes(
    beside: World,
) -> None:
    beside.roll_over()
    await beside.until_serves(2)
    assert beside.journal == [
        "start model-server-b",
        "activate b",
        "stop model-server-a",
    ]
    assert not beside.one.uses("m", 1)


async def test_in_place_the_old_one_goes_first(in_place: World) -> None:
    in_place.roll_over()
    await in_place.until_serves(2)
    assert in_place.journal == [
        "disable a",
        "stop model-server-a",
        "start model-server-a",
        "activate a",
    ]


async def test_a_generation_that_breaks_takes_the_blame_and_the_old_one_serves(
    beside: World, generations: dict[int, str]
) -> None:
    generations[2] = "broken"
    beside.roll_over()
    await beside.until(lambda: bool(beside.refusals))
    await beside.until_serves(1)
    ((volumes, error),) = beside.refusals
    assert volumes == (beside.volume(2),)
    assert "no such op" in error.message
    assert beside.journal == ["start model-server-b", "stop model-server-b"]
    assert beside.one.failure is None
    assert beside.count("serving.generation_refused") == 1
    assert beside.count("serving.failed") == 0
    assert not beside.one.uses("m", 2)


async def test_so_does_one_whose_server_ends_by_itself(
    beside: World, generations: dict[int, str]
) -> None:
    generations[2] = "wait"
    beside.roll_over()
    await beside.until(lambda: "model-server-b" in beside.children.started)
    beside.children.started["model-server-b"].ended.set()
    await beside.until(lambda: bool(beside.refusals))
    await beside.until_serves(1)
    assert "ended with status 1; it said last: it broke" in (
        beside.refusals[0][1].message
    )
    assert beside.one.failure is None


async def test_without_anybody_to_blame_the_failure_stays_and_the_old_one_serves(
    beside: World, generations: dict[int, str]
) -> None:
    generations[2], beside.blame = "broken", False
    beside.roll_over()
    await beside.until(lambda: beside.one.state is ServingState.BACKOFF)
    assert beside.one.serving
    assert beside.one.serves("m", 1)
    assert not beside.one.serves("m", 2)
    assert beside.one.failure is not None


async def test_a_failure_with_what_is_no_longer_wanted_counts_for_nothing(
    beside: World, generations: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change was taken back while its server was being started."""
    start = StartingChildren.spawn

    def taken_back(self: StartingChildren, spec: ChildSpec) -> Child:
        if spec.name == "model-server-b":
            beside.served = (beside.volume(1),)
            raise NotReadyError("its volume was closed just now")
        return start(self, spec)

    monkeypatch.setattr(StartingChildren, "spawn", taken_back)
    beside.blame = False
    beside.roll_over()
    await beside.until(lambda: beside.served == (beside.volume(1),))
    await beside.until_serves(1)
    assert beside.one.failure is None
    assert beside.refusals == []


async def test_a_failure_stands_until_all_is_as_it_should_be(
    beside: World, generations: dict[int, str]
) -> None:
    generations[2], beside.blame = "broken", False
    beside.roll_over()
    await beside.until(lambda: beside.one.standing is not None)
    beside.served = (beside.volume(1),)
    assert beside.one.standing is None
    assert beside.one.failure is not None


async def test_until_there_is_word_of_volumes_what_runs_is_wanted(
    beside: World, generations: dict[int, str]
) -> None:
    """Another volume is on its way just then: the bad generation is not started again."""
    generations[2] = "broken"
    refused = beside.refused

    def nothing_yet(volumes: tuple[ServedVolume, ...], error: TdxdError) -> bool:
        taken = refused(volumes, error)
        beside.served = None
        return taken

    beside.volumes.refuse = nothing_yet
    beside.roll_over()
    await beside.until(lambda: bool(beside.refusals))
    await beside.until_serves(1)
    await trio.sleep(0.5)
    assert beside.journal.count("start model-server-b") == 1


async def test_in_place_the_old_generation_comes_back(
    in_place: World, generations: dict[int, str]
) -> None:
    generations[2] = "broken"
    in_place.roll_over()
    await in_place.until(lambda: bool(in_place.refusals))
    in_place.served = (in_place.volume(1),)
    await in_place.until_serves(1)
    assert in_place.journal == [
        "disable a",
        "stop model-server-a",
        "start model-server-a",
        "stop model-server-a",
        "start model-server-a",
        "activate a",
    ]
    assert in_place.one.failure is None


async def test_in_place_a_server_known_not_to_start_takes_nothing_away(
    in_place: World,
) -> None:
    """Flags and models are looked at before the old one drains."""
    in_place.volume(2)
    (in_place.directory / "m@2" / "models" / "digits" / "2").rmdir()
    in_place.blame = False
    in_place.served = (
        ServedVolume(
            volume_id="m", generation=2, mount_point=str(in_place.directory / "m@2")
        ),
    )
    in_place.journal.clear()
    in_place.changes.ring()
    await in_place.until(lambda: in_place.one.failure is not None)
    assert in_place.one.failure is not None
    assert "'digits' in" in in_place.one.failure.error.message
    assert in_place.journal == []
    assert in_place.one.serves("m", 1)


async def test_in_place_callers_come_back_if_the_goal_does(
    in_place: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the old server drains the change is taken back."""

    async def busy(_self: FakeApi, _slot: str) -> int:
        await trio.lowlevel.checkpoint()
        return 1

    monkeypatch.setattr(NoStreams, "streams", busy)
    in_place.roll_over()
    await in_place.until(lambda: in_place.journal == ["disable a"])
    assert not in_place.one.serving
    in_place.served = (in_place.volume(1),)
    in_place.changes.ring()
    await in_place.until_serves(1)
    assert in_place.journal == ["disable a", "activate a"]


async def test_two_servers_must_fit_into_memory(beside: World) -> None:
    beside.available_bytes, beside.running_bytes = 1099 * MIB, 1000 * MIB
    beside.roll_over()
    await beside.until(lambda: bool(beside.refusals))
    error = beside.refusals[0][1]
    assert isinstance(error, NoRoomError)
    assert "1100 MiB wanted, 1099 MiB available" in error.message
    assert 'serving.strategy = "replace-in-place"' in error.hint
    await beside.until_serves(1)
    assert beside.journal == []


async def test_in_place_there_is_nothing_to_fit_beside(in_place: World) -> None:
    in_place.available_bytes, in_place.running_bytes = 0, 1000 * MIB
    in_place.roll_over()
    await in_place.until_serves(2)
