"""When requests are due, the open loop, several processes, and runs that end early."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import statistics
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.errors import HostError, UnavailableError, UsageError
from tdxd.user.bench import Query, run_bench
from tdxd.user.endpoint import Endpoint
from tdxd.user.infer import Model, decode_answer, encode_request
from tdxd.user.load import Load, due_times_s
from tdxd.user.load_client import CLOCK, Job, _Client
from tests.user.double import running_double


@pytest.fixture
def double(tmp_path):
    with running_double(tmp_path) as running:
        yield running


def run(double, model, *, on_warm=lambda _s: None, stopped=lambda: False, **load):
    endpoint = Endpoint(address=double.address, ca_pem=double.ca.read_bytes())
    request = encode_request(Model(name=model), {"x": np.ones((1, 3), np.float32)})
    queries: list[Query] = []
    report = run_bench(
        endpoint,
        Load(batch=1, warm_up=1, **load),
        request,
        on_query=queries.append,
        on_warm=on_warm,
        stopped=stopped,
    )
    return report, queries


def load(**options):
    return Load(batch=1, warm_up=1, **options)


# --- the schedule -------------------------------------------------------------


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.floats(0.5, 1e4),
    st.sampled_from(["even", "poisson"]),
)
def test_every_request_is_due_once_in_order(processes, loops, rate, arrivals):
    made = load(
        clients=4, loops=loops, processes=processes, rate=rate, arrivals=arrivals
    )
    parts = [list(due_times_s(made, process)) for process in range(processes)]
    numbers = sorted(number for part in parts for number, _at_s in part)
    assert numbers == list(range(4 * loops))
    for part in parts:
        times = [at_s for _number, at_s in part]
        assert times == sorted(times)
    if arrivals == "even":
        for number, at_s in itertools.chain(*parts):
            assert at_s == number / rate


def test_poisson_arrivals_have_the_rate_and_are_the_same_again():
    made = load(clients=2, loops=5000, processes=2, rate=100, arrivals="poisson")
    times = sorted(
        at_s for process in (0, 1) for _number, at_s in due_times_s(made, process)
    )
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert statistics.mean(gaps) == pytest.approx(1 / 100, rel=0.05)
    # Those of a Poisson process deviate as much as they are long.
    assert statistics.stdev(gaps) == pytest.approx(1 / 100, rel=0.1)
    assert list(due_times_s(made, 1)) == list(due_times_s(made, 1))


def test_a_duration_ends_the_schedule():
    made = load(clients=2, loops=None, rate=100.0, duration_s=0.5)
    assert [number for number, _at_s in due_times_s(made, 0)] == list(range(50))


@pytest.mark.parametrize(
    "options",
    [
        {"clients": 1, "processes": 2},
        {"clients": 1, "rate": 0.0},
        {"clients": 1, "rate": float("nan")},
        {"clients": 1, "duration_s": -1.0},
        {"clients": 1, "duration_s": float("inf")},
    ],
)
def test_loads_that_cannot_be(options):
    with pytest.raises(UsageError):
        load(loops=1, **options)


# --- the open loop ------------------------------------------------------------


def test_latency_counts_from_when_a_request_was_due(double):
    """A server that stalls: one client alone still sends, and what waited has waited."""
    rate, stalled = 100.0, 4

    def stall(_elapsed_s):
        """Answer nobody until so many wait as a closed loop of one client never sends."""
        double.release.clear()
        assert double.waiting.acquire(timeout=30)  # that of the warm-up

        def release():
            for _ in range(stalled):
                assert double.waiting.acquire(timeout=30)
            double.release.set()

        threading.Thread(target=release, daemon=True).start()

    double.release.set()
    report, queries = run(double, "slow", clients=1, loops=20, rate=rate, on_warm=stall)
    assert len(report.latencies_s) == 20
    by_number = {one.loop: one for one in queries}
    due_s = [by_number[k].ended_s - by_number[k].latency_s for k in range(20)]
    for number in range(20):
        assert due_s[number] - due_s[0] == pytest.approx(number / rate, abs=1e-6)
    for number in range(stalled):
        # It was answered after the last of the stalled was due.
        waited_s = (stalled - 1 - number) / rate
        assert by_number[number].latency_s >= waited_s
    assert all(late_s >= 0 for late_s in report.late_s)
    assert len(report.late_s) == 20
    assert report.elapsed_s >= 19 / rate


def test_failures_of_an_open_loop_count_under_their_code(double):
    report, _queries = run(
        double, "busy", clients=2, loops=10, processes=2, rate=1000.0
    )
    assert sum(report.errors.values()) + len(report.latencies_s) == 20
    assert set(report.errors) == {"RESOURCE_EXHAUSTED"}


def test_a_rate_no_server_reaches_shows_in_the_latency_and_the_line(double):
    report, _queries = run(double, "double", clients=2, loops=100, rate=1e6)
    assert len(report.latencies_s) == 200
    # All were due at once: the last has waited for nearly the whole run.
    assert max(report.latencies_s) >= report.elapsed_s - 200 / 1e6
    assert report.requests_per_s < 1e6
    assert any(line.startswith("rate: wanted 1e+06/s") for line in report.lines())


# --- processes ----------------------------------------------------------------


def test_processes_share_the_clients(double):
    report, queries = run(double, "double", clients=3, loops=4, processes=2)
    assert sorted((one.task, one.loop) for one in queries) == [
        (task, loop) for task in range(3) for loop in range(4)
    ]
    assert report.client_cpu_s > 0
    assert not children()


def test_an_error_of_one_process_leaves_none(double):
    with pytest.raises(UnavailableError, match="NOT_FOUND"):
        run(double, "nope", clients=2, loops=1, processes=2)
    assert not children()


def test_a_process_that_dies_is_an_error(double):
    def kill(_elapsed_s):
        os.kill(children()[0], signal.SIGKILL)

    with pytest.raises(HostError, match="client process") as caught:
        run(double, "double", clients=2, loops=None, processes=2, on_warm=kill)
    assert "status -9" in caught.value.hint
    assert not children()


def children():
    """Return the load's processes that this one has started and not reaped."""
    tasks = Path("/proc/self/task").glob("*/children")
    found = [pid for task in tasks for pid in task.read_text().split()]
    return [
        int(pid)
        for pid in found
        if b"load_client" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


@pytest.mark.parametrize("rate", [None, 500.0])
def test_a_client_stops_when_nobody_listens_any_more(double, rate):
    """In this process: what is on the other end of the pipe is the test."""
    ours, theirs = multiprocessing.Pipe()
    job = Job(
        endpoint=Endpoint(address=double.address, ca_pem=double.ca.read_bytes()),
        load=load(clients=2, loops=None, rate=rate),
        process=0,
        request=encode_request(Model(name="double"), {"x": np.ones(1, np.float32)}),
    )

    def work():
        with contextlib.suppress(OSError):  # from telling it to nobody
            _Client(theirs, job).run()

    thread = threading.Thread(target=work)
    with theirs:
        thread.start()
        with ours:
            warm = ours.recv()
            assert warm.error is None
            assert decode_answer(warm.answer).outputs["y"].tolist() == [2.0]
            start_s = CLOCK() + 0.05
            ours.send(start_s)
            task, _number, due_s, sent_s, ended_s, code = ours.recv()[0]
            assert (task in (0, 1), code) == (True, "OK")
            assert start_s <= due_s <= sent_s <= ended_s
        thread.join(30)
        assert not thread.is_alive()


# --- the end ------------------------------------------------------------------


def test_a_duration_ends_a_closed_loop(double):
    report, queries = run(double, "double", clients=2, loops=None, duration_s=0.2)
    first_s = min(one.ended_s - one.latency_s for one in queries)
    assert max(one.ended_s - one.latency_s for one in queries) < first_s + 0.2
    assert not report.interrupted
    assert report.requests == len(queries)


def test_stopping_gives_what_was_measured(double):
    seen = []
    report, queries = run(
        double,
        "double",
        clients=2,
        loops=None,
        on_warm=lambda _s: seen.append(time.monotonic()),
        stopped=lambda: bool(seen) and time.monotonic() > seen[0] + 0.2,
    )
    assert report.interrupted
    assert report.requests == len(queries) > 0


def test_stopping_does_not_wait_for_answers(double):
    """A server that does not answer holds nobody up; what waits is told as lost."""
    stopping = threading.Event()
    for more in ({}, {"rate": 1000.0}):
        while double.waiting.acquire(blocking=False):
            pass
        double.release.set()
        stopping.clear()
        report, queries = run(
            double,
            "slow",
            clients=3,
            loops=5,
            on_warm=lambda _s: stall_three(double, stopping),
            stopped=stopping.is_set,
            **more,
        )
        assert queries == []
        assert report.lost >= 3
        assert report.lines()[-1].startswith("interrupted: ")


def stall_three(double, stopping):
    """Answer nobody from now on; stop when three calls wait."""
    double.release.clear()
    for _ in range(3):  # those of the warm-up
        assert double.waiting.acquire(timeout=30)

    def watch():
        for _ in range(3):
            assert double.waiting.acquire(timeout=30)
        stopping.set()

    threading.Thread(target=watch, daemon=True).start()


def test_stopping_before_anything_was_measured(double):
    with pytest.raises(KeyboardInterrupt):
        run(double, "slow", clients=1, loops=1, stopped=lambda: True)
    assert not children()
