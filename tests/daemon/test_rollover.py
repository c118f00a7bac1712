"""A new generation of an open volume: opened beside the old one, which leaves when it serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tdxd.core.plan import VolumeState
from tdxd.core.serving_config import ServingConfig
from tdxd.errors import DeniedError, NotReadyError, UnreachableError
from tdxd.guest.daemon import Daemon
from tdxd.guest.handover import HandedVolume
from tdxd.guest.reconciler import VolumeReconciler
from tests.daemon.test_daemon import World
from tests.daemon.test_lease import jump
from tests.daemon.test_reexec import first, run_next, until_mounted


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Generation 1 is there and released; images are found by a glob."""
    made = World(tmp_path)
    volume = dataclasses.replace(
        made.config.volume[0], image=str(tmp_path / "model-*.img")
    )
    made.config = dataclasses.replace(made.config, volume=(volume,))
    image(made, 1)
    return made


def image(world: World, generation: int, content: str | None = None) -> Path:
    path = world.directory / f"model-{generation}.img"
    path.write_text(content or f"model@{generation}")
    return path


def release(world: World, generation: int) -> None:
    world.server.generations["model"] = generation


def generations(daemon: Daemon) -> list[int | None]:
    return [one.generation for one in daemon.volumes.all]


def newer(daemon: Daemon) -> VolumeReconciler:
    (one,) = [one for one in daemon.volumes.all if one.newer_than is not None]
    return one


def serving(world: World) -> None:
    """Configure serving: the fake kernel starts no child, so every start of a server fails."""
    world.config = dataclasses.replace(
        world.config, serving=ServingConfig(command="/bin/true", tls_volume="model")
    )


def rolled_over(daemon: Daemon, generation: int) -> Callable[[], bool]:
    return lambda: generations(daemon) == [generation] and daemon.settled()


async def test_a_reload_opens_the_new_generation_and_closes_the_old(
    world: World,
) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        await daemon.reload()
        assert generations(daemon) == [2]
        assert [one.endswith("model@2") for one in world.mounts.table] == [True]
        assert len(world.mapper.open) == 1
        assert daemon.readiness() == (True, [], 0)
        assert all(one.secret.wiped for one in world.server.bundles)  # type: ignore[attr-defined]


