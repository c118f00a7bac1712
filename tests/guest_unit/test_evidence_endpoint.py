"""The daemon's side of the evidence endpoint: HTTP on a unix socket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tdxd.core.endpoint_proof import evidence_target, parse_endpoint_evidence
from tdxd.errors import EvidenceUnavailableError, HostError
from tdxd.guest import http_reply
from tdxd.guest.events import Events
from tdxd.guest.evidence_endpoint import listen_for_front, serve
from tdxd.guest.prover import Prover
from tdxd.guest.standstill import Standstill
from tdxd.sim.platform import SimPlatform
from tests.endpoint import record_of
from tests.fake_tsm import FakeTsm

NONCE = bytes(range(32))
GOOD = evidence_target(NONCE)


class Broken(FakeTsm):
    def quote(self, report_data: bytes) -> bytes:
        raise EvidenceUnavailableError("the host's secret words", hint="for operators")


class World:
    def __init__(self, directory: Path) -> None:
        self.platform = SimPlatform.create()
        self.path = str(directory / "front" / "evidence.sock")
        self.directory = directory
        self.wanted = True
        self.standstill = Standstill()
        self.key: bytes | None = b"k" * 32
        self.tsm = FakeTsm(self.platform)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        prover = Prover(
            tsm=self.tsm,
            record=record_of(self.platform, self.directory),
            served_key=lambda: self.key,
            standstill=self.standstill,
            events=Events(),
            counts={"given": 0, "busy": 0, "failed": 0},
        )

        async def run() -> None:
            listener = listen_for_front(self.path)
            await serve(listener, prover, self.standstill, wanted=lambda: self.wanted)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            await trio.testing.wait_all_tasks_blocked()
            yield
            nursery.cancel_scope.cancel()

    async def ask(self, target: str = GOOD, method: str = "GET") -> tuple[str, bytes]:
        """Return the head of the answer and its body."""
        request = f"{method} {target} HTTP/1.1\r\nHost: h\r\n\r\n".encode()
        return await self.send(request)

    async def send(self, request: bytes) -> tuple[str, bytes]:
        stream = await trio.open_unix_socket(self.path)
        async with stream:
            await stream.send_all(request)
            received = b""
            with trio.fail_after(20):
                while data := await stream.receive_some(65536):
                    received += data
        head, _, body = received.partition(b"\r\n\r\n")
        return head.decode(), body


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_it_gives_evidence(world: World) -> None:
    async with world.serving():
        head, body = await world.ask()
    assert head.startswith("HTTP/1.1 200")
    assert "Content-Type: application/msgpack" in head
    assert "Cache-Control: no-store" in head
    assert parse_endpoint_evidence(body, source="x").key_sha256 == world.key


@pytest.mark.parametrize(
    ("target", "method", "status"),
    [
        (GOOD, "POST", 405),
        (GOOD, "DELETE", 405),
        (GOOD[:-1], "GET", 400),
        (GOOD + "&x=1", "GET", 400),
        ("/", "GET", 400),
        ("/metrics", "GET", 400),
    ],
)
async def test_anything_else_gets_none(
    world: World, target: str, method: str, status: int
) -> None:
    async with world.serving():
        head, body = await world.ask(target, method)
    assert head.startswith(f"HTTP/1.1 {status}")
    assert len(body) < 100


async def test_what_is_no_request(world: World) -> None:
    async with world.serving():
        head, _body = await world.send(b"\x16\x03\x01\r\n\r\n")
        assert head.startswith("HTTP/1.1 400")
        head, _body = await world.send(b"GET /" + b"x" * 20_000)
        assert head.startswith("HTTP/1.1 431")
        assert (await world.ask())[0].startswith("HTTP/1.1 200")


async def test_nobody_may_ask_where_the_configuration_says_so(world: World) -> None:
    world.wanted = False
    async with world.serving():
        assert (await world.ask())[0].startswith("HTTP/1.1 404")
        world.wanted = True
        assert (await world.ask())[0].startswith("HTTP/1.1 200")


async def test_trouble_is_told_to_operators_and_not_to_clients(world: World) -> None:
    world.tsm = Broken(world.platform)
    async with world.serving():
        head, body = await world.ask()
        assert head.startswith("HTTP/1.1 503")
        assert "Retry-After: 10" in head
        assert b"secret" not in body
        head, _body = await world.ask()
        assert "Retry-After: 1" in head


async def test_no_certificate_no_evidence(world: World) -> None:
    world.key = None
    async with world.serving():
        assert (await world.ask())[0].startswith("HTTP/1.1 503")


async def test_who_sends_nothing_keeps_no_exec_off(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_reply, "_READ_S", 0.05)
    async with world.serving():
        stream = await trio.open_unix_socket(world.path)
        await stream.send_all(b"GET /")
        with trio.fail_after(20):
            assert await stream.receive_some(100) == b""
        world.standstill.freeze()
        await world.standstill.reached(20)
        await stream.aclose()


async def test_an_old_socket_is_replaced(world: World) -> None:
    listen_for_front(world.path).close()
    async with world.serving():
        assert (await world.ask())[0].startswith("HTTP/1.1 200")
    assert os.stat(world.path).st_mode & 0o777 == 0o666


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "front").write_text("")
    with pytest.raises(HostError, match="File exists"):
        listen_for_front(str(tmp_path / "front" / "evidence.sock"))
    with pytest.raises(HostError, match="listen on"):
        listen_for_front(str(tmp_path / ("x" * 200) / "evidence.sock"))
