"""Giving way to a new program, on an in-memory kernel: what goes over, and what if it fails."""

from __future__ import annotations

import dataclasses
import errno
import time
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import trio
import trio.lowlevel

from tdxd.core.bundle import KeyBundle
from tdxd.core.decode import plain
from tdxd.core.foreign import AnyBundle, PassphraseBundle
from tdxd.core.plan import VolumeState
from tdxd.errors import ConfigError, DeniedError, HostError, ReexecError
from tdxd.guest.attest import Bundles
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.daemon import Daemon
from tdxd.guest.handover import HandedDaemon, ServedVolume
from tdxd.guest.server import ModelServer
from tdxd.host.ports import MappedVolume
from tests.daemon.test_daemon import World, state
from tests.fakes import ExecutedError, FakeMapper


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def hand_over(world: World, daemon: Daemon) -> HandedDaemon:
    """Re-exec; the successor keeps what it was given."""
    called = trio.Event()

    async def accepted() -> None:
        await trio.lowlevel.checkpoint()
        called.set()

    with pytest.raises(ExecutedError):
        await daemon.reexec(accepted)
    assert called.is_set()
    assert world.successor.handed is not None
    return world.successor.handed


async def nothing() -> None:
    await trio.lowlevel.checkpoint()


async def run_next(
    world: World,
    handed: HandedDaemon,
    use: Callable[[Daemon], object],
) -> None:
    """Run the next program's daemon on what was handed over, until `use` is done."""
    async with trio.open_nursery() as nursery:
        daemon = world.make_daemon(nursery)
        daemon.start(handed)
        with trio.fail_after(20):
            await use(daemon)  # type: ignore[misc]
            await daemon.stop()
        nursery.cancel_scope.cancel()


async def first(world: World, ready: Callable[[Daemon], object]) -> HandedDaemon:
    """Run a daemon until `ready`, hand over, and end it as an exec would: without closing."""
    async with trio.open_nursery() as nursery:
        daemon = world.make_daemon(nursery)
        daemon.start()
        with trio.fail_after(20):
            await ready(daemon)  # type: ignore[misc]
            handed = await hand_over(world, daemon)
        nursery.cancel_scope.cancel()
    return handed


async def until_mounted(daemon: Daemon) -> None:
    await daemon.until(state(daemon, VolumeState.MOUNTED))


async def test_a_mounted_volume_goes_over_without_a_new_exchange(world: World) -> None:
    world.image()
    handed = await first(world, until_mounted)
    (volume,) = handed.volumes
    assert (volume.state, volume.spec.id) == ("mounted", "model")

    async def use(daemon: Daemon) -> None:
        assert daemon.readiness() == (True, [], 0)  # from the first moment on
        shown = daemon.status()
        assert (shown["reexecs"], shown["since"]) == (1, handed.started)
        assert shown["volumes"][0]["since"] == volume.since
        await trio.sleep(0.1)
        names = [one["event"] for one in daemon.events.after(0)]
        assert names.count("volume.mounted") == 1
        assert names[-2:] == ["daemon.reexecuting", "daemon.reexecuted"]
        numbers = [one["seq"] for one in daemon.events.after(0)]
        assert numbers == list(range(1, len(numbers) + 1))

    await run_next(world, handed, use)
    assert world.server.asked == [("model",)]
    assert world.mapper.open == {}
    assert world.mounts.table == {}


async def test_what_is_closed_by_hand_stays_closed(world: World) -> None:
    world.image()

    async def unmounted(daemon: Daemon) -> None:
        await until_mounted(daemon)
        await daemon.unmount("model")

    handed = await first(world, unmounted)

    async def use(daemon: Daemon) -> None:
        await trio.sleep(0.1)
        assert daemon.volumes.named("model").state is VolumeState.ABSENT
        await daemon.reload()
        assert daemon.volumes.named("model").mounted

    await run_next(world, handed, use)


async def test_a_changed_configuration_is_carried_out(world: World) -> None:
    world.image("model")
    world.image("other")
    handed = await first(world, until_mounted)
    (world.directory / "moved").mkdir()
    (world.directory / "moved" / "model.img").write_text("model@1")
    both = world.make_config("model", "other")
    moved = str(world.directory / "moved" / "model.img")
    spec = dataclasses.replace(both.volume[0], image=moved)
    world.config = dataclasses.replace(both, volume=(spec, both.volume[1]))

    async def use(daemon: Daemon) -> None:
        await daemon.until(
            lambda: (
                sorted(one["image"] for one in daemon.status()["volumes"])
                == [moved, str(world.directory / "other.img")]
                and daemon.readiness()[0]
            )
        )
        assert len(world.mounts.table) == len(world.mapper.open) == 2

    await run_next(world, handed, use)


