"""The key server's store: volumes, wrapped secrets, policies, floors, token keys, audit log.

Nothing in it is secret in clear: bundles are sealed to the key-encryption key (`kek`). Nothing in
it is believed without that key either: rows carry MACs, and one seal covers them all together with
the head of the audit log (`seal.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, cast

import sqlalchemy as sa

from tdxd.core.decode import plain
from tdxd.errors import ConfigError, TdxdError, UnavailableError
from tdxd.owner.audit.record import AuditRecord, parse_record
from tdxd.owner.store.changes import Transaction
from tdxd.owner.store.check import (
    generation_troubles,
    policy_trouble,
    token_key_troubles,
)
from tdxd.owner.store.database import (
    DATABASE_NAME,
    OLD_SCHEMA_VERSIONS,
    converted,
    make_engine,
    upgrade,
)
from tdxd.owner.store.kek import PRIVATE_NAME, Kek, next_path, read_kek
from tdxd.owner.store.key import StoreKey
from tdxd.owner.store.rows import (
    GenerationRow,
    PolicyRow,
    TokenKeyRow,
    read_generations,
    read_policy,
    read_token_keys,
)
from tdxd.owner.store.schema import METADATA, SCHEMA_VERSION
from tdxd.owner.store.seal import (
    Seal,
    SealedState,
    SealNotAuthenticError,
    StoreIntegrityError,
    is_sealed_with,
)
from tdxd.owner.store.state import State

__all__ = [
    "AuditRecord",
    "GenerationRow",
    "KekRotatedError",
    "PolicyRow",
    "SealedVolume",
    "Store",
    "TokenKeyRow",
    "Transaction",
]

_META = "SELECT value FROM meta WHERE key = ?"
_VOLUME_IDS = (
    "SELECT DISTINCT volume_id FROM generations WHERE removed_at_s = 0 ORDER BY 1"
)
_AUDIT = "SELECT seq, record FROM audit {where} ORDER BY seq DESC LIMIT ?"
_LINES = "SELECT seq, record, hash FROM audit WHERE seq > ? ORDER BY seq LIMIT 500"
_DENIED = "WHERE denial_id IS NOT NULL"
_DENIAL = "SELECT seq, record FROM audit WHERE denial_id = ?"


class KekRotatedError(UnavailableError):
    """This process has read a key-encryption key that is not the store's any more."""

    code = "kek-rotated"

    def __init__(self) -> None:
        super().__init__(
            "the store's key-encryption key was rotated after this process read it",
            hint="a server takes the new one at its reload: systemctl reload tdx-keyd; a verb "
            "when it is run again",
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SealedVolume:
    """The rows of one volume, removed generations included, all of one revision.

    `trouble` says what is not as it was sealed, or is empty.
    """

    revision: int
    policy: PolicyRow | None
    generations: tuple[GenerationRow, ...]
    trouble: str


class Store:
    """One open store; safe to use from several threads.

    What changes the store, and what vouches for its content, needs the private half of the
    key-encryption key; it is read when the first of these is called.
    """

    def __init__(self, engine: sa.Engine, kek_file: Path) -> None:
        self._engine = engine
        self._connection = engine.connect()
        # What every release does goes past SQLAlchemy: there it costs ten times as much.
        self._sqlite = cast(
            "sqlite3.Connection", self._connection.connection.driver_connection
        )
        self._path = Path(engine.url.database or "")
        self._kek_file = kek_file
        self._kek: Kek | None = None
        self._sealed = SealedState(self._sqlite)
        self._lock = threading.Lock()

    @classmethod
    def create(cls, directory: Path) -> Self:
        """Make the database; its directory must hold the key-encryption key and no database.

        Raises: HostError, ConfigError.
        """
        path = directory / DATABASE_NAME
        if path.exists():
            raise ConfigError(f"{path} exists already")
        kek = read_kek(directory / PRIVATE_NAME)
        with converted(path):
            engine = make_engine(path)
            METADATA.create_all(engine)
            store = cls(engine, directory / PRIVATE_NAME)
            store._kek = kek
            with store.transaction() as change:
                change.set_meta("schema", SCHEMA_VERSION)
                change.make_seal()
        path.chmod(0o600)
        return store

    @classmethod
    def open(cls, directory: Path, kek_file: Path | None = None) -> Self:
        """Open an existing database; `kek_file` is where the private half lies, if elsewhere.

        Raises: HostError, ConfigError.
        """
        path = directory / DATABASE_NAME
        if not path.is_file():
            raise ConfigError(
                f"{directory} is no key server store: {DATABASE_NAME} is missing",
                hint=f"tdx-keyd init {directory} --name HOST makes one",
            )
        with converted(path):
            store = cls(make_engine(path), kek_file or directory / PRIVATE_NAME)
            version = store.meta("schema")
            if version in OLD_SCHEMA_VERSIONS:
                version = upgrade(store._sqlite)
        if version != SCHEMA_VERSION:
            store.close()
            hint = "make a new store with tdx-keyd init and add the bundles again"
            if isinstance(version, int) and version > SCHEMA_VERSION:
                hint = "a newer tdx-keyd made it, and reads it: install that"
            text = f"{path} has schema version {version}, not {SCHEMA_VERSION}"
            raise ConfigError(text, hint=hint)
        return store

    def close(self) -> None:
        """Close the database; harmless when repeated."""
        self._connection.close()
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def kek(self) -> Kek:
        """Return the key-encryption key of the store, read once.

        Raises: BusyError, HostError, ConfigError.
        """
        if self._kek is None:
            self._kek = self._current_kek()
        return self._kek

    def _current_kek(self) -> Kek:
        """Read the key that the seal is authentic under; the old file's, if it is of neither."""
        kek, following = read_kek(self._kek_file), next_path(self._kek_file)
        if not following.exists() or self._is_sealed_with(kek):
            return kek
        try:
            other = read_kek(following)
        except ConfigError:  # it has just taken the old one's place, or is of no use
            return read_kek(self._kek_file)
        if self._is_sealed_with(other):
            return dataclasses.replace(other, unfinished=True)
        return kek

    def _is_sealed_with(self, kek: Kek) -> bool:
        with self._lock, converted(self._path):
            return is_sealed_with(self._sqlite, kek.store_key)

    def key(self) -> StoreKey:
        """Return the key that authenticates rows and seal.

        Raises: BusyError, HostError, ConfigError.
        """
        return self.kek().store_key

    @contextlib.contextmanager
    def _rotation_told(self) -> Iterator[None]:
        """Tell a seal under the next key from one that somebody made up.

        Raises: KekRotatedError.
        """
        try:
            yield
        except SealNotAuthenticError as exc:
            if self._rotated():
                raise KekRotatedError from exc
            raise

    def _rotated(self) -> bool:
        try:
            kek = self._current_kek()
            return kek.public != self.kek().public and self._is_sealed_with(kek)
        except TdxdError:
            return False

    def scrub(self) -> bool:
        """Empty the write-ahead log, which has older states of rows; False if others read it.

        Raises: BusyError, HostError.
        """
        rows = self._raw("PRAGMA wal_checkpoint(TRUNCATE)")
        return not rows[0][0]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change the store: all of it or nothing, one writer at a time.

        Raises: BusyError, HostError, ConfigError, StoreIntegrityError, KekRotatedError.
        """
        key = self.key()
        with self._rotation_told(), self._lock, converted(self._path):
            self._sqlite.execute("BEGIN IMMEDIATE")
            try:
                change = Transaction(self._connection, self._sqlite, self._sealed, key)
                yield change
                change.finish()
                self._sqlite.execute("COMMIT")
                change.committed()
            except BaseException:
                self._sqlite.rollback()
                raise
            finally:
                self._connection.rollback()  # ends SQLAlchemy's own notion of it

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Read one state of the database by several statements, while others write.

        Raises: BusyError, HostError.
        """
        with self._rotation_told(), self._lock, converted(self._path):
            self._sqlite.execute("BEGIN")
            try:
                yield self._sqlite
            finally:
                self._sqlite.rollback()

    def _raw(self, statement: str, *values: object) -> list[Any]:
        with self._lock, converted(self._path):
            return self._sqlite.execute(statement, values).fetchall()

    def meta(self, key: str) -> int:
        """Return one number of the `meta` table, 0 if there is none."""
        rows = self._raw(_META, key)
        return cast("int", rows[0][0]) if rows else 0

    @contextlib.contextmanager
    def sealed_reading(self) -> Iterator[tuple[sqlite3.Connection, Seal, State]]:
        """Read rows together with the seal and the state that must cover them.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        key = self.key()
        with self.reading() as sqlite:
            seal = self._sealed.read(key)
            yield sqlite, seal, self._sealed.state(seal)

    def sealed(self) -> tuple[Seal, State]:
        """Return the seal and the state that it covers.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        with self.sealed_reading() as (_, seal, state):
            return seal, state

    def seal(self) -> Seal:
        """Return the seal alone.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        key = self.key()
        with self.reading():
            return self._sealed.read(key)

    def floors(self) -> dict[str, int]:
        """Return the collateral floors, authenticated.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        return dict(self.sealed()[1].floors)

    def volume_ids(self) -> tuple[str, ...]:
        """Return the ids of all volumes, sorted."""
        return tuple(row[0] for row in self._raw(_VOLUME_IDS))

    def generations(self, volume_id: str) -> tuple[GenerationRow, ...]:
        """Return the generations of a volume, oldest first, as the database has them."""
        with self.reading() as sqlite:
            rows = read_generations(sqlite, volume_id)
        return tuple(row for row in rows if not row.removed_at_s)

    def policy(self, volume_id: str) -> PolicyRow | None:
        """Return the policy of a volume as the database has it, if one was ever set."""
        with self.reading() as sqlite:
            return read_policy(sqlite, volume_id)

    def token_keys(self) -> tuple[TokenKeyRow, ...]:
        """Return the token keys, authenticated, newest first.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        with self.sealed_reading() as (sqlite, _, state):
            rows = read_token_keys(sqlite)
        for trouble in token_key_troubles(self.key(), state, rows):
            raise StoreIntegrityError(trouble)
        return rows

    def sealed_volume(self, volume_id: str) -> SealedVolume:
        """Return what the store has of a volume, and what is wrong with it.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        with self.sealed_reading() as (sqlite, seal, state):
            policy = read_policy(sqlite, volume_id)
            generations = read_generations(sqlite, volume_id)
        troubles = [
            policy_trouble(self.key(), state, volume_id, policy),
            *generation_troubles(self.key(), state, volume_id, generations),
        ]
        return SealedVolume(
            revision=seal.revision,
            policy=policy,
            generations=generations,
            trouble="; ".join(one for one in troubles if one),
        )

    def audit(
        self, *, denied_only: bool = False, limit: int = 1000
    ) -> tuple[AuditRecord, ...]:
        """Return the newest audit records, oldest of them first.

        Raises: DataError for one that is no record any more, HostError.
        """
        statement = _AUDIT.format(where=_DENIED if denied_only else "")
        return tuple(_record(*row) for row in reversed(self._raw(statement, limit)))

    def denial(self, denial_id: str) -> AuditRecord | None:
        """Return the record of one denial.

        Raises: DataError if it is no record any more, HostError.
        """
        rows = self._raw(_DENIAL, denial_id)
        return _record(*rows[0]) if rows else None

    def audit_lines(self, after: int = 0) -> Iterator[dict[str, object]]:
        """Return every record after a number, oldest first, as plain values with its hash.

        Raises: DataError for one that is no record any more, HostError.
        """
        while rows := self._raw(_LINES, after):
            for seq, data, digest in rows:
                found = plain(_record(seq, data))
                yield {**cast("dict[str, object]", found), "hash": digest.hex()}
            after = rows[-1][0]


def _record(seq: int, data: bytes) -> AuditRecord:
    return parse_record(data, source=f"audit record {seq}")
