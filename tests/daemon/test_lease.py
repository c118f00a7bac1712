"""Leases: renewed in time, and a volume that is not released any more closes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tdxd.core.plan import VolumeState
from tdxd.errors import DeniedError, UnreachableError
from tdxd.guest.attest import Bundles
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.daemon import Daemon
from tdxd.guest.handover import ServedVolume
from tdxd.guest.metrics import metrics_text
from tests.daemon.test_daemon import World, state
from tests.daemon.test_reexec import first, run_next, until_mounted

LEASE_S = 1000


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.image()
    made.server.lease_s = LEASE_S
    return made


def jump(world: World, daemon: Daemon, seconds: float) -> None:
    """Let the boot's clock jump ahead, as after a suspension."""
    world.boottime.offset_s += seconds
    daemon.changes.ring()


def lease_left_s(daemon: Daemon) -> float:
    left_s = daemon.status()["volumes"][0]["lease_left_s"]
    assert isinstance(left_s, float)
    return left_s


async def poll(condition: Callable[[], bool]) -> None:
    """Wait for what rings no bell."""
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


def names(daemon: Daemon) -> list[str]:
    return [str(one["event"]) for one in daemon.events.after(0)]


async def test_it_is_renewed_at_about_half_of_it(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        assert LEASE_S - 10 < lease_left_s(daemon) <= LEASE_S
        jump(world, daemon, LEASE_S * 0.39)
        await trio.sleep(0.2)
        assert len(world.server.asked) == 1
        jump(world, daemon, LEASE_S * 0.22)
        await daemon.until(lambda: "lease.renewed" in names(daemon))
        assert lease_left_s(daemon) > LEASE_S - 10
        assert world.server.asked == [("model",)] * 2
        # Nothing was opened anew, and the key of the renewal is gone as the first one is.
        assert names(daemon).count("volume.mounted") == 1
        assert [one.secret.wiped for one in world.server.bundles] == [True, True]  # type: ignore[attr-defined]


async def test_without_a_lease_it_is_never_asked_for_again(world: World) -> None:
    world.server.lease_s = 0
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        assert daemon.status()["volumes"][0]["lease_left_s"] is None
        jump(world, daemon, 10 * 365 * 86400)
        await trio.sleep(0.2)
        assert daemon.volumes.named("model").mounted
        assert len(world.server.asked) == 1


async def test_a_policy_that_drops_the_lease_ends_the_renewals(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        world.server.lease_s = 0
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.renewed" in names(daemon))
        jump(world, daemon, LEASE_S * 10)
        await trio.sleep(0.1)
        assert daemon.volumes.named("model").mounted


async def test_revocation_reaches_a_guest_that_serves(world: World) -> None:
    """The renewal is refused; until the lease is over it serves, then it is closed."""
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        world.server.errors["model"] = DeniedError(
            "no policy", hint="tdx-keyd explain 7"
        )
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.not_renewed" in names(daemon))
        shown = daemon.status()["volumes"][0]
        assert (shown["state"], shown["error"]) == ("mounted", None)
        assert shown["lease_error"]["message"] == "no policy"
        assert daemon.readiness()[0]
        # A refusal is asked about slowly, but not so slowly that the lease ends meanwhile.
        assert shown["lease_error"]["retry_in_s"] <= LEASE_S * 0.3 / 2
        jump(world, daemon, LEASE_S * 0.4)
        await daemon.until(state(daemon, VolumeState.DENIED))
        assert (world.mounts.table, world.mapper.open) == ({}, {})
        shown = daemon.status()["volumes"][0]
        assert shown["error"]["message"] == (
            "lease of volume 'model' ran out, its renewal was refused: no policy"
        )
        assert shown["error"]["hint"] == "tdx-keyd explain 7"
        assert shown["lease_left_s"] is None
        assert daemon.readiness()[2] == 77
        world.server.errors.clear()
        await daemon.retry("model")
        await until_mounted(daemon)
        assert lease_left_s(daemon) > LEASE_S - 10


async def test_a_key_server_that_is_away_too_long(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        world.server.errors["model"] = UnreachableError("no key server")
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: names(daemon).count("lease.not_renewed") >= 3)
        assert daemon.volumes.named("model").mounted
        jump(world, daemon, LEASE_S)
        await daemon.until(state(daemon, VolumeState.BACKOFF))
        failed = [
            one for one in daemon.events.after(0) if one["event"] == "volume.failed"
        ]
        assert failed[0]["error"] == (
            "lease of volume 'model' ran out, it could not be renewed: no key server"
        )
        world.server.errors.clear()
        await until_mounted(daemon)  # by itself


async def test_a_network_that_comes_up_renews_at_once(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        world.server.errors["model"] = UnreachableError("no route")
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.not_renewed" in names(daemon))
        world.server.errors.clear()
        daemon.network_came_up()
        await daemon.until(lambda: "lease.renewed" in names(daemon))


async def test_the_lease_of_another_generation_is_not_one_of_what_is_open(
    world: World,
) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        world.server.generations["model"] = 2
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.not_renewed" in names(daemon))
        assert lease_left_s(daemon) < LEASE_S * 0.3
        shown = daemon.status()["volumes"][0]["lease_error"]
        assert shown["message"] == (
            "key server releases generation 2 of volume 'model' now; generation 1 is open"
        )
        assert [one.secret.wiped for one in world.server.bundles] == [True, True]  # type: ignore[attr-defined]
        world.image(generation=2)
        jump(world, daemon, LEASE_S * 0.4)
        await daemon.until(lambda: daemon.volumes.named("model").generation == 2)
        await until_mounted(daemon)


async def test_an_older_generation_in_the_window_is_renewed_until_it_leaves_it(
    world: World,
) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        world.server.generations["model"], world.server.older["model"] = 2, (1,)
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.renewed" in names(daemon))
        assert lease_left_s(daemon) > LEASE_S - 10
        assert daemon.volumes.named("model").generation == 1
        assert all(one.secret.wiped for one in world.server.bundles)  # type: ignore[attr-defined]
        world.server.generations["model"], world.server.older["model"] = 3, (2,)
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.not_renewed" in names(daemon))
        shown = daemon.status()["volumes"][0]["lease_error"]
        assert shown["message"].startswith("key server releases generation 3, 2 of")
        jump(world, daemon, LEASE_S * 0.4)
        await daemon.until(state(daemon, VolumeState.FAILED))
        assert world.mapper.open == {}


async def test_a_delayed_answer_makes_no_lease_longer(world: World) -> None:
    """The host holds the answer back: the lease runs from when it was asked for."""
    real = world.server.fetch

    async def fetch(loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        answers = await real(loaded, ids)
        world.boottime.offset_s += LEASE_S * 0.3
        return answers

    world.server.fetch = fetch  # type: ignore[method-assign, assignment]
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        assert LEASE_S * 0.69 < lease_left_s(daemon) <= LEASE_S * 0.7


async def test_a_renewal_that_comes_too_late_reopens_nothing(world: World) -> None:
    """While it is asked for, the lease ends: the volume closes, and is opened anew."""
    real, calls = world.server.fetch, 0
    answer = trio.Event()

    async def fetch(loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        nonlocal calls
        calls += 1
        answers = await real(loaded, ids)
        if calls == 2:
            await answer.wait()
        return answers

    world.server.fetch = fetch  # type: ignore[method-assign, assignment]
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        jump(world, daemon, LEASE_S * 0.7)
        await poll(lambda: calls == 2)
        jump(world, daemon, LEASE_S)
        await daemon.until(lambda: "volume.closing" in names(daemon))
        await daemon.until(lambda: not world.mapper.open)
        answer.set()
        await poll(lambda: calls == 3)
        await until_mounted(daemon)
        assert "lease.renewed" not in names(daemon)
        assert all(one.secret.wiped for one in world.server.bundles)  # type: ignore[attr-defined]


async def test_it_goes_over_an_exec(world: World) -> None:
    handed = await first(world, until_mounted)
    (volume,) = handed.volumes
    assert volume.lease is not None

    async def use(daemon: Daemon) -> None:
        assert LEASE_S - 10 < lease_left_s(daemon) <= LEASE_S
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.renewed" in names(daemon))
        jump(world, daemon, LEASE_S * 2)
        await daemon.until(lambda: "lease.expired" in names(daemon))

    await run_next(world, handed, use)


async def test_one_that_ended_during_an_exec_closes_the_volume(world: World) -> None:
    handed = await first(world, until_mounted)
    world.boottime.offset_s += LEASE_S
    world.server.errors["model"] = DeniedError("revoked")

    async def use(daemon: Daemon) -> None:
        assert not daemon.volumes.named("model").mounted  # from the first moment on
        await daemon.until(lambda: not world.mapper.open)

    await run_next(world, handed, use)


async def test_a_reexec_calls_a_renewal_off_and_it_is_made_again(world: World) -> None:
    real, calls = world.server.fetch, 0

    async def fetch(loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        nonlocal calls
        calls += 1
        if calls == 2:
            await trio.sleep_forever()
        return await real(loaded, ids)

    world.server.fetch = fetch  # type: ignore[method-assign, assignment]

    async def renewing(daemon: Daemon) -> None:
        await until_mounted(daemon)
        jump(world, daemon, LEASE_S * 0.7)
        await poll(lambda: calls == 2)

    handed = await first(world, renewing)

    async def use(daemon: Daemon) -> None:
        await daemon.until(lambda: "lease.renewed" in names(daemon))

    await run_next(world, handed, use)


async def test_serving_is_told_of_a_revoked_volume_before_it_is_closed(
    world: World,
) -> None:
    """What is served is wanted without it, and who sees it is to be cut off; then it closes."""
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        in_use = True
        daemon.serving.uses = lambda *_: in_use  # type: ignore[method-assign]
        served = daemon.volumes.served()
        assert served is not None
        assert [type(one) for one in served] == [ServedVolume]
        assert daemon.volumes.revoked() == frozenset()
        world.server.errors["model"] = DeniedError("revoked")
        jump(world, daemon, LEASE_S)
        assert daemon.volumes.revoked() == {("model", 1)}
        assert daemon.volumes.served() == ()
        await daemon.until(state(daemon, VolumeState.CLOSING))
        await trio.sleep(0.2)
        assert world.mounts.table  # still in use: nothing is pulled from under it
        in_use = False
        daemon.changes.ring()
        await daemon.until(state(daemon, VolumeState.DENIED))


async def test_unmounted_by_hand_it_is_not_renewed(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        await daemon.unmount("model")
        jump(world, daemon, LEASE_S * 5)
        await trio.sleep(0.1)
        assert len(world.server.asked) == 1
        assert daemon.status()["volumes"][0]["error"] is None


async def test_the_metrics_show_what_is_left(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        line = next(
            line
            for line in (await metrics_text(daemon)).splitlines()
            if line.startswith("tdxd_volume_lease_left_seconds{")
        )
        assert line.startswith('tdxd_volume_lease_left_seconds{volume="model"} ')
        assert LEASE_S - 10 < float(line.split()[-1]) <= LEASE_S
