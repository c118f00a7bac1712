"""/livez, /readyz and /metrics say what is: over HTTP, of a daemon on a fake kernel."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tdxd.core.plan import VolumeState
from tdxd.errors import DeniedError, IntegrityError, UnreachableError
from tdxd.guest import health, standstill
from tdxd.guest.daemon import Daemon
from tdxd.host.process_stat import process_families
from tests.daemon.test_daemon import World, state
from tests.daemon.test_lease import LEASE_S, jump, names
from tests.daemon.test_reexec import until_mounted
from tests.scrape import Scrape


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.image()
    return made


class Probe:
    """Asks the health endpoint of a daemon."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def get(self, path: str, method: str = "GET") -> tuple[int, str]:
        stream = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with stream:
            await stream.send_all(
                f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
            )
            data = b"".join([chunk async for chunk in stream])
        head, _, body = data.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()

    async def scrape(self) -> Scrape:
        status, body = await self.get("/metrics")
        assert status == 200
        return Scrape.of(body)


@asynccontextmanager
async def probed(world: World) -> AsyncIterator[tuple[Daemon, Probe]]:
    with socket.create_server(("127.0.0.1", 0)) as plain:
        plain.setblocking(False)
        async with world.daemon() as daemon, trio.open_nursery() as nursery:
            nursery.start_soon(health.serve, plain, daemon)
            yield daemon, Probe(plain.getsockname()[1])
            nursery.cancel_scope.cancel()


def states(scrape: Scrape) -> dict[str, float]:
    return {
        name: value
        for name, value in scrape.labelled("tdxd_volume_state", "state").items()
        if value
    }


async def test_a_mounted_volume_with_a_lease(world: World) -> None:
    world.server.lease_s = LEASE_S
    async with probed(world) as (daemon, probe):
        await until_mounted(daemon)
        assert await probe.get("/readyz") == (200, "ok\n")
        assert await probe.get("/livez") == (200, "ok\n")
        seen = await probe.scrape()
        assert seen.value("tdxd_ready") == 1
        assert states(seen) == {"mounted": 1}
        every = seen.labelled("tdxd_volume_state", "state")
        assert set(every) == {one.value for one in VolumeState}
        assert seen.value("tdxd_volume_generation", volume="model") == 1
        assert seen.value("tdxd_volume_size_bytes", volume="model") == 5 * 4096
        left_s = seen.value("tdxd_volume_lease_left_seconds", volume="model")
        assert left_s is not None
        assert LEASE_S - 10 < left_s <= LEASE_S
        assert seen.labelled("tdxd_attestations_total", "code") == {"ok": 1}
        assert seen.value("tdxd_attestation_duration_seconds_count") == 1
        assert seen.value("tdxd_volume_mounts_total", volume="model") == 1
        assert seen.value("tdxd_volume_lease_renewals_total", volume="model") == 0
        assert seen.labelled("tdxd_volume_info", "integrity") == {"verified": 1}
        assert seen.labelled("tdxd_volume_error", "code") == {}
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.renewed" in names(daemon))
        seen = await probe.scrape()
        assert seen.value("tdxd_volume_lease_renewals_total", volume="model") == 1
        assert seen.value("tdxd_attestation_duration_seconds_count") == 2


async def test_a_renewal_that_fails_and_a_lease_that_ends(world: World) -> None:
    world.server.lease_s = LEASE_S
    async with probed(world) as (daemon, probe):
        await until_mounted(daemon)
        world.server.errors["model"] = DeniedError("revoked")
        jump(world, daemon, LEASE_S * 0.7)
        await daemon.until(lambda: "lease.not_renewed" in names(daemon))
        seen = await probe.scrape()
        assert seen.labelled("tdxd_volume_lease_error", "code") == {"key-denied": 1}
        assert seen.labelled("tdxd_volume_lease_failures_total", "code") == {
            "key-denied": 1
        }
        assert states(seen) == {"mounted": 1}
        jump(world, daemon, LEASE_S)
        await daemon.until(state(daemon, VolumeState.DENIED))
        seen = await probe.scrape()
        assert states(seen) == {"denied": 1}
        assert seen.labelled("tdxd_volume_error", "code") == {"key-denied": 1}
        assert seen.labelled("tdxd_volume_lease_error", "code") == {}
        assert seen.value("tdxd_volume_lease_expiries_total", volume="model") == 1
        assert seen.value("tdxd_ready") == 0
        assert await probe.get("/readyz") == (503, "volume model is denied\n")


