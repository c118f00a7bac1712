"""The closed loop, its figures and the reference's lines."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.errors import UnavailableError
from tdxd.user.bench import Load, Query, Report, percentile, run_bench
from tdxd.user.endpoint import Endpoint
from tdxd.user.infer import Model, encode_request
from tests.user.double import running_double


@pytest.fixture
def double(tmp_path):
    with running_double(tmp_path) as running:
        yield running


def bench(double, model, **load):
    endpoint = Endpoint(address=double.address, ca_pem=double.ca.read_bytes())
    x = {"x": np.ones((2, 3), np.float32)}
    request = encode_request(Model(name=model), x)
    queries: list[Query] = []
    warm: list[float] = []
    report = run_bench(
        endpoint,
        Load(batch=2, **load),
        request,
        on_query=queries.append,
        on_warm=warm.append,
    )
    return report, queries, warm


def test_every_client_makes_its_loops_and_the_warm_up_stands_apart(double):
    report, queries, warm = bench(double, "double", clients=3, loops=4, warm_up=2)
    assert len(double.requests) == 3 * (4 + 2)
    made = sorted((one.task, one.loop) for one in queries)
    assert made == [(task, loop) for task in range(3) for loop in range(4)]
    assert len(warm) == 1
    assert len(report.latencies_s) == 12
    assert report.elapsed_s >= max(report.latencies_s)
    assert report.rows_per_s == pytest.approx(24 / report.elapsed_s)


def test_failed_calls_count_under_their_code_and_end_nothing(double):
    report, queries, _warm = bench(double, "busy", clients=1, loops=5, warm_up=1)
    assert dict(report.errors) == {"RESOURCE_EXHAUSTED": 2}
    assert [one.code == "OK" for one in queries] == [True, False, True, True, False]
    assert len(report.latencies_s) == 3


def test_a_warm_up_that_fails_is_the_error(double):
    with pytest.raises(UnavailableError, match="NOT_FOUND"):
        bench(double, "nope", clients=2, loops=1, warm_up=1)


def test_the_references_lines():
    query = Query(task=0, loop=0, latency_s=0.37573, ended_s=9.0, code="OK")
    assert query.line(1) == (
        "query: secure channel, task 0, batch 1, loop_idx 0, latency(ms) 375.7, tps: 2.7"
    )
    report = Report(
        load=Load(clients=2, loops=1, batch=4, warm_up=1),
        latencies_s=(0.25, 0.5),
        errors={},
        elapsed_s=0.5,
        warm_up_s=1.0,
        client_cpu_s=0.1,
    )
    assert report.lines() == [
        "summary: cnum 2, batch 4, e2e time(s) 0.5, average latency(ms) 375.0, tps: 16.0",
        (
            "latency(ms): min 250.0 p50 250.0 p90 500.0 p95 500.0 p99 500.0 p99.9 500.0 "
            "max 500.0"
        ),
        "errors: none",
    ]


def test_without_a_success_there_is_no_latency():
    report = Report(
        load=Load(clients=1, loops=2, batch=1, warm_up=1),
        latencies_s=(),
        errors={"UNAVAILABLE": 1, "INTERNAL": 1},
        elapsed_s=0.5,
        warm_up_s=1.0,
        client_cpu_s=0.1,
    )
    assert math.isnan(report.average_s())
    assert report.lines()[1:] == ["errors: INTERNAL 1, UNAVAILABLE 1"]
    assert report.as_json()["average_ms"] is None
    assert report.as_json()["latency_ms"] == {}


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=300),
    st.sampled_from([50.0, 90.0, 95.0, 99.0, 99.9]),
)
def test_a_percentile_is_a_measured_value_that_enough_do_not_exceed(values, share):
    ordered = sorted(values)
    value = percentile(ordered, share)
    assert value in ordered
    assert sum(one <= value for one in ordered) >= share * len(ordered) / 100 - 1e-6
    assert sum(one < value for one in ordered) < share * len(ordered) / 100 + 1e-6
