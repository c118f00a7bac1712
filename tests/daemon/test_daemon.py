"""The daemon on an in-memory kernel: volumes come, go, fail and come again."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from tdxd.core.config import Config, KeyReleaseConfig, PlatformConfig, VolumeConfig
from tdxd.core.plan import VolumeState
from tdxd.errors import (
    BusyError,
    ConfigError,
    DeniedError,
    MissingError,
    TdxdError,
    UnreachableError,
    UsageError,
)
from tdxd.guest.attest import Bundles
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.daemon import Daemon
from tdxd.guest.events import Events
from tdxd.guest.leased import Leased
from tdxd.guest.runtime_record import RuntimeRecord
from tests.fakes import (
    FakeBoottime,
    FakeMapper,
    FakeMounts,
    FakeRtmr,
    FakeSuccessor,
    fake_host,
    make_bundle,
)

KEY = "ed25519:" + "A" * 43 + "="


@dataclasses.dataclass
class Server:
    """Answers for the key server: a bundle of each volume's generation, or an error."""

    boottime_s: Callable[[], float]
    generations: dict[str, int] = dataclasses.field(default_factory=dict)
    errors: dict[str, TdxdError] = dataclasses.field(default_factory=dict)
    older: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    """Generations that may be served besides, newest first."""
    lease_s: int = 0
    asked: list[tuple[str, ...]] = dataclasses.field(default_factory=list)
    bundles: list[object] = dataclasses.field(default_factory=list)

    async def fetch(self, _loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        self.asked.append(ids)
        await trio.lowlevel.checkpoint()
        answers: dict[str, Leased | TdxdError] = {}
        for name in ids:
            made = make_bundle(name, self.generations.get(name, 1))
            older = [make_bundle(name, one) for one in self.older.get(name, ())]
            self.bundles += [made, *older]
            answers[name] = self.errors.get(name) or Leased(
                bundle=made,
                lease_s=self.lease_s,
                sent_s=self.boottime_s(),
                older=tuple(older),
            )
        return answers


class World:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.host = fake_host()
        self.server = Server(self.host.boottime_s)
        self.successor = FakeSuccessor()
        self.mapper: FakeMapper = self.host.mapper  # type: ignore[assignment]
        self.mounts: FakeMounts = self.host.mounts  # type: ignore[assignment]
        self.rtmr: FakeRtmr = self.host.rtmr  # type: ignore[assignment]
        self.boottime: FakeBoottime = self.host.boottime_s  # type: ignore[assignment]
        self.platform = PlatformConfig(runtime_log=str(directory / "runtime-log"))
        self.config = self.make_config("model")

    def make_config(self, *ids: str) -> Config:
        return Config(
            key_release=KeyReleaseConfig(
                servers=("localhost:1",), ca="/ca", signing_key=KEY, backoff_max_s=0.3
            ),
            platform=self.platform,
            volume=tuple(
                VolumeConfig(id=name, image=str(self.directory / f"{name}.img"))
                for name in ids
            ),
        )

    def image(self, name: str = "model", generation: int = 1) -> Path:
        path = self.directory / f"{name}.img"
        path.write_text(f"{name}@{generation}")
        return path

    def load(self) -> LoadedConfig:
        return LoadedConfig(config=self.config)

    def make_daemon(self, nursery: trio.Nursery) -> Daemon:
        events = Events()
        return Daemon(
            host=self.host,
            record=RuntimeRecord(self.rtmr, self.config.platform, events=events),
            loaded=self.load(),
            load_config=self.load,
            fetch=self.server.fetch,
            successor=self.successor,
            events=events,
            nursery=nursery,
        )

    @asynccontextmanager
    async def daemon(self) -> AsyncIterator[Daemon]:
        async with trio.open_nursery() as nursery:
            daemon = self.make_daemon(nursery)
            daemon.start()
            with trio.fail_after(20):
                yield daemon
                await daemon.stop()
            nursery.cancel_scope.cancel()
        assert not self.mapper.open
        assert not self.mounts.table


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def state(
    daemon: Daemon, wanted: VolumeState, name: str = "model"
) -> Callable[[], bool]:
    return lambda: daemon.volumes.named(name).state is wanted


async def test_a_volume_is_mounted_and_closed_again(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        assert len(world.mounts.table) == 1
        assert daemon.readiness() == (True, [], 0)


async def test_the_key_is_wiped_once_the_volume_is_mapped(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        assert [one.secret.wiped for one in world.server.bundles] == [True]  # type: ignore[attr-defined]


async def test_volumes_that_start_together_share_one_exchange(world: World) -> None:
    names = [f"m{number}" for number in range(10)]
    world.config = world.make_config(*names)
    for name in names:
        world.image(name)
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.readiness()[0])
    assert world.server.asked == [tuple(names)]


async def test_no_key_is_asked_for_while_the_image_is_absent(world: World) -> None:
    async with world.daemon() as daemon:
        await trio.sleep(0.2)
        assert world.server.asked == []
        (shown,) = daemon.status()["volumes"]
        assert "no file matches" in shown["error"]["message"]
        world.image()
        daemon.changes.ring()
        await daemon.until(state(daemon, VolumeState.MOUNTED))


async def test_an_unreachable_key_server_is_tried_again(world: World) -> None:
    world.image()
    world.server.errors["model"] = UnreachableError("no key server", hint="start it")
    async with world.daemon() as daemon:
        await daemon.until(lambda: len(world.server.asked) >= 3)
        shown = daemon.status()["volumes"][0]
        assert shown["error"]["attempts"] >= 2
        assert shown["error"]["hint"] == "start it"
        assert daemon.readiness()[2] == 75
        world.server.errors.clear()
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        assert daemon.status()["volumes"][0]["error"] is None


async def test_a_denied_volume_waits_minutes_not_seconds(world: World) -> None:
    world.image()
    world.server.errors["model"] = DeniedError("policy says no")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.DENIED))
        wait_s = daemon.status()["volumes"][0]["error"]["retry_in_s"]
        assert 290 < wait_s <= 900
        assert daemon.readiness()[2] == 77