async def test_failures_are_counted_by_their_code(world: World) -> None:
    world.server.errors["model"] = UnreachableError("no key server")
    async with probed(world) as (daemon, probe):
        await daemon.until(lambda: len(world.server.asked) >= 3)
        seen = await probe.scrape()
        code = {"volume": "model", "code": "key-server-unreachable"}
        assert seen.value("tdxd_volume_error", **code) == 1
        failures = seen.value("tdxd_volume_failures_total", **code)
        assert failures is not None
        assert failures >= 2
        outcomes = seen.labelled("tdxd_attestations_total", "code")
        assert outcomes["ok"] == 0
        assert outcomes["key-server-unreachable"] >= 2
        world.server.errors.clear()
        world.mapper.next_error = IntegrityError("a hash differs")
        await daemon.until(state(daemon, VolumeState.FAILED))
        seen = await probe.scrape()
        assert seen.labelled("tdxd_volume_error", "code") == {"volume-integrity": 1}


async def test_a_volume_without_a_file_and_one_unmounted_by_hand(world: World) -> None:
    world.config = world.make_config("model", "absent")
    async with probed(world) as (daemon, probe):
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        await daemon.unmount("model")
        seen = await probe.scrape()
        assert seen.labelled("tdxd_volume_error", "volume") == {"absent": 1}
        assert seen.labelled("tdxd_volume_wanted", "volume") == {
            "model": 0,
            "absent": 1,
        }
        assert seen.value("tdxd_volume_generation", volume="model") is None


async def test_a_reconciler_that_hangs_is_not_alive(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with probed(world) as (daemon, probe):
        await until_mounted(daemon)
        beats = [*daemon.beats(), trio.current_time() - standstill.SILENT_S - 12]
        monkeypatch.setattr(daemon, "beats", lambda: beats)
        status, body = await probe.get("/livez")
        assert (status, body[:17]) == (503, "a reconciler hang")
        silent_s = (await probe.scrape()).value("tdxd_reconciler_silence_seconds")
        assert silent_s is not None
        assert silent_s > standstill.SILENT_S


async def test_no_serving_is_off_and_has_no_front(world: World) -> None:
    async with probed(world) as (daemon, probe):
        await until_mounted(daemon)
        seen = await probe.scrape()
        shown = seen.labelled("tdxd_serving_state", "state")
        assert {name for name, value in shown.items() if value} == {"off"}
        assert seen.value("tdxd_front_up") == 0
        assert seen.value("tdxd_serving_restarts_total") == 0


async def test_other_paths_and_methods(world: World) -> None:
    async with probed(world) as (_, probe):
        assert (await probe.get("/"))[0] == 404
        assert (await probe.get("/metrics", "POST"))[0] == 405
        assert await probe.get("/metrics", "HEAD") == (200, "")


def test_the_process_is_this_one() -> None:
    values = {one.name: float(one.samples[0].split()[1]) for one in process_families()}
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = [one for one in file if one.startswith("VmRSS:")]
    resident = int(line.split()[1]) * 1024
    assert abs(values["process_resident_memory_bytes"] - resident) < 2**24
    assert 0 < values["process_cpu_seconds_total"] <= sum(os.times()[:2]) + 0.1
    at_s = os.stat("/proc/self").st_ctime
    assert abs(values["process_start_time_seconds"] - at_s) < 2
    assert values["process_open_fds"] >= 3
