"""What may befall serving while one model server takes over from another."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel

from tdxd.core.plan import ServingState
from tdxd.errors import HostError, StalledError
from tdxd.guest import front_door
from tdxd.guest.certificates import Certificates
from tdxd.guest.front import Front
from tdxd.guest.volume_reader import VolumeReader
from tdxd.host import content
from tests.daemon.test_cut_off import FakeCell, FakeChild
from tests.daemon.test_replacement import MIB, NoStreams, World, world_of
from tests.daemon.test_replacement import (
    generations as generations,  # noqa: PLC0414 — a fixture
)

pytestmark = pytest.mark.root


@pytest.fixture
async def beside(tmp_path: Path, generations: dict[int, str]) -> AsyncIterator[World]:
    async with world_of(tmp_path, "side-by-side") as made:
        yield made


@pytest.fixture
def dead_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Reading generation 2 waits until the event; the thread that waits is counted."""
    answers, look = threading.Event(), content.models_in

    def models_in(mount_point: str) -> tuple[content.Model, ...]:
        if mount_point.endswith("@2"):
            answers.wait(3)
        return look(mount_point)

    monkeypatch.setattr(content, "models_in", models_in)
    yield answers
    answers.set()


async def test_a_disk_that_does_not_answer_holds_nobody_up(
    beside: World, dead_disk: threading.Event
) -> None:
    """A look at what a volume offers is a read of the host's disk."""
    beside.one._scene.reader = VolumeReader(patience_s=0.3)
    beside.roll_over()
    ticks = 0
    with trio.fail_after(2):
        while not beside.refusals:
            await trio.sleep(0.01)
            ticks += 1
    assert ticks > 10
    ((volumes, error),) = beside.refusals
    assert volumes[0].generation == 2
    assert isinstance(error, StalledError)
    await beside.until_serves(1)


async def test_no_second_thread_waits_for_a_disk_that_hangs() -> None:
    reader, answers, begun = VolumeReader(patience_s=0.05), threading.Event(), []

    def read() -> str:
        begun.append(1)
        answers.wait(3)
        return "read"

    for _ in range(3):
        with pytest.raises(StalledError, match="does not answer"):
            await reader.read("/v@2", read)
    assert len(begun) == 1
    assert await reader.read("/v@1", lambda: "another") == "another"
    answers.set()
    with trio.fail_after(3):
        while reader._reading:
            await trio.sleep(0.01)
    assert await reader.read("/v@2", read) == "read"


async def test_a_block_that_cannot_be_read_is_a_failure_of_its_volume(
    beside: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dm-verity answers a wrong block with EIO; the daemon must not end by it."""
    scandir = os.scandir

    def broken(path: str) -> Any:
        if "m@2" in path and path.endswith("digits"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    beside.roll_over()
    await beside.until(lambda: bool(beside.refusals))
    assert isinstance(beside.refusals[0][1], HostError)
    await beside.until_serves(1)


async def test_serving_may_leave_the_configuration_during_a_look_at_memory(
    beside: World,
) -> None:
    looked = threading.Event()

    def removed() -> int:
        looked.set()
        beside.one.config = dataclasses.replace(beside.one.config, serving=None)
        return 2**40

    beside.one._host = dataclasses.replace(
        beside.one._host, available_memory_bytes=removed
    )
    beside.roll_over()
    await beside.until(looked.is_set)
    await beside.until(lambda: beside.one.state is ServingState.STOPPED)
    assert not beside.one.servers


async def test_figures_that_the_kernel_keeps_back_hold_up_nothing_for_good(
    beside: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdxd.guest.serving_memory._LOOK_S", 0.1)
    answers = threading.Event()

    def hangs(_pid: int) -> int:
        answers.wait(5)
        return MIB

    beside.one._host = dataclasses.replace(beside.one._host, tree_memory_bytes=hangs)
    beside.roll_over()
    with trio.fail_after(3):
        await beside.until(lambda: bool(beside.refusals))
    answers.set()
    assert "how much memory" in beside.refusals[0][1].message
    await beside.until_serves(1)


async def test_a_front_that_ends_while_a_new_server_loads_starts_on_the_old_one(
    beside: World, generations: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(*, key: str, active: str, **_: object) -> Front:
        await trio.lowlevel.checkpoint()
        beside.journal.append(f"start front on {active}")
        front = Front(
            key=key,
            active=active,
            child=FakeChild("front", beside.journal),
            cell=FakeCell(),
            api=NoStreams(beside.journal),  # type: ignore[arg-type]
        )
        front.sources = ("volume m@2",)
        return front

    async def certificates(_start: Callable[[Certificates], Any]) -> None:
        await _start(Certificates(server=b""))

    monkeypatch.setattr(front_door, "start_front", start)
    monkeypatch.setattr(beside.one._certificates, "start", certificates)
    generations[2] = "wait"
    beside.roll_over()
    await beside.until(lambda: "b" in beside.one.servers)
    beside.one.door.front = None  # as its watcher does
    beside.changes.ring()
    await beside.until(lambda: beside.one.serves("m", 1))
    assert beside.journal == ["start model-server-b", "start front on a"]
    generations[2] = "ready"
    await beside.until_serves(2)
    beside.one.door.close()


async def test_no_private_key_is_kept_once_nothing_is_served(beside: World) -> None:
    beside.one._certificates.proven = Certificates(server=b"a private key")
    beside.changes.ring()
    await trio.sleep(0.05)
    assert beside.one._certificates.proven is not None
    beside.one.config = dataclasses.replace(beside.one.config, serving=None)
    beside.changes.ring()
    await beside.until(lambda: beside.one.state is ServingState.STOPPED)
    assert beside.one._certificates.proven is None
