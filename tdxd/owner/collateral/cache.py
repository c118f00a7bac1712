"""Collateral that may be used: every check of a set, and the cache of sets that passed them.

The rules, as docs/threats.md states them: a set is used from its issue until its first nextUpdate
and never after; while its source cannot be reached, or offers nothing better, an unexpired set is
used on; a set that fails a check replaces nothing, is not kept, and raises no floor.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from tdxd.errors import DataError, HostError, UnavailableError
from tdxd.owner.collateral.bundle import CollateralSet
from tdxd.owner.collateral.examine import (
    COLLATERAL_REASONS,
    SetRules,
    examine,
    refusal,
)
from tdxd.owner.collateral.files import CollateralFiles, Problem
from tdxd.owner.collateral.floors import Floors, floor_values
from tdxd.owner.collateral.prepared import Prepared, prepare
from tdxd.owner.collateral.verify import Trust

__all__ = [
    "COLLATERAL_REASONS",
    "CollateralCache",
    "FetchCollateral",
    "Prepared",
    "SetRules",
    "Trust",
    "examine",
    "prepare",
    "refusal",
]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_CACHE_MAX = 64
_FETCHES_MAX = 2
"""At once; further questions are answered from the cache or not now: anybody may ask."""
_RETRY_S = 30
"""After a failure, the same question is not asked again for this long."""
_LOOK_S = 60
"""So often a cached set is compared with the disk and the floors, which others may have changed."""

FetchCollateral = Callable[[str, str], str]
"""Fetches a set as JSON, by FMSPC (12 upper-case hex digits) and CA ("platform", "processor")."""
_Key = tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    prepared: Prepared
    fetched_s: float
    looked_s: float
    stamp: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Failure:
    """An attempt that brought nothing: an error, or a set that was `refused`."""

    at_s: float
    error: UnavailableError
    refused: Prepared | None = None


class CollateralCache:
    """The sets of one root; safe to use from several threads, beside other processes.

    `fetch` None stands for offline: sets come from `files` only. A newer set is looked for every
    `refresh_s`. One fetch at a time for a question; an answer that is there never waits for one.
    """

    def __init__(
        self,
        fetch: FetchCollateral | None,
        *,
        trust: Trust,
        floors: Floors,
        files: CollateralFiles,
        rules: SetRules,
        refresh_s: float,
        source: str,
        patience_s: float = 20.0,
    ) -> None:
        self._fetch = fetch
        self._trust = trust
        self._floors = floors
        self._files = files
        self._rules = rules
        self._refresh_s = refresh_s
        self._source = source
        self._patience_s = patience_s
        self._entries: dict[_Key, _Entry] = {}
        self._failures: dict[_Key, _Failure] = {}
        self._busy: set[_Key] = set()
        self._turn = threading.Condition()

    def get(self, fmspc: str, ca: str, now_s: float) -> Prepared:
        """Return a set that may be used, or one that was refused, with its failed checks.

        Raises: UnavailableError where there is none at all; HostError, BusyError.
        """
        key = (fmspc, ca)
        entry = self._current(key, now_s)
        if entry is not None and (
            self._fresh(entry, now_s) or self._failed_lately(key, now_s)
        ):
            return entry.prepared
        if not self._claim(key, wait=entry is None):
            assert entry is not None
            return entry.prepared
        try:
            return self._renewed(key, now_s)
        finally:
            with self._turn:
                self._busy.discard(key)
                self._turn.notify_all()

    def check(self, one: CollateralSet, now_s: float) -> Prepared:
        """Return a set from elsewhere with its checks; nothing is kept.

        Raises: DataError, HostError, BusyError.
        """
        return self._examine(prepare(one.text()), (one.fmspc, one.ca), now_s)

    def accept(self, one: CollateralSet, now_s: float) -> Prepared:
        """Take in a set from elsewhere if it passes every check: raise floors, write it to disk.

        Returns the set with its checks, whether it was taken or not.

        Raises: DataError, HostError, BusyError.
        """
        prepared = self.check(one, now_s)
        if prepared.ok:
            self._raise_floors(prepared, one.ca)
            # What is kept is what was checked: no other fields, the chains encoded anew.
            self._files.write(
                dataclasses.replace(one, collateral=dict(prepared.fields))
            )
        return prepared

    # --- what is there --------------------------------------------------------

    def _current(self, key: _Key, now_s: float) -> _Entry | None:
        """Return the set in memory or on disk that may be used now."""
        entry = self._entries.get(key)
        if entry is None or not 0 <= now_s - entry.looked_s < _LOOK_S:
            entry = self._look(key, entry, now_s)
        if entry is None:
            return None
        in_time = entry.prepared.issued_s <= now_s < entry.prepared.expires_s
        return entry if in_time else None

    def _look(self, key: _Key, entry: _Entry | None, now_s: float) -> _Entry | None:
        """Compare with the disk, where another process may have put a newer set, and the floors."""
        stamp = self._files.stamp(*key)
        found = None
        if stamp and (entry is None or stamp != entry.stamp):
            found = self._load(key, now_s, stamp)
        if found is None and entry is not None:
            again = self._examine(entry.prepared, key, now_s)
            found = dataclasses.replace(entry, prepared=again, looked_s=now_s)
        if found is None or not found.prepared.ok:
            self._drop(self._entries, key)
            return None
        self._keep(self._entries, key, found)
        return found

    def _load(self, key: _Key, now_s: float, stamp: int) -> _Entry | None:
        try:
            one = self._files.read(*key)
            if one is None:
                return None
            prepared = self._examine(prepare(one.text()), key, now_s)
        except (DataError, HostError) as exc:
            _log.warning("collateral.file_ignored", error=exc.message)
            return None
        if not prepared.ok:
            return None
        self._raise_floors(prepared, key[1])
        return _Entry(
            prepared=prepared, fetched_s=one.fetched_s, looked_s=now_s, stamp=stamp
        )

    def _fresh(self, entry: _Entry, now_s: float) -> bool:
        return self._fetch is None or 0 <= now_s - entry.fetched_s < self._refresh_s

    def _failed_lately(self, key: _Key, now_s: float) -> bool:
        failure = self._failures.get(key)
        return failure is not None and 0 <= now_s - failure.at_s < _RETRY_S

    def _examine(self, prepared: Prepared, key: _Key, now_s: float) -> Prepared:
        return examine(
            prepared,
            trust=self._trust,
            fmspc=key[0],
            ca=key[1],
            now_s=now_s,
            rules=self._rules,
            floors=self._floors.get(),
        )

    def _raise_floors(self, prepared: Prepared, ca: str) -> None:
        self._floors.raise_to(floor_values(prepared, self._trust.key_sha384, ca))

    # --- fetching -------------------------------------------------------------

    def _claim(self, key: _Key, *, wait: bool) -> bool:
        """Become the one who fetches; False if somebody else is and `wait` is not set."""
        stop_s = time.monotonic() + self._patience_s
        with self._turn:
            while key in self._busy:
                left_s = stop_s - time.monotonic()
                if not wait:
                    return False
                if left_s <= 0 or not self._turn.wait(left_s):
                    raise UnavailableError(f"collateral for {key[0]} takes too long")
            if len(self._busy) >= _FETCHES_MAX:
                if not wait:
                    return False
                raise UnavailableError(
                    f"collateral for {key[0]}: {_FETCHES_MAX} others are being fetched"
                )
            self._busy.add(key)
            return True

    def _renewed(self, key: _Key, now_s: float) -> Prepared:
        entry = self._current(key, now_s)
        if entry is not None and self._fresh(entry, now_s):
            return entry.prepared  # somebody else has fetched it meanwhile
        failure = self._failures.get(key)
        if failure is None or not self._failed_lately(key, now_s):
            got = self._try_fetch(key, now_s)
            if isinstance(got, Prepared):
                return got
            failure = got
            self._keep(self._failures, key, failure)
            self._note(key, failure)
        if entry is not None:
            return entry.prepared
        if failure.refused is not None:
            return failure.refused
        raise failure.error

    def _try_fetch(self, key: _Key, now_s: float) -> Prepared | _Failure:
        """Fetch, check and keep a set."""
        began_s = time.monotonic()
        try:
            if self._fetch is None:
                raise UnavailableError(
                    f"collateral for {key[0]} ({key[1]}): none was imported that is valid",
                    hint="tdx-keyd collateral import; [collateral] says offline = true",
                )
            prepared = prepare(self._fetch(*key))
        except (UnavailableError, DataError) as exc:
            error = UnavailableError(exc.message, hint=exc.hint)
            return _Failure(at_s=now_s, error=error)
        at_s = now_s + time.monotonic() - began_s  # it may be younger than the question
        prepared = self._examine(prepared, key, at_s)
        if not prepared.ok:
            return _Failure(
                at_s=now_s, error=refusal(key[0], key[1], prepared), refused=prepared
            )
        self._raise_floors(prepared, key[1])
        stamp = self._save(key, prepared, at_s)
        entry = _Entry(prepared=prepared, fetched_s=now_s, looked_s=now_s, stamp=stamp)
        self._keep(self._entries, key, entry)
        self._drop(self._failures, key)
        _log.info("collateral.renewed", fmspc=key[0], ca=key[1], source=self._source)
        return prepared

    def _save(self, key: _Key, prepared: Prepared, at_s: float) -> int:
        one = CollateralSet(
            root=self._trust.key_sha384,
            fmspc=key[0],
            ca=key[1],
            source=self._source,
            fetched_s=int(at_s),
            collateral=dict(prepared.fields),
        )
        try:
            self._files.write(one)
        except HostError as exc:  # it serves from memory until the next start
            _log.warning("collateral.not_saved", error=exc.message)
        return self._files.stamp(*key)

    def _note(self, key: _Key, failure: _Failure) -> None:
        """Say in the log and for `collateral status` why there is no newer set."""
        fmspc, ca = key
        message, hint = failure.error.message, failure.error.hint
        _log.warning("collateral.failed", fmspc=fmspc, ca=ca, error=message, hint=hint)
        problem = Problem(
            fmspc=fmspc, ca=ca, at_s=int(failure.at_s), message=message, hint=hint
        )
        try:
            self._files.note_problem(problem)
        except HostError as exc:
            _log.warning("collateral.not_saved", error=exc.message)

    def _drop(self, cache: dict[_Key, Any], key: _Key) -> None:
        with self._turn:
            cache.pop(key, None)

    def _keep(self, cache: dict[_Key, Any], key: _Key, value: Any) -> None:
        """Add to a cache of bounded size: a PCK of any family may ask."""
        with self._turn:
            cache.pop(key, None)
            while len(cache) >= _CACHE_MAX:
                del cache[next(iter(cache))]
            cache[key] = value
