"""A volume that was revoked: its model server ends at once, callers are told, then it closes."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from typing import cast

import pytest
import trio
import trio.lowlevel

from tdxd.core.config import Config, KeyReleaseConfig, ServingConfig, VolumeConfig
from tdxd.core.plan import ServingState
from tdxd.errors import NotReadyError
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.front import Front
from tdxd.guest.handover import ServedVolume
from tdxd.guest.server import ModelServer, models_key
from tdxd.guest.serving import ServingReconciler
from tdxd.guest.standstill import Standstill
from tests.daemon.test_daemon import KEY
from tests.fakes import FakeVolumes, fake_host

GONE = ServedVolume(volume_id="gone", generation=1, mount_point="/v/gone")
STAYS = ServedVolume(volume_id="stays", generation=1, mount_point="/v/stays")
SERVING = ServingConfig(tls_volume="stays", drain_timeout_s=3600.0)
CONFIG = Config(
    key_release=KeyReleaseConfig(servers=("localhost:1",), ca="/ca", signing_key=KEY),
    volume=tuple(VolumeConfig(id=name, image="/none") for name in ("gone", "stays")),
    serving=SERVING,
)


@dataclasses.dataclass
class FakeChild:
    """Runs until it is stopped, and writes down that it was."""

    name: str
    journal: list[str]
    pid: int = 1
    stop_s: float | None = None
    """How long it was given to end."""

    async def wait(self) -> int:
        await trio.sleep_forever()
        raise AssertionError

    async def stop(self, timeout_s: float, *, signal: int = 15) -> int:
        await trio.lowlevel.checkpoint()
        self.stop_s = timeout_s
        self.journal.append(f"stop {self.name}")
        return 0

    async def lines(self) -> AsyncIterator[str]:
        await trio.lowlevel.checkpoint()
        for line in list[str]():
            yield line


class FakeCell:
    def close(self) -> None:
        pass


@dataclasses.dataclass
class FakeApi:
    """HAProxy's runtime API; it may be gone already."""

    journal: list[str]
    broken: bool = False
    path: str = "/none"

    async def disable(self, slot: str) -> None:
        await trio.lowlevel.checkpoint()
        self.journal.append(f"disable {slot}")
        if self.broken:
            raise NotReadyError("the front does not answer")

    async def activate(self, slot: str, *, others: tuple[str, ...]) -> None:
        await trio.lowlevel.checkpoint()
        self.journal.append(f"activate {slot}")

    async def streams(self, slot: str) -> int:
        await trio.lowlevel.checkpoint()
        return 1  # a stream that never ends


class Serving:
    """A reconciler with a front and a model server over both volumes in slot a."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.journal: list[str] = []
        self.api = FakeApi(self.journal)
        self.changes = Changes()
        self.served: tuple[ServedVolume, ...] = (GONE, STAYS)
        self.revoked: frozenset[tuple[str, int | None]] = frozenset()
        self.one = ServingReconciler(
            host=fake_host(),
            config=CONFIG,
            standstill=Standstill(),
            changes=self.changes,
            events=Events(),
            volumes=FakeVolumes(lambda: self.served, lambda: self.revoked),
            nursery=nursery,
        )
        self.add("a", self.served)
        self.one.door.front = Front(
            key="f",
            active="a",
            child=FakeChild("front", self.journal),
            cell=FakeCell(),
            api=cast("object", self.api),  # type: ignore[arg-type]
        )
        self.one.door.front.sources = ("volume stays@1",)

    def add(self, slot: str, volumes: tuple[ServedVolume, ...]) -> None:
        server = ModelServer(
            slot=slot,
            key=models_key(volumes, SERVING),
            volumes=volumes,
            models=(),
            child=FakeChild(f"server {slot}", self.journal),
            cell=FakeCell(),
            socket_path="/none",
        )
        server.ready = True
        self.one.servers[slot] = server

    def revoke(self) -> None:
        self.served, self.revoked = (STAYS,), frozenset({("gone", 1)})
        self.changes.ring()

    async def until_gone(self, slot: str) -> None:
        with trio.fail_after(5):
            while slot in self.one.servers:
                await self.changes.after(self.changes.count)


@pytest.mark.parametrize("broken", [False, True])
async def test_its_server_ends_at_once_and_the_front_knows_first(broken: bool) -> None:
    """No drain, though a stream goes on; nor does a front that does not answer hold it up."""
    async with trio.open_nursery() as nursery:
        serving = Serving(nursery)
        serving.api.broken = broken
        serving.revoke()
        nursery.start_soon(serving.one.run)
        await serving.until_gone("a")
        assert serving.journal[:2] == ["disable a", "stop server a"]
        assert not serving.one.uses("gone", 1)
        nursery.cancel_scope.cancel()


async def test_a_server_without_it_that_is_ready_takes_over_first() -> None:
    async with trio.open_nursery() as nursery:
        serving = Serving(nursery)
        serving.add("b", (STAYS,))
        serving.revoke()
        nursery.start_soon(serving.one.run)
        await serving.until_gone("a")
        assert serving.journal[:2] == ["activate b", "stop server a"]
        assert serving.one.uses("stays", 1)
        nursery.cancel_scope.cancel()


async def test_a_front_with_the_certificate_of_a_revoked_volume_ends() -> None:
    async with trio.open_nursery() as nursery:
        serving = Serving(nursery)
        serving.revoke()
        serving.served, serving.revoked = (GONE,), frozenset({("stays", 1)})
        front = cast("Front", serving.one.front).child
        nursery.start_soon(serving.one.run)
        await serving.until_gone("a")
        assert serving.journal == ["stop front", "stop server a"]
        # Nor does it drain first: its volume stays open as long.
        assert cast("FakeChild", front).stop_s == 3.0
        nursery.cancel_scope.cancel()


async def test_the_watchdog_is_fed_while_the_front_drains() -> None:
    """As long as the configuration lets it."""
    async with trio.open_nursery() as nursery:
        serving = Serving(nursery)
        ahead_s: list[float] = []

        class Draining(FakeChild):
            async def stop(self, timeout_s: float, *, signal: int = 15) -> int:
                ahead_s.append(serving.one.beat_s - trio.current_time())
                return await super().stop(timeout_s, signal=signal)

        draining = Draining("front", serving.journal)
        cast("Front", serving.one.front).child = draining
        serving.served = ()
        nursery.start_soon(serving.one.run)
        await serving.until_gone("a")
        assert draining.stop_s == SERVING.drain_timeout_s + 3
        assert ahead_s[0] > SERVING.drain_timeout_s - 5
        nursery.cancel_scope.cancel()


async def test_the_only_volume_revoked_ends_the_front_too() -> None:
    async with trio.open_nursery() as nursery:
        serving = Serving(nursery)
        serving.revoke()
        serving.served = ()
        nursery.start_soon(serving.one.run)
        await serving.until_gone("a")
        assert serving.journal == ["stop front", "stop server a"]
        assert serving.one.settled
        assert serving.one.state in {ServingState.DRAINING, ServingState.STOPPED}
        nursery.cancel_scope.cancel()
