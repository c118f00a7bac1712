"""Counts and latencies of requests, in Prometheus' text format under TensorFlow Serving's names.

Source: tensorflow_serving/servables/tensorflow/util.cc (names, labels, buckets),
util/prometheus_exporter.cc (the text).
"""

from __future__ import annotations

import bisect
import dataclasses
import threading

__all__ = ["METRICS_PATH", "Metrics"]

METRICS_PATH = "/monitoring/prometheus/metrics"
_PREFIX = ":tensorflow:serving:"
_BOUNDS_US = [10 * 1.8**power for power in range(33)]
"""Upper bounds of all buckets but the last: 10 us to about 20 minutes."""


@dataclasses.dataclass(slots=True)
class _Histogram:
    counts: list[int] = dataclasses.field(
        default_factory=lambda: [0] * (len(_BOUNDS_US) + 1)
    )
    sum_us: float = 0.0

    def add(self, value_us: float) -> None:
        self.counts[bisect.bisect_left(_BOUNDS_US, value_us)] += 1
        self.sum_us += value_us


class Metrics:
    """What was asked and how long it took; safe to use from any thread.

    A model's name must be one that is configured: names from requests would grow without bound.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, str], int] = {}
        self._request_latency: dict[tuple[str, str, str], _Histogram] = {}
        self._runtime_latency: dict[tuple[str, str, str], _Histogram] = {}

    def answered(
        self, *, model: str, api: str, entrypoint: str, status: str, elapsed_s: float
    ) -> None:
        """Count a request; `status` is a gRPC code's name. Only what succeeded has a latency."""
        with self._lock:
            key = (model, status)
            self._requests[key] = self._requests.get(key, 0) + 1
            if status == "OK":
                place = (model, api, entrypoint)
                one = self._request_latency.setdefault(place, _Histogram())
                one.add(elapsed_s * 1e6)

    def executed(self, *, model: str, api: str, elapsed_s: float) -> None:
        """Count an execution of a model."""
        with self._lock:
            place = (model, api, "TF1")
            one = self._runtime_latency.setdefault(place, _Histogram())
            one.add(elapsed_s * 1e6)

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        with self._lock:
            lines = [f"# TYPE {_PREFIX}request_count counter"]
            for (model, status), count in sorted(self._requests.items()):
                labels = _labels(model_name=model, status=status)
                lines.append(f"{_PREFIX}request_count{{{labels}}} {count}")
            lines += _histograms("request_latency", "entrypoint", self._request_latency)
            lines += _histograms("runtime_latency", "runtime", self._runtime_latency)
        return "\n".join(lines) + "\n"


def _histograms(
    name: str, last_label: str, values: dict[tuple[str, str, str], _Histogram]
) -> list[str]:
    lines = [f"# TYPE {_PREFIX}{name} histogram"]
    for (model, api, last), one in sorted(values.items()):
        labels = _labels(model_name=model, API=api, **{last_label: last})
        total = 0
        for bound, count in zip([*_BOUNDS_US, None], one.counts, strict=True):
            total += count
            limit = "+Inf" if bound is None else f"{bound:g}"
            lines.append(f'{_PREFIX}{name}_bucket{{{labels},le="{limit}"}} {total}')
        lines.append(f"{_PREFIX}{name}_sum{{{labels}}} {one.sum_us:g}")
        lines.append(f"{_PREFIX}{name}_count{{{labels}}} {total}")
    return lines


def _labels(**values: str) -> str:
    pairs = []
    for name, value in values.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    return ",".join(pairs)
