"""The seal: one row that ties the state of a store to the newest record of its audit log.

    mac = HMAC("seal", revision, seq, head, SHA-256(state), exported_revision, exported_seq,
               exported_at)

Every transaction writes it anew. So whoever writes to the database without the key-encryption key
can change no row, put back no older row, and cut or recompute no part of the log without breaking
it; what is left is to put back the whole database as it once was. A running server notices that by
itself, a starting one by the newest checkpoint, which lies elsewhere (`checkpoint`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import sqlite3
from collections.abc import Sequence
from typing import Any, Self

from tdxd.errors import ConfigError, DataError
from tdxd.owner.audit.record import GENESIS
from tdxd.owner.store.key import StoreKey
from tdxd.owner.store.state import State

__all__ = [
    "Seal",
    "SealNotAuthenticError",
    "SealedState",
    "StoreIntegrityError",
    "is_sealed_with",
]

_SEAL = (
    "SELECT id, revision, seq, head, state_sha256, "
    "exported_revision, exported_seq, exported_at_s, mac FROM seal"
)
_WRITE_SEAL = "INSERT OR REPLACE INTO seal VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?)"
_HASH = "SELECT hash FROM audit WHERE seq = ?"
_STATE = "SELECT id, body FROM state"
_WRITE_STATE = "INSERT OR REPLACE INTO state VALUES (1, ?)"
_RECOVER = (
    "somebody changed the database past tdx-keyd: see what with tdx-keyd audit verify; "
    "then restore a backup"
)


class StoreIntegrityError(ConfigError):
    """The database is not what the owner's programs left: edited, mixed or rolled back."""

    code = "store-integrity"

    def __init__(self, message: str, *, hint: str = _RECOVER) -> None:
        super().__init__(message, hint=hint)


class SealNotAuthenticError(StoreIntegrityError):
    """The seal is not one of the key-encryption key that this process has read."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """The seal's columns without its MAC; `schema` says what they are."""

    revision: int = 0
    seq: int = 0
    head: bytes = GENESIS
    state_sha256: bytes = b""
    exported_revision: int = 0
    exported_seq: int = 0
    exported_at_s: int = 0

    @classmethod
    def of(cls, columns: Sequence[Any]) -> Self:
        """Make a seal of its columns in their order."""
        return cls(
            revision=columns[0],
            seq=columns[1],
            head=columns[2],
            state_sha256=columns[3],
            exported_revision=columns[4],
            exported_seq=columns[5],
            exported_at_s=columns[6],
        )

    def columns(self) -> tuple[int, int, bytes, bytes, int, int, int]:
        """Return the columns in their order."""
        return (
            self.revision,
            self.seq,
            self.head,
            self.state_sha256,
            self.exported_revision,
            self.exported_seq,
            self.exported_at_s,
        )

    def mac(self, key: StoreKey) -> bytes:
        """Return the MAC over all columns."""
        return key.mac("seal", self.columns())


def is_sealed_with(sqlite: sqlite3.Connection, key: StoreKey) -> bool:
    """Say whether a database's seal is authentic under a key.

    Raises: sqlite3.Error.
    """
    rows = sqlite.execute(_SEAL).fetchall()
    if [row[0] for row in rows] != [1]:
        return False
    _, *columns, mac = rows[0]
    return _authentic(Seal.of(columns), mac, key)


class SealedState:
    """Reads and writes seal and state of one connection, and remembers how far it has seen them."""

    def __init__(self, sqlite: sqlite3.Connection) -> None:
        self._sqlite = sqlite
        self._seen = Seal()
        self._made: tuple[object, ...] = ()
        """The row that was written last: it carries its MAC."""

    def read(self, key: StoreKey | None) -> Seal:
        """Read the seal as it stands in the database; without a key it proves nothing.

        Raises: StoreIntegrityError if it is not authentic, or older than one seen before;
        sqlite3.Error.
        """
        rows = self._sqlite.execute(_SEAL).fetchall()
        if [row[0] for row in rows] != [1]:
            raise StoreIntegrityError(f"the store has no single seal: {len(rows)} rows")
        _, *columns, mac = rows[0]
        seal = Seal.of(columns)
        if [type(one) for one in columns] != [int, int, bytes, bytes, int, int, int]:
            raise StoreIntegrityError("the store's seal is malformed: not authentic")
        mine = rows[0] == self._made
        if key is not None and not mine and not _authentic(seal, mac, key):
            raise SealNotAuthenticError(
                f"the store's seal (revision {seal.revision}, audit record {seal.seq}) is not "
                "authentic under this key-encryption key"
            )
        self._never_back(seal)
        return seal

    def _never_back(self, seal: Seal) -> None:
        """Compare with the newest seal that this process has seen or written."""
        seen = self._seen
        for name, new, old in (
            ("revision", seal.revision, seen.revision),
            ("audit record", seal.seq, seen.seq),
        ):
            if new < old:
                raise StoreIntegrityError(
                    f"the store went back from {name} {old} to {new} while this process used it"
                )
        if not self._passed(seal):
            raise StoreIntegrityError(
                f"audit record {seen.seq} is not the one that this process has seen"
            )
        if seal.revision == seen.revision and seal.state_sha256 != seen.state_sha256:
            raise StoreIntegrityError(
                f"revision {seen.revision} is not the one that this process has seen"
            )
        self._seen = seal

    def _passed(self, seal: Seal) -> bool:
        """Say whether the log goes through the record that was the newest one."""
        seen = self._seen
        if seal.seq == seen.seq:
            return seal.head == seen.head
        row = self._sqlite.execute(_HASH, (seen.seq,)).fetchone()
        return seen.seq == 0 or (row is not None and row[0] == seen.head)

    def state(self, seal: Seal) -> State:
        """Read the state that a seal covers.

        Raises: StoreIntegrityError, sqlite3.Error.
        """
        rows = self._sqlite.execute(_STATE).fetchall()
        body = rows[0][1] if [row[0] for row in rows] == [1] else None
        if (
            not isinstance(body, bytes)
            or hashlib.sha256(body).digest() != seal.state_sha256
        ):
            raise StoreIntegrityError(
                "the store's state (its list of policies, generations and token keys, and the "
                f"collateral floors) is not that of revision {seal.revision}"
            )
        try:
            return State.parse(body, source="state")
        except DataError as exc:
            raise StoreIntegrityError(exc.message) from exc

    def write(self, seal: Seal, state: State | None, key: StoreKey) -> Seal:
        """Write the seal, and the state if it changed, which counts a revision.

        Returns what was written, for `committed`.
        """
        if state is not None:
            body = state.encode()
            self._put(_WRITE_STATE, (body,))
            seal = dataclasses.replace(
                seal,
                revision=seal.revision + 1,
                state_sha256=hashlib.sha256(body).digest(),
            )
        values = (*seal.columns(), seal.mac(key))
        self._put(_WRITE_SEAL, values)
        self._made = (1, *values)
        return seal

    def committed(self, seal: Seal) -> None:
        """Remember a seal whose transaction is on the disk: the store never goes behind it."""
        self._seen = seal

    def _put(self, statement: str, values: Sequence[object]) -> None:
        if self._sqlite.execute(statement, values).rowcount != 1:
            raise StoreIntegrityError("the store's seal was not written")


def _authentic(seal: Seal, mac: object, key: StoreKey) -> bool:
    try:
        return isinstance(mac, bytes) and hmac.compare_digest(seal.mac(key), mac)
    except (OverflowError, AttributeError, TypeError):  # values that no verb writes
        return False
