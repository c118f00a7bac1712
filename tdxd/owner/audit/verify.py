"""Verifies a store: its audit chain, its seal, the rows under the seal, and a checkpoint.

Everything is read in one snapshot, so a server may go on writing meanwhile. Every trouble names the
record or the row, and what is wrong with it.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator

from tdxd.errors import DataError
from tdxd.owner.audit.checkpoint import Checkpoint
from tdxd.owner.audit.checkpoint_compare import ROLLBACK, behind_checkpoint
from tdxd.owner.audit.quota import quota_troubles
from tdxd.owner.audit.record import GENESIS, AuditRecord, chain_hash, parse_record
from tdxd.owner.store.check import row_troubles
from tdxd.owner.store.database import schema_troubles
from tdxd.owner.store.key import StoreKey
from tdxd.owner.store.seal import Seal, SealedState, StoreIntegrityError
from tdxd.owner.store.state import State
from tdxd.owner.store.store import Store

__all__ = ["Verified", "verify"]

_ROLLBACK_BYTES = ROLLBACK.encode()
_CHAIN = "SELECT seq, record, hash, denial_id FROM audit ORDER BY seq"
_SHOWN_MAX = 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The outcome: `troubles` is empty if everything is as tdx-keyd left it.

    `behind` are those of the troubles that a restored backup explains: the store is whole, and
    older than the checkpoint.
    """

    records: int
    seal: Seal
    troubles: tuple[str, ...]
    behind: tuple[str, ...] = ()


def verify(
    store: Store,
    checkpoint: Checkpoint | None = None,
    *,
    deployment: bytes,
    thorough: bool = True,
    authenticated: bool = True,
) -> Verified:
    """Verify a store, against a checkpoint if there is one.

    Where the key-encryption key is not at hand (`authenticated` false), what is compared is less:
    the chain with its head, and the state with its digest.

    Unless it is thorough, records are hashed and not decoded, which takes a tenth of the time: what
    is left out are columns and rows that no decision rests on (denial ids, used quotas).

    Raises: ConfigError, BusyError, HostError.
    """
    key = store.key() if authenticated else None
    with store.reading() as sqlite:
        chain = _Chain(thorough=thorough)
        troubles = [*schema_troubles(sqlite), *_few(chain.follow(sqlite))]
        seal, state, found = _sealed(sqlite, key)
        troubles += found
        if seal is not None:
            troubles += chain.ends(seal)
        if state is not None and key is not None:
            troubles += _few(row_troubles(sqlite, key, state))
        if thorough:
            troubles += _few(quota_troubles(sqlite))
        behind = []
        if checkpoint is not None and seal is not None and state is not None:
            behind = list(
                behind_checkpoint(
                    sqlite, checkpoint, seal, state, chain.rollbacks, deployment
                )
            )
    return Verified(
        records=chain.records,
        seal=seal or Seal(),
        troubles=(*troubles, *behind),
        behind=tuple(behind),
    )


class _Chain:
    """Follows the chain, and remembers what the rest of the verification asks for."""

    def __init__(self, *, thorough: bool) -> None:
        self._thorough = thorough
        self.records = 0
        self.rollbacks: list[AuditRecord] = []
        self._seq = 0
        self._hash = GENESIS

    def follow(self, sqlite: sqlite3.Connection) -> Iterator[str]:
        for seq, data, found, denial_id in sqlite.execute(_CHAIN):
            self.records += 1
            before, self._seq = self._seq, seq
            trouble = self._one(seq, data, found, denial_id, before)
            self._hash = found if isinstance(found, bytes) else b""
            if trouble:
                yield trouble

    def _one(
        self, seq: int, data: object, found: object, denial_id: object, before: int
    ) -> str:
        what = f"audit record {seq}"
        if not isinstance(data, bytes) or not isinstance(found, bytes):
            return f"{what} was edited: it is no record"
        follows = chain_hash(self._hash, data) == found
        gap = seq != before + 1
        if gap and not (follows and _is_rollback(data)):
            return _missing(before + 1, seq - 1)
        if not follows:
            return (
                f"{what} was edited, put in or moved here: its hash does not follow from the "
                "record before it"
            )
        if self._thorough or gap or _ROLLBACK_BYTES in data:
            return self._record(data, seq, denial_id)
        return ""

    def _record(self, data: bytes, seq: int, denial_id: object) -> str:
        try:
            record = parse_record(data, source=f"audit record {seq}")
        except DataError as exc:
            return exc.message
        if record.seq != seq or record.denial_id != denial_id:
            return f"audit record {seq} stands under another number or denial id"
        if record.decision == ROLLBACK:
            self.rollbacks.append(record)
        return ""

    def ends(self, seal: Seal) -> Iterator[str]:
        """Compare the end of the chain with the sealed head."""
        if self._seq < seal.seq:
            yield f"{_missing(self._seq + 1, seal.seq)}: the log was cut at its end"
        elif self._seq > seal.seq:
            yield (
                f"audit records {seal.seq + 1} to {self._seq} were put in after the sealed "
                "end of the log"
            )
        elif self._hash != seal.head:
            yield f"audit record {seal.seq} is another one than the sealed end of the log"


def _is_rollback(data: bytes) -> bool:
    try:
        return parse_record(data, source="record").decision == ROLLBACK
    except DataError:
        return False


def _missing(first: int, last: int) -> str:
    if first == last:
        return f"audit record {first} is missing"
    return f"audit records {first} to {last} are missing"


def _sealed(
    sqlite: sqlite3.Connection, key: StoreKey | None
) -> tuple[Seal | None, State | None, list[str]]:
    sealed = SealedState(sqlite)
    try:
        seal = sealed.read(key)
    except StoreIntegrityError as exc:
        return None, None, [exc.message]
    try:
        return seal, sealed.state(seal), []
    except StoreIntegrityError as exc:
        return seal, None, [exc.message]


def _few(troubles: Iterator[str]) -> Iterator[str]:
    """Shorten a list of troubles; looks at all of them nevertheless."""
    count = 0
    for text in troubles:
        count += 1
        if count <= _SHOWN_MAX:
            yield text
    if count > _SHOWN_MAX:
        yield f"and {count - _SHOWN_MAX} more of this kind"
