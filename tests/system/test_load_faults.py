"""Under load, what serves is replaced or ends: who fails meanwhile, and what they are told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tests.steady_stream import CLOCK
from tests.system.under_load import (
    LateRequest,
    Serving,
    assert_clear,
    assert_one_gap,
    told,
)
from tests.system.world import World

pytestmark = [pytest.mark.root, pytest.mark.slow]

NOT_ACCEPTED = ("failed to connect to all addresses", "no model server is ready")
"""What is said to a request that nobody has begun with."""


@pytest.fixture(scope="module")
def serving(world: World) -> Iterator[Serving]:
    """The tests share it, one after the other, since a model server takes seconds to start."""
    made = Serving(world)
    with world.key_server():
        try:
            made.start(killed=True)
            yield made
        finally:
            made.stop()


def test_the_program_is_replaced_and_no_request_fails(serving: Serving) -> None:
    with serving.stream() as stream, LateRequest(serving.endpoint) as late:
        for _ in range(3):
            serving.daemon.reexec()
            stream.more()
        assert late.end() == ("OK", "")
    print(told("re-exec three times", stream))
    assert stream.failures == []


def test_the_model_server_is_killed(serving: Serving) -> None:
    """Who fails was on the way or came until another one was ready."""
    with serving.stream() as stream:
        with LateRequest(serving.endpoint) as late:
            killed_s = CLOCK()
            os.kill(serving.server_pid(), signal.SIGKILL)
            code, text = late.end()
        ready = stream.until(
            lambda one: one.ok and one.sent_s > killed_s + 0.5, "an answer again"
        )
        stream.more()
    print(told("model server killed", stream))
    print(f"recovered after {ready.ended_s - killed_s:.2f} s; on the way: {text}")
    assert code == "UNAVAILABLE"
    assert text
    assert_clear(stream.failures)
    assert_one_gap(stream, killed_s)


def test_the_daemon_is_killed_and_started_again(serving: Serving) -> None:
    """All that it ran ends with it; the next one sweeps what is left, and serves."""
    with serving.stream() as stream:
        with LateRequest(serving.endpoint) as late:
            killed_s = CLOCK()
            os.kill(serving.daemon.process.pid, signal.SIGKILL)
            code, text = late.end()
        serving.start()
        stream.more()
    print(told("daemon killed", stream))
    print(f"on the way: {text}")
    assert code == "UNAVAILABLE"
    assert text
    assert_clear(stream.failures)
    assert_one_gap(stream, killed_s)


def test_the_daemon_is_stopped_and_what_was_accepted_is_answered(
    serving: Serving,
) -> None:
    with serving.stream() as stream, LateRequest(serving.endpoint) as late:
        stopped_s = CLOCK()
        serving.stop()
        took_s = CLOCK() - stopped_s
        assert late.end() == ("OK", "")
    print(told("daemon stopped", stream))
    print(f"stopping took {took_s:.2f} s")
    failures = stream.failures
    assert failures
    assert_clear(failures)
    assert min(one.ended_s for one in failures) > stopped_s
    accepted = [
        one for one in failures if not any(text in one.details for text in NOT_ACCEPTED)
    ]
    assert accepted == []
