"""Evidence for clients: one quote at a time, few who wait, no key release kept waiting."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from tdxd.core.endpoint_proof import EndpointEvidence, endpoint_report_data
from tdxd.core.quote import parse_quote
from tdxd.core.runtime_log import encode_runtime_log, volume_event
from tdxd.errors import CrowdedError, EvidenceUnavailableError, NotReadyError, TdxdError
from tdxd.guest.events import Events
from tdxd.guest.prover import Prover
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.standstill import Standstill
from tdxd.sim.platform import SimPlatform
from tests.endpoint import record_of
from tests.fake_tsm import FakeTsm
from tests.fakes import make_bundle

KEY = b"k" * 32
NONCE = bytes(range(32))


class Gate(FakeTsm):
    """Makes each quote when told to, and counts how many are being made."""

    def __init__(self, platform: SimPlatform) -> None:
        super().__init__(platform)
        self.allowed = threading.Semaphore(0)
        self.begun: list[bytes] = []
        self.at_once = self.most = 0
        self.error: TdxdError | None = None

    def quote(self, report_data: bytes) -> bytes:
        self.begun.append(report_data)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        assert self.allowed.acquire(timeout=20)
        self.at_once -= 1
        if self.error is not None:
            raise self.error
        return super().quote(report_data)


class Scene:
    def __init__(self, directory: Path) -> None:
        self.platform = SimPlatform.create()
        self.tsm = Gate(self.platform)
        self.record: RuntimeRecord = record_of(self.platform, directory)
        self.standstill, self.events = Standstill(), Events()
        self.key: bytes | None = KEY
        self.counts = {"given": 0, "busy": 0, "failed": 0}
        self.prover = self.made()
        self.answers: list[EndpointEvidence | TdxdError] = []

    def made(self, **changes: float) -> Prover:
        return Prover(
            tsm=self.tsm,
            record=self.record,
            served_key=lambda: self.key,
            standstill=self.standstill,
            events=self.events,
            counts=self.counts,
            **changes,
        )

    async def ask(self, nonce: bytes = NONCE) -> None:
        try:
            self.answers.append(await self.prover.evidence(nonce))
        except TdxdError as exc:
            self.answers.append(exc)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.001)


async def test_the_quote_binds_nonce_key_and_both_logs(scene: Scene) -> None:
    manifest = make_bundle("m").manifest
    await scene.record.add(manifest)
    scene.tsm.allowed.release()
    await scene.ask()
    (answer,) = scene.answers
    assert isinstance(answer, EndpointEvidence)
    assert answer.key_sha256 == KEY
    assert answer.runtime_log == encode_runtime_log([volume_event(manifest)])
    quote = parse_quote(answer.quote)
    assert quote.rtmrs[3] == scene.platform.rtmrs[3] != bytes(48)
    assert quote.report_data == endpoint_report_data(
        nonce=NONCE,
        key_sha256=KEY,
        event_log=scene.platform.event_log,
        runtime_log=answer.runtime_log,
    )


async def test_without_a_certificate_there_is_no_quote(scene: Scene) -> None:
    scene.key = None
    await scene.ask()
    assert isinstance(scene.answers[0], NotReadyError)
    assert scene.tsm.begun == []
    assert scene.counts == {"given": 0, "busy": 0, "failed": 1}


async def test_one_quote_at_a_time_and_few_who_wait(scene: Scene) -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(scene.ask)
        await until(lambda: scene.tsm.begun and len(scene.answers) == 21)
        assert all(isinstance(one, CrowdedError) for one in scene.answers)
        scene.tsm.allowed.release(30)
    assert scene.tsm.most == 1
    assert len(scene.tsm.begun) == 9
    assert scene.counts == {"given": 9, "busy": 21, "failed": 0}


async def test_a_key_release_waits_for_one_quote_at_most(scene: Scene) -> None:
    order: list[str] = []

    async def release() -> None:
        async with scene.record.held():
            order.append(f"key release after {len(scene.answers)}")

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(scene.ask)
        await until(lambda: scene.tsm.begun)
        nursery.start_soon(release)
        await trio.testing.wait_all_tasks_blocked()
        scene.tsm.allowed.release(5)
    assert order in (["key release after 0"], ["key release after 1"])
    assert len(scene.answers) == 5


async def test_quotes_rest_as_long_as_they_take(scene: Scene) -> None:
    """Clients get half of the time at most."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.ask)
        await until(lambda: scene.tsm.begun)
        began_s = trio.current_time()
        await trio.sleep(0.2)
        scene.tsm.allowed.release(2)
    await scene.ask()
    assert trio.current_time() - began_s >= 2 * 0.199


async def test_after_a_failure_nobody_makes_the_host_try_again_at_once(
    scene: Scene,
) -> None:
    scene.tsm.error = EvidenceUnavailableError("outblob is empty", hint="QGS")
    scene.tsm.allowed.release(5)
    for _ in range(3):
        await scene.ask()
    first, *others = scene.answers
    assert isinstance(first, EvidenceUnavailableError)
    assert all(isinstance(one, CrowdedError) for one in others)
    assert len(scene.tsm.begun) == 1
    told = [one["event"] for one in scene.events.after(0)]
    assert told == ["evidence.failed"]


async def test_those_who_wait_are_let_go_before_an_exec(scene: Scene) -> None:
    """The one whose quote is being made is answered: it cannot be called off."""
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(scene.ask)
        await until(lambda: scene.tsm.begun)
        scene.standstill.freeze()
        await until(lambda: len(scene.answers) == 2)
        assert all(isinstance(one, CrowdedError) for one in scene.answers)
        scene.tsm.allowed.release()
    assert isinstance(scene.answers[-1], EndpointEvidence)


async def test_nobody_waits_for_ever(scene: Scene) -> None:
    scene.prover = scene.made(patience_s=0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(scene.ask)
        await until(lambda: scene.tsm.begun)
        await scene.ask()
        assert isinstance(scene.answers[0], CrowdedError)
        scene.tsm.allowed.release()
