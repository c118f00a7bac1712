"""Processor time that the key server spends on one release, on a warm channel.

Compared with what cannot be saved: one dcap-qvl policy verification (claims read, as they must be)
and two empty calls to a server that is started the same way. Blocks of the three alternate, and
all three keep the guest's rhythm: between any two calls a quote is made, so that none of them finds
its caches warmer than the others do. The store lies in memory: what a disk costs is the disk's.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dcap_qvl

from tdxd.core import keyrelease as protocol
from tdxd.owner.collateral.cache import prepare
from tests.bench.release_parts import (
    Client,
    configure,
    cpu_per_call,
    empty_server,
    key_server,
    memory_directory,
)
from tests.keyserver import Owner, opened_owner

__all__ = ["rows"]

_PAIRS = int(os.environ.get("TDXD_BENCH_PAIRS", "15"))
_BLOCK = 60
_WARM_UP = 100


def rows() -> list[dict[str, Any]]:
    """Measure the budget of key release."""
    with (
        tempfile.TemporaryDirectory(dir=memory_directory()) as name,
        opened_owner(Path(name)) as owner,
    ):
        owner.add("v")
        configure(owner)
        return _rows(owner)


def _rows(owner: Owner) -> list[dict[str, Any]]:
    with key_server(owner) as released, empty_server(owner) as nothing:
        client, idle = Client(owner, released), Client(owner, nothing)
        verify = _verification(owner, client)
        for warm in (client.release, idle.empty, verify):
            for _ in range(_WARM_UP):
                warm()
        client.wall_s.clear()
        seen = []
        for _ in range(_PAIRS):
            one = cpu_per_call(client.release, _BLOCK, released)
            two = cpu_per_call(idle.empty, _BLOCK, nothing)
            three = sum(verify() for _ in range(_BLOCK)) / _BLOCK
            seen.append((one, two, three))
        return [_cpu_row(seen), *_wall_rows(client.wall_s)]


def _cpu_row(seen: list[tuple[float, float, float]]) -> dict[str, Any]:
    ratio = statistics.median(one / (two + three) for one, two, three in seen)
    release_ms, empty_ms, verify_ms = (
        1e3 * statistics.median(item[index] for item in seen) for index in range(3)
    )
    return {
        "name": "tdx-keyd: server CPU per release / (verification + two empty calls)",
        "measured": round(ratio, 3),
        "budget": 1.3,
        "ok": ratio <= 1.3,
        "detail": (
            f"release {release_ms:.2f} ms of processor time; verification {verify_ms:.2f}, "
            f"two empty calls {empty_ms:.2f}; {len(seen)} rounds of {_BLOCK}"
        ),
    }


def _wall_rows(wall_s: list[float]) -> list[dict[str, Any]]:
    """Wall time as the guest sees it on loopback: a figure to publish, with no budget."""
    ordered = sorted(1e3 * value for value in wall_s)
    return [
        {
            "name": f"tdx-keyd: wall time of a release at the guest, {title}, ms",
            "measured": round(
                ordered[min(len(ordered) - 1, len(ordered) * part // 100)], 2
            ),
            "budget": None,
            "ok": None,
            "detail": f"both calls on a warm channel, quoting apart; {len(ordered)} releases",
        }
        for title, part in (("p50", 50), ("p99", 99))
    ]


def _verification(owner: Owner, client: Client) -> Callable[[], float]:
    """Return a function that says what one verification cost, all else prepared."""
    now_s = int(owner.now_s())
    parsed = prepare(owner.platform.collateral_json(now_s)).parsed
    quote = owner.platform.quote(bytes(64))
    verifier = dcap_qvl.QuoteVerifier(owner.platform.root_der)
    policy = (
        dcap_qvl.QuotePolicy.strict(now_s)
        .allow_dynamic_platform(True)
        .allow_smt(True)
        .allow_cached_keys(True)
    )

    def verify() -> float:
        client.request(bytes(protocol.TOKEN_BYTES))
        start_s = time.thread_time()
        json.loads(verifier.verify_with_policy(quote, parsed, now_s, policy).to_json())
        return time.thread_time() - start_s

    return verify
