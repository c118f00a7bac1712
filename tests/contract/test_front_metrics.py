"""Metrics of the front, from a HAProxy that runs."""

from __future__ import annotations

import datetime as dt
import os
import signal

import pytest
import trio

from tdxd.core.config import ServingConfig
from tdxd.core.exposition import text
from tdxd.guest import front_metrics
from tdxd.guest.front_metrics import front_families
from tests.contract.fronts import PREDICT, RELOAD, Running, front_of
from tests.scrape import Scrape

pytestmark = pytest.mark.root


async def scrape(running: Running) -> Scrape:
    return Scrape.of(text(await front_families(running.front)))


async def test_requests_answers_errors_and_the_certificate(
    front_dir, host, backends
) -> None:
    config = ServingConfig(user="nobody", drain_timeout_s=1, rest_listen="127.0.0.1:1")
    async with front_of(host, front_dir, config) as running:
        with running.channel() as channel:
            assert await running.call(channel, PREDICT) == b"a"
            await running.refusal(RELOAD)
            assert (await running.rest("GET", "/no"))[0] == 404
            seen = await scrape(running)
        assert seen.value("tdxd_front_up") == 1
        requests = seen.labelled("tdxd_front_requests_total", "frontend")
        assert requests == {"grpc": 2, "rest": 1}
        own = seen.labelled("tdxd_front_own_answers_total", "frontend")
        assert own == {"grpc": 1, "rest": 1}
        responses = "tdxd_front_responses_total"
        assert seen.value(responses, frontend="rest", code="4xx") == 1
        assert seen.value(responses, frontend="grpc", code="2xx") == 2
        assert seen.value(responses, frontend="grpc", code="5xx") == 0
        received = seen.value("tdxd_front_received_bytes_total", frontend="grpc")
        assert received is not None
        assert received > 100_000
        connections = seen.value("tdxd_front_connections_total", frontend="grpc")
        assert connections == 2
        limit = seen.value("tdxd_front_connections_max", frontend="grpc")
        assert limit == config.max_connections
        errors = "tdxd_front_backend_errors_total"
        assert seen.value(errors, backend="models", kind="response") == 0
        ends_s = seen.value("tdxd_front_certificate_expiry_timestamp_seconds")
        wanted = dt.datetime(9999, 12, 31, tzinfo=dt.UTC)
        assert ends_s == wanted.timestamp()


async def test_a_front_that_has_ended_is_down(front_dir, host, backends) -> None:
    config = ServingConfig(user="nobody", drain_timeout_s=1)
    async with front_of(host, front_dir, config) as running:
        await running.front.child.stop(0)
        seen = await scrape(running)
    assert seen.samples == {("tdxd_front_up", frozenset()): 0}


async def test_a_front_that_hangs_is_down_and_holds_no_scrape_up(
    front_dir, host, backends, monkeypatch
) -> None:
    monkeypatch.setattr(front_metrics, "_PATIENCE_S", 0.2)
    config = ServingConfig(user="nobody", drain_timeout_s=1)
    async with front_of(host, front_dir, config) as running:
        os.kill(running.front.child.pid, signal.SIGSTOP)
        try:
            with trio.fail_after(4):
                seen = await scrape(running)
        finally:
            os.kill(running.front.child.pid, signal.SIGCONT)
    assert seen.samples == {("tdxd_front_up", frozenset()): 0}