async def test_an_image_of_another_generation_fails_until_a_new_file_comes(
    world: World,
) -> None:
    path = world.image(generation=1)
    world.server.generations["model"] = 2
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.FAILED))
        assert daemon.readiness()[2] == 65
        assert world.mapper.open == {}
        path.unlink()
        world.image(generation=2)
        daemon.changes.ring()
        await daemon.until(state(daemon, VolumeState.MOUNTED))


def in_window(world: World) -> Path:
    """Files of several generations; generation 4 is the current one, 3 and 2 may be served."""
    world.config = world.make_config("model")
    volume = dataclasses.replace(
        world.config.volume[0], image=str(world.directory / "model-*.img")
    )
    world.config = dataclasses.replace(world.config, volume=(volume,))
    world.server.generations["model"] = 4
    world.server.older["model"] = (3, 2)
    for file, generation in (("a", 2), ("b", 3), ("c", 1)):
        path = world.directory / f"model-{file}.img"
        path.write_text(f"model@{generation}")
    return world.directory / "model-d.img"


async def test_the_newest_generation_that_is_there_is_opened(world: World) -> None:
    newest = in_window(world)
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        assert daemon.volumes.named("model").generation == 3
        assert daemon.volumes.named("model").device.image == str(
            world.directory / "model-b.img"
        )
        assert all(one.secret.wiped for one in world.server.bundles)  # type: ignore[attr-defined]
        assert len(world.server.bundles) == 3
    newest.write_text("model@4")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        assert daemon.volumes.named("model").generation == 4


async def test_a_generation_before_the_window_is_refused(world: World) -> None:
    in_window(world)
    for file in ("a", "b"):
        (world.directory / f"model-{file}.img").unlink()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.FAILED))
        assert daemon.readiness()[2] == 65
        assert world.mapper.open == {}
        assert all(one.secret.wiped for one in world.server.bundles)  # type: ignore[attr-defined]


async def test_one_failed_volume_does_not_hold_up_the_others(world: World) -> None:
    world.config = world.make_config("bad", "good")
    world.image("bad", generation=7)
    world.image("good")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED, "good"))
        await daemon.until(state(daemon, VolumeState.FAILED, "bad"))


