"""Metrics of the key server: each worker counts, the parent adds up and shows.

A worker tells its counts to the parent in lines of JSON, so that one address shows all workers, and
no count is lost with one that ends. Labels are words of ours and platforms whose collateral Intel
signed: nothing that a stranger sent, no volume ids among them.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from tdxd import __version__
from tdxd.core.exposition import Family, Histogram, text
from tdxd.errors import DataError
from tdxd.host.process_stat import process_families
from tdxd.owner.audit.record import AuditRecord
from tdxd.owner.server.limits import Kind

__all__ = ["CollateralSeen", "Tally", "Totals"]

_BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_RELEASED = "released"
_DENIED = "denied"
_OK = "OK"
_CODES = (
    _OK,
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
)
"""What a call may end with."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CollateralSeen:
    """A set that was used of late; times are unix seconds."""

    root: str
    fmspc: str
    ca: str
    issued_s: int
    expires_s: int


class Tally:
    """What one worker counted; safe to use from several threads."""

    def __init__(self) -> None:
        self.calls = collections.Counter(
            {(kind.value, code): 0 for kind in Kind for code in _CODES}
        )
        """By method and gRPC status."""
        self.decisions: collections.Counter[tuple[str, str]] = collections.Counter()
        """By decision and reason."""
        self.durations_s = {kind.value: Histogram(_BOUNDS_S) for kind in Kind}
        self.collateral: Callable[[], Sequence[CollateralSeen]] = tuple
        self._lock = threading.Lock()

    def ended(self, kind: Kind, code: str, took_s: float) -> None:
        """Count a call; only one that was answered has a duration."""
        with self._lock:
            self.calls[kind.value, code] += 1
            if code == _OK:
                self.durations_s[kind.value].observe(took_s)

    def expect(self, reasons: Iterable[str]) -> None:
        """Show these reasons for a denial also while there is none, so that the first is seen."""
        with self._lock:
            self.decisions.update({(_DENIED, one): 0 for one in reasons})

    def decided(self, records: Iterable[AuditRecord]) -> None:
        """Count decisions as they were recorded."""
        with self._lock:
            for one in records:
                self.decisions[one.decision, one.reason] += 1

    def line(self) -> bytes:
        """Return all as one line of JSON."""
        seen = [dataclasses.asdict(one) for one in self.collateral()]
        with self._lock:
            told = {
                "calls": [[*key, count] for key, count in self.calls.items()],
                "decisions": [[*key, count] for key, count in self.decisions.items()],
                "durations": [
                    [kind, one.counts, one.sum]
                    for kind, one in self.durations_s.items()
                ],
                "collateral": seen,
            }
        return json.dumps(told).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Self:
        """Return what `line` told.

        Raises: DataError.
        """
        try:
            return cls._made_of(json.loads(line))
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise DataError(f"counts of a worker: {line[:80]!r} are none") from exc

    @classmethod
    def _made_of(cls, told: dict[str, Any]) -> Self:
        made = cls()
        made.calls.update({(kind, code): int(n) for kind, code, n in told["calls"]})
        for decision, reason, count in told["decisions"]:
            made.decisions[decision, reason] = int(count)
        for kind, counts, total in told["durations"]:
            if len(counts) != len(_BOUNDS_S) + 1:
                raise ValueError(f"{len(counts)} buckets")
            made.durations_s[kind] = Histogram(
                _BOUNDS_S, [int(one) for one in counts], float(total)
            )
        seen = [CollateralSeen(**one) for one in told["collateral"]]
        made.collateral = lambda: seen
        return made

    def add(self, other: Tally) -> None:
        """Take in the counts of another one."""
        self.calls.update(other.calls)
        self.decisions.update(other.decisions)
        for kind, one in other.durations_s.items():
            mine = self.durations_s[kind]
            mine.counts = [a + b for a, b in zip(mine.counts, one.counts, strict=True)]
            mine.sum += one.sum


class Totals:
    """The counts of all workers, those that have ended among them; safe from several threads."""

    def __init__(self) -> None:
        self.restarts = 0
        """Workers that ended by themselves."""
        self._gone = Tally()
        self._by_worker: dict[int, Tally] = {}
        self._lock = threading.Lock()

    def hear(self, pid: int, line: bytes) -> None:
        """Take in what a worker told.

        Raises: DataError.
        """
        tally = Tally.parse(line)
        with self._lock:
            self._by_worker[pid] = tally

    def forget(self, pid: int) -> None:
        """Keep the counts of a worker that has ended."""
        with self._lock:
            self._gone.add(self._by_worker.pop(pid, Tally()))

    def text(self) -> str:
        """Return everything in Prometheus' text format."""
        whole = Tally()
        seen: list[CollateralSeen] = []
        with self._lock:
            for one in (self._gone, *self._by_worker.values()):
                whole.add(one)
                seen += one.collateral()
            restarts = self.restarts
        build = Family("tdx_keyd_build_info", "gauge", "1; the version is a label.")
        build.add(1, version=__version__)
        ended = Family(
            "tdx_keyd_worker_restarts_total",
            "counter",
            "Workers that ended by themselves.",
        )
        ended.add(restarts)
        return text(
            [
                build,
                ended,
                *_decisions(whole),
                *_calls(whole),
                *_collateral(seen),
                *process_families(),
            ]
        )


def _decisions(whole: Tally) -> list[Family]:
    releases = Family(
        "tdx_keyd_releases_total",
        "counter",
        "Releases of a volume's key, each in the audit log.",
    )
    releases.add(whole.decisions[_RELEASED, ""])
    denials = Family(
        "tdx_keyd_denials_total", "counter", "Denials by reason, each in the audit log."
    )
    for (decision, reason), count in sorted(whole.decisions.items()):
        if decision != _RELEASED:
            denials.add(count, reason=reason)
    return [releases, denials]


def _calls(whole: Tally) -> list[Family]:
    calls = Family(
        "tdx_keyd_calls_total", "counter", "Calls by method and gRPC status."
    )
    took = Family(
        "tdx_keyd_call_duration_seconds",
        "histogram",
        "Time of an answered call, its request's arrival included.",
    )
    for (method, code), count in sorted(whole.calls.items()):
        calls.add(count, method=method, code=code)
    for method, durations in whole.durations_s.items():
        took.add_histogram(durations, method=method)
    return [calls, took]


def _collateral(seen: Iterable[CollateralSeen]) -> list[Family]:
    """Show the newest set of each platform: what one worker has, the others find on disk."""
    newest: dict[tuple[str, str, str], CollateralSeen] = {}
    for one in sorted(seen, key=lambda item: (item.expires_s, item.issued_s)):
        newest[one.root, one.fmspc, one.ca] = one
    issued = Family(
        "tdx_keyd_collateral_issued_timestamp_seconds",
        "gauge",
        "When the youngest part of a set used within a day was issued, unix time.",
    )
    expires = Family(
        "tdx_keyd_collateral_expiry_timestamp_seconds",
        "gauge",
        "When the first part of a set used within a day expires, unix time.",
    )
    for (root, fmspc, ca), one in sorted(newest.items()):
        issued.add(one.issued_s, root=root, fmspc=fmspc, ca=ca)
        expires.add(one.expires_s, root=root, fmspc=fmspc, ca=ca)
    return [issued, expires]
