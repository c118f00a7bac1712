"""A flood of clients who ask for evidence: quotes are few, and nothing else waits for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tdxd.errors import ServeError, TdxdError
from tdxd.sim.platform import SimPlatform
from tdxd.user.attested import Proof, fetch_proof
from tdxd.user.endpoint import Endpoint, open_channel
from tests.endpoint import ProvingGuest, proving_guest
from tests.fake_tsm import FakeTsm

pytestmark = pytest.mark.root

PREDICT = "/tensorflow.serving.PredictionService/Predict"
CLIENTS = 40


class HeldTsm(FakeTsm):
    """Gives no quote until it may."""

    def __init__(self, platform: SimPlatform) -> None:
        super().__init__(platform)
        self.may, self.asked = threading.Event(), threading.Event()
        self.at_once = self.most = self.count = 0

    def quote(self, report_data: bytes) -> bytes:
        self.count += 1
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.asked.set()
        assert self.may.wait(30)
        self.at_once -= 1
        return super().quote(report_data)


@pytest.fixture
def tsm() -> HeldTsm:
    return HeldTsm(SimPlatform.create())


@pytest.fixture
def guest(tsm: HeldTsm) -> Iterator[ProvingGuest]:
    with proving_guest(tsm.platform, tsm=tsm) as running:
        yield running
        tsm.may.set()


def ask(guest: ProvingGuest, timeout_s: float) -> Proof | TdxdError:
    try:
        return fetch_proof(
            Endpoint(address=guest.address, ca_pem=None, timeout_s=timeout_s)
        )
    except TdxdError as exc:
        return exc


def test_quote_flood(guest: ProvingGuest, tsm: HeldTsm) -> None:
    """Most are sent away at once; inference goes on; a key release waits for one quote."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        # None of them waits to ask again: what the guest says first is its answer.
        asked = [pool.submit(ask, guest, 0.9) for _ in range(CLIENTS)]
        assert tsm.asked.wait(20)
        answers = [one.result(30) for one in asked]
        assert all(isinstance(one, ServeError) for one in answers)
        assert (tsm.count, tsm.most) == (1, 1)
        endpoint = Endpoint(
            address=guest.address, ca_pem=guest.served, server_name="localhost"
        )
        with open_channel(endpoint) as channel:
            call: Any = channel.unary_unary(PREDICT, None, None)
            assert call(b"x" * 1000, timeout=20) == b"x" * 1000
        release = pool.submit(guest.held)
        tsm.may.set()
        release.result(20)
        assert tsm.count <= 1 + 1
        last = ask(guest, 30)
        assert isinstance(last, Proof)
    assert tsm.most == 1


def test_patient_clients_are_answered_in_the_end(
    guest: ProvingGuest, tsm: HeldTsm
) -> None:
    tsm.may.set()
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda _: ask(guest, 30), range(CLIENTS)))
    assert all(isinstance(one, Proof) for one in answers), answers
    assert tsm.most == 1