async def test_a_wrong_block_met_later_closes_the_volume(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        world.mapper.broken.update(world.mapper.open)
        daemon.changes.ring()
        await daemon.until(state(daemon, VolumeState.FAILED))
        assert world.mounts.table == {}
        assert (
            "changed after it was opened"
            in daemon.status()["volumes"][0]["error"]["message"]
        )


async def test_unmount_and_mount_by_hand(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        await daemon.unmount("model")
        assert world.mounts.table == {}
        assert daemon.volumes.named("model").state is VolumeState.ABSENT
        await daemon.mount("model")
        assert len(world.mounts.table) == 1


async def test_mount_reports_why_it_failed(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        await daemon.unmount("model")
        world.server.errors["model"] = DeniedError("policy says no")
        with pytest.raises(DeniedError, match="policy says no"):
            await daemon.mount("model")


async def test_mount_without_an_image_says_so_at_once(world: World) -> None:
    async with world.daemon() as daemon:
        with pytest.raises(MissingError, match="no file matches"):
            await daemon.mount("model")


async def test_an_unknown_volume_is_named_with_the_known_ones(world: World) -> None:
    async with world.daemon() as daemon:
        with pytest.raises(UsageError, match="no volume 'nope'") as caught:
            await daemon.unmount("nope")
        assert caught.value.hint == "configured volumes: model"


async def test_reload_mounts_a_new_volume_and_closes_a_removed_one(
    world: World,
) -> None:
    world.image("model")
    world.image("other")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        world.config = world.make_config("other")
        await daemon.reload()
        assert [one["id"] for one in daemon.status()["volumes"]] == ["other"]
        (point,) = world.mounts.table
        assert point.endswith("volumes/other@1")


async def test_reload_ends_what_was_set_by_hand(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        await daemon.unmount("model")
        await daemon.reload()
        assert daemon.volumes.named("model").mounted


async def test_reload_with_a_bad_config_changes_nothing(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))

        def load() -> LoadedConfig:
            raise ConfigError("tdxd.toml: volum: unknown key")

        daemon._load_config = load
        with pytest.raises(ConfigError, match="unknown key"):
            await daemon.reload()
        assert daemon.volumes.named("model").mounted


async def test_reload_refuses_what_only_a_restart_can_change(world: World) -> None:
    async with world.daemon() as daemon:
        control = dataclasses.replace(world.config.control, socket="/run/other.sock")
        world.config = dataclasses.replace(world.config, control=control)
        with pytest.raises(ConfigError, match=r"\[control\] changed"):
            await daemon.reload()


async def test_retry_tries_at_once(world: World) -> None:
    world.image()
    world.server.errors["model"] = DeniedError("policy says no")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.DENIED))
        world.server.errors.clear()
        await daemon.retry("model")
        await daemon.until(state(daemon, VolumeState.MOUNTED))


async def test_a_new_route_ends_the_backoff(world: World) -> None:
    release = dataclasses.replace(world.config.key_release, backoff_max_s=10_000.0)
    world.config = dataclasses.replace(world.config, key_release=release)
    world.image()
    world.server.errors["model"] = UnreachableError("no route")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.BACKOFF))
        world.server.errors.clear()
        daemon.network_came_up()
        await daemon.until(state(daemon, VolumeState.MOUNTED))


@dataclasses.dataclass
class WithoutNetwork(Server):
    """Its first exchange, once `begun`, lasts until `ended`, and fails."""

    begun: trio.Event = dataclasses.field(default_factory=trio.Event)
    ended: trio.Event = dataclasses.field(default_factory=trio.Event)

    async def fetch(self, loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        if self.asked:
            return await super().fetch(loaded, ids)
        self.asked.append(ids)
        self.begun.set()
        await self.ended.wait()
        raise UnreachableError("no route")


async def test_a_network_that_came_up_during_an_attempt_is_used_at_once(
    world: World,
) -> None:
    """The attempt under way began without it: when it fails, there is no wait."""
    world.image()
    world.server = server = WithoutNetwork(world.boottime)
    async with world.daemon() as daemon:
        await server.begun.wait()
        daemon.network_came_up()
        server.ended.set()
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        seen = [str(one["event"]) for one in daemon.events.after(0)]
        assert "volume.failed" in seen
        assert "volume.backoff" not in seen


async def test_a_busy_mount_is_closed_when_it_becomes_free(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        world.mounts.busy = set(world.mounts.table)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.unmount, "model")
            await daemon.until(state(daemon, VolumeState.CLOSING))
            await trio.sleep(0.1)
            world.mounts.busy = set()
        assert world.mounts.table == {}


async def test_a_mapping_that_fails_for_now_is_tried_again(world: World) -> None:
    world.image()
    world.mapper.next_error = BusyError("no loop device is free")
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        assert len(world.server.asked) == 2


async def test_a_volume_unwanted_while_attesting_is_given_up(world: World) -> None:
    world.image()
    block = trio.Event()

    async def fetch(_loaded: LoadedConfig, _ids: tuple[str, ...]) -> Bundles:
        await block.wait()
        return {}

    world.server.fetch = fetch  # type: ignore[method-assign, assignment]
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.ATTESTING))
        await daemon.unmount("model")
        assert daemon.volumes.named("model").state is VolumeState.ABSENT
