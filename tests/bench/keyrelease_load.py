"""Releases per second with one and two worker processes, and a worker's memory over many of them.

The load is one guest's request, sent again and again (a replay only seals to the same key): so the
client makes no quote for each. It runs on the same cores as the workers, keeps two calls in flight
on each of eight connections, and tells its own processor time. The store lies in memory. One and
two workers alternate, and the ratio is the median of the pairs.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdxd.core import keyrelease as protocol
from tests.bench.http2_load import Load
from tests.bench.measure import rss_bytes
from tests.bench.release_parts import (
    Client,
    Server,
    configure,
    key_server,
    memory_directory,
)
from tests.keyserver import Owner, opened_owner

__all__ = ["rows"]

_SHARE = float(os.environ.get("TDXD_BENCH_SHARE", "1"))
"""Of the full numbers; for trying out."""
_PAIRS = max(1, round(5 * _SHARE))
_CALLS = round(2000 * _SHARE)
_FEW, _MANY = round(1000 * _SHARE), round(10_000 * _SHARE)
_CONNECTIONS = 8
_STREAMS = 2


def rows() -> list[dict[str, Any]]:
    """Measure throughput and memory."""
    with (
        tempfile.TemporaryDirectory(dir=memory_directory()) as name,
        opened_owner(Path(name)) as owner,
    ):
        owner.add("v")
        return [*_throughput(owner), _memory(owner)]


@contextmanager
def _loaded(owner: Owner, workers: int) -> Iterator[tuple[Server, Load, Client]]:
    configure(owner, workers)
    with key_server(owner) as server:
        client = Client(owner, server)
        client.release()
        load = Load(
            server.address,
            owner.directory / "ca.pem",
            protocol.RELEASE_PATH,
            connections=_CONNECTIONS,
            streams=_STREAMS,
        )
        with load:
            yield server, load, client


def _run(owner: Owner, load: Load, client: Client, calls: int) -> float:
    """Make some releases, all of them good ones; return the wall time."""
    before = _released(owner)
    wall_s = load.run(client.asked(), calls=calls)
    made = _released(owner) - before
    if made != calls:
        raise RuntimeError(f"{made} of {calls} releases were made")
    return wall_s


def _released(owner: Owner) -> int:
    (newest,) = owner.store.audit(limit=1)
    if newest.decision != "released":
        raise RuntimeError(f"release was denied: {newest.reason}")
    return newest.seq


def _throughput(owner: Owner) -> list[dict[str, Any]]:
    seen = []
    shares = []
    for _ in range(_PAIRS):
        rates = []
        for workers in (1, 2):
            with _loaded(owner, workers) as (server, load, client):
                _run(owner, load, client, max(200, _CALLS // 4))
                mine_s, theirs_s = time.process_time(), server.cpu_s()
                wall_s = _run(owner, load, client, _CALLS)
                rates.append(_CALLS / wall_s)
                shares.append(
                    (time.process_time() - mine_s) / (server.cpu_s() - theirs_s)
                )
        seen.append(rates)
    one, two = (statistics.median(rates[index] for rates in seen) for index in (0, 1))
    ratio = statistics.median(rates[1] / rates[0] for rates in seen)
    detail = (
        f"{_CALLS} replayed releases, {_CONNECTIONS} connections with {_STREAMS} calls each; "
        f"the client's own processor time is {statistics.median(shares):.0%} of the workers'; "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; median of {_PAIRS} pairs"
    )
    plain = {"budget": None, "ok": None, "detail": detail}
    return [
        {"name": "tdx-keyd: releases/s, 1 worker", "measured": round(one), **plain},
        {"name": "tdx-keyd: releases/s, 2 workers", "measured": round(two), **plain},
        {
            "name": "tdx-keyd: releases/s, 2 workers / 1 worker",
            "measured": round(ratio, 2),
            "budget": 1.8,
            "ok": ratio >= 1.8,
            "detail": detail,
        },
    ]


def _memory(owner: Owner) -> dict[str, Any]:
    with _loaded(owner, 1) as (server, load, client):
        (pid,) = server.pids
        _run(owner, load, client, _FEW)
        few = rss_bytes(pid)
        done = _FEW
        while done < _MANY:  # a token lives for a minute
            _run(owner, load, client, min(_CALLS, _MANY - done))
            done += min(_CALLS, _MANY - done)
        many = rss_bytes(pid)
    ratio = many / few
    return {
        "name": f"tdx-keyd: RSS of a worker after {_MANY} releases / after {_FEW}",
        "measured": round(ratio, 3),
        "budget": 1.05,
        "ok": 0.95 <= ratio <= 1.05,
        "detail": f"{few / 2**20:.1f} MiB, then {many / 2**20:.1f} MiB",
    }
