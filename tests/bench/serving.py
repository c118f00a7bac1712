"""Figures of serving: what the client costs, and what the drop-in adds to TensorFlow.

Each measurement runs in a process of its own, since TensorFlow and its messages without it cannot
both be measured in one; the two sides of a ratio take turns in one run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

__all__ = ["rows"]

CLIENT_BUDGET = 0.5
DROP_IN_BUDGET = 1.06
BATCHING_BUDGET = 1.5
ROUNDS = 3


def rows() -> list[dict[str, Any]]:
    """Measure everything; one row for each budget."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        return [
            *_client_rows(directory),
            _drop_in_row(directory),
            _batching_row(directory),
        ]


def _measure(part: str, directory: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.serving_parts", part, str(directory)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{part}: {done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _client_rows(directory: Path) -> list[dict[str, Any]]:
    """Compare whole calls, and what of them is above a call without any bytes.

    The latter is gRPC's own and the same in both: it bounds what any client can win.
    """
    ours, empty, theirs = [], [], []
    for _ in range(ROUNDS):
        figures = _measure("client", directory)
        ours.append(figures["cpu_us"])
        empty.append(figures["empty_cpu_us"])
        theirs.append(_measure("tf_client", directory)["cpu_us"])
    # What else the machine does only ever adds: the least is the nearest to the truth.
    ours_us, empty_us, theirs_us = min(ours), min(empty), min(theirs)
    detail = (
        f"{ours_us:.0f} us against {theirs_us:.0f} us, a call of no bytes {empty_us:.0f} us; "
        "1x224x224x3 float, TLS, 1 connection"
    )
    what = "tdx-infer bench: client CPU per request / tf.make_tensor_proto client"
    whole = ours_us / theirs_us
    above = (ours_us - empty_us) / (theirs_us - empty_us)
    return [
        {
            "name": name,
            "measured": round(ratio, 3),
            "budget": CLIENT_BUDGET,
            "ok": ratio <= CLIENT_BUDGET,
            "detail": detail,
        }
        for name, ratio in ((what, whole), (f"{what}, above an empty call", above))
    ]


def _drop_in_row(directory: Path) -> dict[str, Any]:
    figures = _measure("drop_in", directory)
    ratio = figures["served_ms"] / figures["in_process_ms"]
    return {
        "name": "tdx-model-server on ResNet50, p50 / concrete function in process",
        "measured": round(ratio, 3),
        "budget": DROP_IN_BUDGET,
        "ok": ratio <= DROP_IN_BUDGET,
        "detail": (
            f"{figures['served_ms']:.1f} ms against {figures['in_process_ms']:.1f} ms, "
            "batch 1, unix socket"
        ),
    }


def _batching_row(directory: Path) -> dict[str, Any]:
    figures = _measure("batching", directory)
    ratio = figures["batched"] / figures["single"]
    return {
        "name": "tdx-model-server on ResNet50, images/s in batches / one at a time",
        "measured": round(ratio, 3),
        "budget": BATCHING_BUDGET,
        "ok": ratio >= BATCHING_BUDGET,
        "detail": (
            f"{figures['batched']:.1f} against {figures['single']:.1f} images/s, 8 clients, "
            "1 image in each request; without batching but as many at once as CPUs: "
            f"{figures['default']:.1f}"
        ),
    }


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(json.dumps(row) + "\n")