async def test_a_new_file_is_noticed_by_itself(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        release(world, 2)
        image(world, 2)
        daemon.changes.ring()
        await daemon.until(rolled_over(daemon, 2))


async def test_it_is_never_unready_meanwhile(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        seen: list[bool] = []

        async def watch() -> None:
            while True:
                count = daemon.changes.count
                seen.append(daemon.readiness()[0] and bool(world.mounts.table))
                await daemon.changes.after(count)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            await daemon.reload()
            nursery.cancel_scope.cancel()
        assert len(seen) > 3
        assert all(seen)


async def test_without_another_file_no_reload_asks_the_key_server(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        release(world, 2)
        await daemon.reload()
        assert len(world.server.asked) == 1
        assert generations(daemon) == [1]


async def test_a_file_without_a_newer_key_changes_nothing(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        await daemon.reload()
        assert len(world.server.asked) == 2
        assert generations(daemon) == [1]
        assert all(one.secret.wiped for one in world.server.bundles)  # type: ignore[attr-defined]


async def test_a_host_that_touches_files_costs_few_questions(world: World) -> None:
    """The key server counts what it is asked, and the files are the host's."""
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        for number in range(5):
            image(world, 2, content=f"noise {number}")
            daemon.changes.ring()
            await trio.sleep(0.05)
        assert len(world.server.asked) <= 2


async def test_an_older_generation_is_never_taken_for_news(world: World) -> None:
    release(world, 2)
    image(world, 2)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        assert generations(daemon) == [2]
        release(world, 1)
        image(world, 1, content="model@1")
        await daemon.reload()
        assert generations(daemon) == [2]


async def test_a_reload_says_that_no_file_fits_the_new_generation(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        release(world, 2)
        image(world, 2, content="half an upload")
        with pytest.raises(NotReadyError, match=r"still serves.*volume model"):
            await daemon.reload()
        assert daemon.readiness()[0]
        assert newer(daemon).state is VolumeState.FAILED
        image(world, 2)
        daemon.changes.ring()
        await daemon.until(rolled_over(daemon, 2))


async def test_a_key_server_that_is_away_leaves_the_old_one_open(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        world.server.errors["model"] = UnreachableError("no key server")
        with pytest.raises(NotReadyError, match="no key server"):
            await daemon.reload()
        assert daemon.readiness()[0]
        world.server.errors.clear()
        await daemon.until(rolled_over(daemon, 2))


async def test_a_refusal_is_shown_beside_the_one_that_is_open(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        world.server.errors["model"] = DeniedError("policy says no")
        with pytest.raises(NotReadyError, match="policy says no"):
            await daemon.reload()
        old, new = daemon.status()["volumes"]
        assert (old["state"], old["generation"]) == ("mounted", 1)
        assert (new["state"], new["newer_than"]) == ("denied", 1)


async def test_unmount_closes_every_generation(world: World) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        world.server.errors["model"] = UnreachableError("no key server")
        with pytest.raises(NotReadyError):
            await daemon.reload()
        await daemon.unmount("model")
        await daemon.until(lambda: len(daemon.volumes.all) == 1)
        assert not world.mapper.open


async def test_a_lease_that_only_another_generation_gets_makes_it_look(
    world: World,
) -> None:
    """The owner releases generation 2 alone: it must be open before the lease of 1 is over."""
    world.server.lease_s = 1000
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        daemon.changes.ring()
        await daemon.until(lambda: len(world.server.asked) == 2)
        await daemon.until(daemon.settled)
        release(world, 2)
        look = daemon.volumes._looks["model"]
        look.at_s -= 60
        jump(world, daemon, 610)
        await daemon.until(rolled_over(daemon, 2))


async def test_a_broken_old_one_gives_way_to_an_open_new_one(world: World) -> None:
    serving(world)
    async with world.daemon() as daemon:
        daemon.serving.serves = lambda *_: False  # type: ignore[method-assign]
        daemon.volumes.refuse = lambda *_: False  # type: ignore[method-assign]
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        await daemon.until(lambda: generations(daemon) == [1, 2])
        await daemon.until(lambda: daemon.volumes.all[1].mounted)
        world.mapper.broken.add(daemon.volumes.all[0].device.mapped.device)  # type: ignore[union-attr]
        daemon.changes.ring()
        await daemon.until(lambda: generations(daemon) == [2])


# --- serving ----------------------------------------------------------------------


async def test_the_old_one_stays_until_the_new_one_answers_clients(
    world: World,
) -> None:
    serving(world)
    async with world.daemon() as daemon:
        served: set[int | None] = {1}
        daemon.serving.serves = lambda _, number: number in served  # type: ignore[assignment,method-assign]
        daemon.volumes.refuse = lambda *_: False  # type: ignore[method-assign]
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        await daemon.until(lambda: len(world.mounts.table) == 2)
        await trio.sleep(0.1)
        assert generations(daemon) == [1, 2]
        wanted = daemon.volumes.served()
        assert wanted is not None
        assert [one.generation for one in wanted] == [2]
        served.add(2)
        daemon.changes.ring()
        await daemon.until(lambda: generations(daemon) == [2])


async def test_a_generation_that_cannot_be_served_is_closed_and_says_why(
    world: World,
) -> None:
    serving(world)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.serving.retry_now()
        daemon.changes.ring()
        await daemon.until(
            lambda: (
                generations(daemon) == [1, None]
                and newer(daemon).state is VolumeState.FAILED
            )
        )
        failure = newer(daemon).failure
        assert failure is not None
        assert "generation 2 of volume model cannot be served" in failure.error.message
        assert daemon.volumes.named("model").mounted
        assert len(world.mapper.open) == 1


async def test_in_place_the_old_one_is_gone_before_the_new_one_is_mapped(
    world: World,
) -> None:
    """Two images in memory may be more than the machine has."""
    serving(world)
    assert world.config.serving is not None
    in_place = dataclasses.replace(world.config.serving, strategy="replace-in-place")
    world.config = dataclasses.replace(world.config, serving=in_place)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        most = 0
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        while generations(daemon) != [2] or not daemon.volumes.all[0].mounted:
            count = daemon.changes.count
            most = max(most, len(world.mapper.open))
            await daemon.changes.after(count)
        assert most == 1


async def test_in_place_the_old_one_does_not_go_for_half_an_upload(
    world: World,
) -> None:
    serving(world)
    assert world.config.serving is not None
    in_place = dataclasses.replace(world.config.serving, strategy="replace-in-place")
    world.config = dataclasses.replace(world.config, serving=in_place)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2, content="half an upload")
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        await daemon.until(lambda: len(daemon.volumes.all) == 2)
        await daemon.until(lambda: newer(daemon).state is VolumeState.FAILED)
        assert daemon.volumes.named("model").mounted
        failure = newer(daemon).failure
        assert failure is not None
        assert "none of 2 files" in failure.error.message


async def test_a_reload_returns_where_there_is_nothing_to_serve(world: World) -> None:
    serving(world)
    optional = dataclasses.replace(world.config.volume[0], required=False)
    world.config = dataclasses.replace(world.config, volume=(optional,))
    (world.directory / "model-1.img").unlink()
    async with world.daemon() as daemon:
        with trio.fail_after(5), pytest.raises(NotReadyError, match="serving is"):
            await daemon.reload()


# --- over an exec -----------------------------------------------------------------


async def test_both_generations_go_on_over_an_exec(world: World) -> None:
    serving(world)

    async def both_open(daemon: Daemon) -> None:
        daemon.serving.serves = lambda *_: False  # type: ignore[method-assign]
        daemon.volumes.refuse = lambda *_: False  # type: ignore[method-assign]
        await until_mounted(daemon)
        image(world, 2)
        release(world, 2)
        daemon.volumes.ask_for_news()
        daemon.changes.ring()
        await daemon.until(lambda: len(world.mounts.table) == 2)
        await daemon.until(lambda: daemon.volumes.all[1].mounted)

    handed = await first(world, both_open)
    assert [_shown(one) for one in handed.volumes] == [(1, None), (2, 1)]
    asked = len(world.server.asked)

    async def goes_on(daemon: Daemon) -> None:
        daemon.serving.serves = lambda *_: True  # type: ignore[method-assign]
        daemon.volumes.refuse = lambda *_: False  # type: ignore[method-assign]
        daemon.changes.ring()
        await daemon.until(lambda: generations(daemon) == [2])
        assert len(world.server.asked) == asked

    await run_next(world, handed, goes_on)


def _shown(one: HandedVolume) -> tuple[int | None, int | None]:
    return (one.mapped.manifest.generation if one.mapped else None, one.newer_than)


async def test_one_that_was_removed_from_the_config_closes_in_both_generations(
    world: World,
) -> None:
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        image(world, 2)
        world.server.errors["model"] = DeniedError("policy says no")
        with pytest.raises(NotReadyError):
            await daemon.reload()
        world.config = dataclasses.replace(world.config, volume=())
        await daemon.reload()
        assert daemon.volumes.all == []