async def test_a_volume_on_its_way_out_goes_on_its_way(world: World) -> None:
    world.image()

    async def leaving(daemon: Daemon) -> None:
        await until_mounted(daemon)
        world.mounts.busy = set(world.mounts.table)
        daemon.volumes.named("model").want(mounted=False, leave=True)
        await daemon.until(lambda: "volume.closing" in names(daemon))

    handed = await first(world, leaving)
    assert handed.volumes[0].leaving
    world.mounts.busy = set()

    async def use(daemon: Daemon) -> None:
        """The configuration has it: once it is gone it comes anew."""
        await daemon.until(lambda: len(world.server.asked) == 2)
        await daemon.until(
            lambda: [one["state"] for one in daemon.status()["volumes"]] == ["mounted"]
        )

    await run_next(world, handed, use)


def names(daemon: Daemon) -> list[object]:
    return [one["event"] for one in daemon.events.after(0)]


async def test_a_mapping_that_is_not_what_was_mapped_is_closed(world: World) -> None:
    """A descriptor of something else proves nothing: unmounted, unmapped, attested anew."""
    world.image()
    handed = await first(world, until_mounted)
    (volume,) = handed.volumes
    assert volume.mapped is not None
    with (world.directory / "something").open("w") as other:
        wrong = dataclasses.replace(volume.mapped, fd=other.fileno())
        volume = dataclasses.replace(volume, mapped=wrong)
        handed = dataclasses.replace(handed, volumes=(volume,))

        async def use(daemon: Daemon) -> None:
            assert not daemon.readiness()[0]
            await daemon.until(lambda: len(world.server.asked) == 2)
            await until_mounted(daemon)
            assert "volume.not_adopted" in names(daemon)
            assert len(world.mapper.open) == 1

        await run_next(world, handed, use)


async def test_a_mount_that_is_gone_is_made_again(world: World) -> None:
    world.image()
    handed = await first(world, until_mounted)
    world.mounts.table.clear()

    async def use(daemon: Daemon) -> None:
        assert not daemon.readiness()[0]
        await daemon.until(lambda: daemon.volumes.named("model").mounted)
        assert len(world.mounts.table) == 1

    await run_next(world, handed, use)
    assert len(world.server.asked) == 1


async def test_a_refusal_and_a_wrong_image_stay_what_they_are(world: World) -> None:
    """The key server is not asked again early, nor a wrong image opened again."""
    world.config = world.make_config("denied", "wrong")
    world.image("denied")
    world.image("wrong", generation=7)
    world.server.errors["denied"] = DeniedError("policy says no", hint="ask the owner")

    async def resting(daemon: Daemon) -> None:
        await daemon.until(state(daemon, VolumeState.DENIED, "denied"))
        await daemon.until(state(daemon, VolumeState.FAILED, "wrong"))

    handed = await first(world, resting)

    async def use(daemon: Daemon) -> None:
        await trio.sleep(0.2)
        denied, wrong = daemon.status()["volumes"]
        assert (denied["state"], wrong["state"]) == ("denied", "failed")
        assert denied["error"]["message"] == "policy says no"
        assert 250 < denied["error"]["retry_in_s"] <= 900
        assert daemon.readiness()[2] == 65  # of the wrong image
        assert len(world.server.asked) == 1
        world.server.errors.clear()
        await daemon.retry(None)
        await daemon.until(state(daemon, VolumeState.MOUNTED, "denied"))

    await run_next(world, handed, use)


# --- what is under way -------------------------------------------------------------


async def test_an_exchange_is_given_up_and_made_again(world: World) -> None:
    world.image()
    calls = 0
    real = world.server.fetch

    async def fetch(loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        nonlocal calls
        calls += 1
        if calls == 1:
            await trio.sleep_forever()
        return await real(loaded, ids)

    world.server.fetch = fetch  # type: ignore[method-assign, assignment]
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.ATTESTING))
        await trio.sleep(0.2)
        world.successor.failure = HostError("execute", "/usr/bin/tdxd", errno.EACCES)
        with pytest.raises(HostError, match="Permission denied"):
            await daemon.reexec(nothing)
        assert not daemon.standstill.frozen
        await until_mounted(daemon)
        assert daemon.status()["volumes"][0]["error"] is None
        assert "volume.failed" not in names(daemon)
    assert calls == 2


class SlowMapper(FakeMapper):
    """Maps until it is told to stop."""

    started = False
    slow = True

    def map_volume(
        self,
        image: str,
        bundle: AnyBundle,
        *,
        cancelled: Callable[[], bool],
        writable: bool = False,
    ) -> MappedVolume:
        self.started = True
        while self.slow:
            if cancelled():
                raise HostError("work on", image, errno.ECANCELED)
            time.sleep(0.005)
        return super().map_volume(image, bundle, cancelled=cancelled, writable=writable)


