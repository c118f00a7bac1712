"""Prometheus' text of the metrics."""

from __future__ import annotations

from tdxd.model_server.metrics import Metrics


def test_counts_and_histograms():
    metrics = Metrics()
    for status, elapsed_s in (("OK", 0.000_009), ("OK", 0.000_020), ("NOT_FOUND", 9)):
        metrics.answered(
            model="m",
            api="Predict",
            entrypoint="GRPC",
            status=status,
            elapsed_s=elapsed_s,
        )
    metrics.executed(model="m", api="Predict", elapsed_s=5000)
    lines = metrics.text().splitlines()
    prefix = ":tensorflow:serving:"
    assert f"# TYPE {prefix}request_count counter" in lines
    assert f'{prefix}request_count{{model_name="m",status="OK"}} 2' in lines
    assert f'{prefix}request_count{{model_name="m",status="NOT_FOUND"}} 1' in lines
    assert f"# TYPE {prefix}request_latency histogram" in lines
    labels = 'model_name="m",API="Predict",entrypoint="GRPC"'
    buckets = [
        line.rpartition(" ")[2]
        for line in lines
        if line.startswith(f"{prefix}request_latency_bucket{{{labels},")
    ]
    assert buckets == ["1", "1", *["2"] * 32]  # up to 10, 18, 32.4 us …
    assert f'{prefix}request_latency_bucket{{{labels},le="32.4"}} 2' in lines
    assert f"{prefix}request_latency_sum{{{labels}}} 29" in lines
    assert f"{prefix}request_latency_count{{{labels}}} 2" in lines
    labels = 'model_name="m",API="Predict",runtime="TF1"'
    assert f'{prefix}runtime_latency_bucket{{{labels},le="+Inf"}} 1' in lines
    largest = [line for line in lines if "runtime_latency_bucket" in line][-2]
    assert largest.endswith(" 0")


def test_names_are_escaped():
    metrics = Metrics()
    metrics.answered(
        model='a"\\\n', api="Predict", entrypoint="GRPC", status="X", elapsed_s=0
    )
    assert 'model_name="a\\"\\\\\\n"' in metrics.text()
