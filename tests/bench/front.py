"""What the front adds to a model server's own gRPC: TLS, HTTP/2 twice, and HAProxy between them.

One server, ResNet50; one client takes turns between the front and the server's own plain port. The
size of a request counts as much as the number of images: 600 KB each, encrypted on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import trio

from tdxd.core.config import ServingConfig
from tdxd.host import proc, tf_messages
from tdxd.user.infer import Model, encode_request
from tests.contract.fronts import front_of
from tests.fakes import fake_host
from tests.model_server.running import running_server
from tests.system.world import free_port

__all__ = ["make_model", "rows"]

BUDGET = 1.03
_ROUNDS = {1: 150, 8: 40}
"""Pairs of requests by their number of images: about 20 s each."""
_WARM_UP = 5
_TIMEOUT_S = 120.0
_ROOT = Path(__file__).parents[2]

Call = Callable[[bytes], bytes]


def rows() -> list[dict[str, Any]]:
    """Return a row for each size of a request.

    Raises: RuntimeError if no model can be made.
    """
    if os.geteuid() != 0:
        raise RuntimeError("the front runs under another user: needs uid 0")
    with tempfile.TemporaryDirectory() as name, _runtime() as runtime:
        base_path = make_model(Path(name))
        figures = trio.run(_serve_and_measure, runtime, base_path)
    return [_row(batch, one) for batch, one in figures.items()]


def make_model(directory: Path) -> Path:
    """Make ResNet50 in a process of its own, which imports TensorFlow; return its base path.

    Raises: RuntimeError.
    """
    command = [sys.executable, "-m", "tests.bench.serving_parts", "resnet"]
    done = subprocess.run(
        [*command, str(directory)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"no model: {done.stderr[-2000:]}")
    return directory / "resnet"


@contextlib.contextmanager
def _runtime() -> Iterator[Path]:
    """Make a directory as the daemon has one, which the front's user can reach."""
    runtime = Path("/run") / f"tdxd-bench-{os.getpid()}"
    for slot in ("a", "b"):
        (runtime / "serve" / slot).mkdir(parents=True)
    try:
        yield runtime
    finally:
        shutil.rmtree(runtime)


async def _serve_and_measure(
    runtime: Path, base_path: Path
) -> dict[int, list[tuple[float, float]]]:
    children = proc.CellChildren()
    host = dataclasses.replace(fake_host(), children=children)
    port, place = free_port(), runtime / "serve" / "a"
    flags = (f"--port={port}", "--model_name=resnet", f"--model_base_path={base_path}")
    try:
        with running_server(place, *flags) as server:
            await trio.to_thread.run_sync(
                server.wait_for, "Running gRPC ModelServer at"
            )
            server.socket.chmod(0o777)
            (place / "model.sock").symlink_to(server.socket.name)
            config = ServingConfig(user="nobody", drain_timeout_s=1)
            async with front_of(host, runtime, config) as running:
                plain = grpc.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS)
                with running.channel() as front, plain:
                    return await trio.to_thread.run_sync(
                        _measure, _call(front), _call(plain)
                    )
    finally:
        children.close()


_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def _call(channel: grpc.Channel) -> Call:
    stub: Any = channel.unary_unary(tf_messages.PREDICT_METHOD)
    return lambda request: stub(request, timeout=_TIMEOUT_S)


def _measure(front: Call, plain: Call) -> dict[int, list[tuple[float, float]]]:
    """Return the times of pairs of requests, in ms: through the front and without."""
    return {
        batch: _pairs(front, plain, _request(batch), rounds)
        for batch, rounds in _ROUNDS.items()
    }


def _request(batch: int) -> bytes:
    images = np.random.default_rng(1).random((batch, 224, 224, 3), np.float32)
    return encode_request(Model(name="resnet"), {"input": images})


def _pairs(
    front: Call, plain: Call, request: bytes, rounds: int
) -> list[tuple[float, float]]:
    """Call both in turn, each first in every other pair."""
    found = []
    for turn in range(rounds + _WARM_UP):
        ways = (("front", front), ("plain", plain))
        times_ms = {
            name: _ms(call, request)
            for name, call in (ways if turn % 2 else ways[::-1])
        }
        if turn >= _WARM_UP:
            found.append((times_ms["front"], times_ms["plain"]))
    return found


def _ms(call: Call, request: bytes) -> float:
    started_s = time.perf_counter()
    call(request)
    return (time.perf_counter() - started_s) * 1000


def _row(batch: int, pairs: list[tuple[float, float]]) -> dict[str, Any]:
    front_ms = statistics.median(front for front, _ in pairs)
    plain_ms = statistics.median(plain for _, plain in pairs)
    added_ms = statistics.median(front - plain for front, plain in pairs)
    quarters = statistics.quantiles((front / plain for front, plain in pairs), n=4)
    ratio = front_ms / plain_ms
    return {
        "name": f"front on ResNet50, batch {batch}, p50 / plain gRPC of the same server",
        "measured": round(ratio, 3),
        "budget": BUDGET,
        "ok": ratio <= BUDGET,
        "detail": (
            f"{front_ms:.1f} ms against {plain_ms:.1f} ms; median of the differences "
            f"{added_ms:.2f} ms; half of the ratios of {len(pairs)} pairs lie in "
            f"{quarters[0]:.2f} to {quarters[2]:.2f}"
        ),
    }


if __name__ == "__main__":
    for row in rows():
        print(row)