async def test_a_mapping_is_called_off_and_its_key_wiped(world: World) -> None:
    world.image()
    mapper = SlowMapper()
    world.mapper = mapper
    world.host = dataclasses.replace(world.host, mapper=mapper)  # type: ignore[arg-type]
    async with world.daemon() as daemon:
        while not mapper.started:
            await trio.sleep(0.01)
        handed = await hand_over(world, daemon)
        (volume,) = handed.volumes
        assert volume.mapped is None
        assert [one.secret.wiped for one in world.server.bundles] == [True]  # type: ignore[attr-defined]
        mapper.slow = False
        await until_mounted(daemon)
        assert "volume.failed" not in names(daemon)


async def test_a_key_that_came_before_the_standstill_is_wiped(world: World) -> None:
    """Between the exchange and the mapping: the key is neither used nor handed over."""
    world.image()
    real, daemons = world.server.fetch, list[Daemon]()

    async def fetch(loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        answers = await real(loaded, ids)
        if len(world.server.asked) == 1:
            daemons[0].standstill.freeze()
        return answers

    world.server.fetch = fetch  # type: ignore[method-assign, assignment]
    async with world.daemon() as daemon:
        daemons.append(daemon)
        await daemon.standstill.until_frozen()
        await daemon.standstill.reached(5)
        assert daemon.volumes.named("model").generation == 1  # it has the key
        (bundle,) = world.server.bundles
        assert isinstance(bundle, KeyBundle | PassphraseBundle)
        secret = bytes(bundle.secret.reveal())
        handed = daemon._hand_over()
        assert bundle.secret.wiped
        assert handed.volumes[0].mapped is None
        assert secret not in msgpack.packb(plain(handed))
        daemon.standstill.release()
        await until_mounted(daemon)
        assert len(world.server.asked) == 2


# --- refusals ---------------------------------------------------------------------


async def test_a_program_that_does_not_start_changes_nothing(world: World) -> None:
    world.image()
    world.successor.refusal = ConfigError("tdxd.toml: volum: unknown key")
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        before = names(daemon)
        with pytest.raises(ConfigError, match="unknown key"):
            await daemon.reexec(nothing)
        assert names(daemon) == before
        assert not daemon.standstill.frozen
        await daemon.unmount("model")
        await daemon.mount("model")


async def test_only_one_at_a_time(world: World) -> None:
    async with world.daemon() as daemon:
        refused = 0

        async def second() -> None:
            nonlocal refused
            with pytest.raises(ReexecError, match="already being re-executed"):
                await daemon.reexec(nothing)
            refused += 1

        async def accepted() -> None:
            await second()

        with pytest.raises(ExecutedError):
            await daemon.reexec(accepted)
        assert refused == 1


async def test_a_stop_meanwhile_comes_first(world: World) -> None:
    """SIGTERM while it is frozen: everything is closed in order, and nothing executed."""
    world.image()
    async with world.daemon() as daemon:
        await until_mounted(daemon)

        async def accepted() -> None:
            await daemon.stop()

        with pytest.raises(ReexecError, match="stopping"):
            await daemon.reexec(accepted)
        assert world.successor.handed is None
        assert world.mounts.table == {}
        with pytest.raises(ReexecError, match="stopping"):
            await daemon.reexec(nothing)


async def test_a_stop_while_the_program_is_tried_out_comes_first(world: World) -> None:
    world.image()
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        world.mounts.busy = set(world.mounts.table)  # so that closing takes a while

        async def check() -> None:
            nursery.start_soon(daemon.stop)
            await daemon.until(lambda: daemon.stopping)

        world.successor.check = check  # type: ignore[method-assign]
        async with trio.open_nursery() as nursery:
            with pytest.raises(ReexecError, match="stopping"):
                await daemon.reexec(nothing)
            assert not daemon.standstill.frozen
            world.mounts.busy = set()
        assert world.successor.handed is None
        assert world.mounts.table == {}


# --- serving ----------------------------------------------------------------------


async def test_a_broken_volume_is_taken_from_a_running_server(world: World) -> None:
    """Serving is told to do without it, though it is still wanted: else neither would move."""
    world.image()
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        mounted = ServedVolume(
            volume_id="model",
            generation=1,
            mount_point=daemon.volumes.named("model").mount_point,
        )
        assert daemon.volumes.served() == (mounted,)
        server = object.__new__(ModelServer)
        server.volumes = (mounted,)
        daemon.serving.servers["a"] = server
        daemon.volumes.named("model").device.intact = False  # as of the last look
        assert daemon.volumes.served() == ()
        del daemon.serving.servers["a"]
