"""The key server's store: volumes, wrapped secrets, policies and the audit log.

SQLite with a write-ahead log: admin verbs and several server processes may use one file at a time.
Nothing in it is secret in clear: bundles are sealed to the key-encryption key (`kek`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, cast

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError as RowExistsError
from sqlalchemy.exc import SQLAlchemyError

from tdxd.core.policy import Check
from tdxd.errors import BusyError, ConfigError, DataError, HostError
from tdxd.owner.schema import (
    AUDIT,
    GENERATIONS,
    META,
    METADATA,
    NONCES,
    POLICIES,
    SCHEMA_VERSION,
    VOLUMES,
)

__all__ = ["AuditRecord", "GenerationRow", "PolicyRow", "Store", "Transaction"]

DATABASE_NAME = "store.sqlite3"
_BUSY_TIMEOUT_S = 10.0
_QUOTA_WINDOW_S = 3600


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRow:
    """One generation of a volume; `wrapped` is its bundle sealed to the KEK."""

    volume_id: str
    generation: int
    wrapped: bytes
    manifest_sha256: str
    added_at_s: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """The policy text of a volume; `version` counts up with each change."""

    volume_id: str
    version: int
    text: str
    set_at_s: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One decision on one volume, with every check; `seq` is 0 before it is stored."""

    seq: int = 0
    at_s: int
    request_id: str
    denial_id: str | None
    volume_id: str
    generation: int
    decision: str
    reason: str
    peer: str
    simulated: bool
    policy_version: int
    report_data: str
    checks: tuple[Check, ...]


class Store:
    """One open store; safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection = engine.connect()
        # What every release does goes past SQLAlchemy: there it costs ten times as much.
        self._sqlite = cast(
            "sqlite3.Connection", self._connection.connection.driver_connection
        )
        self._path = Path(engine.url.database or "")
        self._lock = threading.Lock()

    @classmethod
    def create(cls, directory: Path) -> Self:
        """Make the database; its directory must not hold one.

        Raises: HostError, ConfigError.
        """
        path = directory / DATABASE_NAME
        if path.exists():
            raise ConfigError(f"{path} exists already")
        with _converted(path):
            engine = _engine(path)
            METADATA.create_all(engine)
            store = cls(engine)
            with store.transaction() as change:
                change.set_meta("schema", SCHEMA_VERSION)
                change.set_meta("revision", 1)
        path.chmod(0o600)
        return store

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Open an existing database.

        Raises: HostError, ConfigError.
        """
        path = directory / DATABASE_NAME
        if not path.is_file():
            raise ConfigError(
                f"{directory} is no key server store: {DATABASE_NAME} is missing",
                hint=f"tdx-keyd init {directory} --name HOST makes one",
            )
        with _converted(path):
            store = cls(_engine(path))
            version = store.meta("schema")
        if version != SCHEMA_VERSION:
            store.close()
            raise ConfigError(
                f"{path} has schema version {version}, not {SCHEMA_VERSION}"
            )
        return store

    def close(self) -> None:
        """Close the database; harmless when repeated."""
        self._connection.close()
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Change the store: all of it or nothing, one writer at a time.

        Raises: BusyError, HostError.
        """
        with self._lock, _converted(self._path):
            self._sqlite.execute("BEGIN IMMEDIATE")
            try:
                yield Transaction(self._connection, self._sqlite)
                self._sqlite.execute("COMMIT")
            except BaseException:
                self._sqlite.rollback()
                raise
            finally:
                self._connection.rollback()  # ends SQLAlchemy's own notion of it

    def _rows(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        with self._lock, _converted(self._path):
            rows = self._connection.execute(query).mappings().all()
            self._connection.rollback()  # ends SQLAlchemy's own notion of it
        return [dict(row) for row in rows]

    def meta(self, key: str) -> int:
        """Return one number of the `meta` table, 0 if there is none."""
        rows = self._rows(sa.select(META.c.value).where(META.c.key == key))
        return cast("int", rows[0]["value"]) if rows else 0

    def revision(self) -> int:
        """Return a number that grows with each change of volumes, generations and policies."""
        with self._lock, _converted(self._path):
            (found,) = self._sqlite.execute(_REVISION).fetchone()
        return cast("int", found)

    def volume_ids(self) -> tuple[str, ...]:
        """Return the ids of all volumes, sorted."""
        return tuple(
            row["id"] for row in self._rows(sa.select(VOLUMES).order_by(VOLUMES.c.id))
        )

    def generations(self, volume_id: str) -> tuple[GenerationRow, ...]:
        """Return the generations of a volume, oldest first."""
        query = (
            sa.select(GENERATIONS)
            .where(GENERATIONS.c.volume_id == volume_id)
            .order_by(GENERATIONS.c.generation)
        )
        return tuple(GenerationRow(**row) for row in self._rows(query))

    def policy(self, volume_id: str) -> PolicyRow | None:
        """Return the policy of a volume, if one was ever set."""
        query = sa.select(POLICIES).where(POLICIES.c.volume_id == volume_id)
        rows = self._rows(query)
        return PolicyRow(**rows[0]) if rows else None

    def audit(
        self, *, denied_only: bool = False, limit: int = 1000
    ) -> tuple[AuditRecord, ...]:
        """Return the newest audit records, oldest of them first."""
        query = sa.select(AUDIT).order_by(AUDIT.c.seq.desc()).limit(limit)
        if denied_only:
            query = query.where(AUDIT.c.decision == "denied")
        return tuple(_record(row) for row in reversed(self._rows(query)))

    def denial(self, denial_id: str) -> AuditRecord | None:
        """Return the record of one denial."""
        rows = self._rows(sa.select(AUDIT).where(AUDIT.c.denial_id == denial_id))
        return _record(rows[0]) if rows else None


class Transaction:
    """One change of the store, valid inside `Store.transaction` only."""

    def __init__(self, connection: sa.Connection, raw: sqlite3.Connection) -> None:
        self._connection = connection
        self._sqlite = raw

    def set_meta(self, key: str, value: int) -> None:
        """Set one number of the `meta` table."""
        row = {"key": key, "value": value}
        self._connection.execute(META.insert().prefix_with("OR REPLACE"), row)

    def _touch(self) -> None:
        grown = META.update().where(META.c.key == "revision")
        self._connection.execute(grown.values(value=META.c.value + 1))

    def add_generation(self, row: GenerationRow) -> None:
        """Add a generation, and its volume if it is new.

        Raises: DataError if this generation is there already.
        """
        volume = {"id": row.volume_id, "added_at_s": row.added_at_s}
        self._connection.execute(VOLUMES.insert().prefix_with("OR IGNORE"), volume)
        try:
            self._connection.execute(GENERATIONS.insert(), dataclasses.asdict(row))
        except RowExistsError as exc:
            raise DataError(
                f"volume {row.volume_id!r} generation {row.generation} is in the store",
                hint="seal again with a higher --generation",
            ) from exc
        self._touch()

    def remove(self, volume_id: str, generation: int | None) -> int:
        """Remove one generation, or the volume; return how many generations went."""
        chosen = GENERATIONS.delete().where(GENERATIONS.c.volume_id == volume_id)
        if generation is not None:
            chosen = chosen.where(GENERATIONS.c.generation == generation)
        gone = self._connection.execute(chosen).rowcount
        if generation is None:
            self._connection.execute(VOLUMES.delete().where(VOLUMES.c.id == volume_id))
        self._touch()
        return gone

    def set_policy(self, volume_id: str, text: str, now_s: int) -> int:
        """Set the policy of a volume; return its version."""
        held = sa.select(POLICIES.c.version).where(POLICIES.c.volume_id == volume_id)
        version = (self._connection.execute(held).scalar() or 0) + 1
        row = PolicyRow(volume_id=volume_id, version=version, text=text, set_at_s=now_s)
        replace = POLICIES.insert().prefix_with("OR REPLACE")
        self._connection.execute(replace, dataclasses.asdict(row))
        self._touch()
        return version

    def spend(self, volume_id: str, nonce: bytes, now_s: int, limit: int) -> int | None:
        """Count a release against an hourly limit, each nonce once.

        Returns the releases counted in the last hour, or None if the limit is reached.
        """
        old = NONCES.c.at_s <= now_s - _QUOTA_WINDOW_S
        mine = NONCES.c.volume_id == volume_id
        self._connection.execute(NONCES.delete().where(old))
        count = sa.select(sa.func.count()).select_from(NONCES).where(mine)
        used = self._connection.execute(count).scalar_one()
        again = count.where(NONCES.c.nonce == nonce)
        if self._connection.execute(again).scalar_one():
            return used
        if used >= limit:
            return None
        row = {"volume_id": volume_id, "nonce": nonce, "at_s": now_s}
        self._connection.execute(NONCES.insert(), row)
        return used + 1

    def record(self, records: Sequence[AuditRecord]) -> None:
        """Append audit records."""
        rows = [_audit_row(item) for item in records]
        self._sqlite.executemany(_APPEND, rows)


_AUDIT_COLUMNS = tuple(column.name for column in AUDIT.c if column.name != "seq")
_APPEND = (
    f"INSERT INTO {AUDIT.name} ({', '.join(_AUDIT_COLUMNS)}) "  # noqa: S608  # our own names
    f"VALUES ({', '.join(':' + name for name in _AUDIT_COLUMNS)})"
)
_REVISION = "SELECT value FROM meta WHERE key = 'revision'"


def _audit_row(item: AuditRecord) -> dict[str, Any]:
    row = {name: getattr(item, name) for name in _AUDIT_COLUMNS}
    return {**row, "checks": _encode_checks(item.checks)}


def _encode_checks(checks: tuple[Check, ...]) -> str:
    """Encode as JSON; a value that is equal to the expected one is written once."""
    rows = [
        [one.name, int(one.ok), one.expected]
        if one.expected == one.actual
        else [one.name, int(one.ok), one.expected, one.actual]
        for one in checks
    ]
    return json.dumps(rows, separators=(",", ":"))


def _record(row: dict[str, Any]) -> AuditRecord:
    checks = tuple(
        Check(name=one[0], ok=bool(one[1]), expected=one[2], actual=one[-1])
        for one in json.loads(row["checks"])
    )
    simulated = bool(row["simulated"])
    return AuditRecord(**{**row, "checks": checks, "simulated": simulated})


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        poolclass=sa.StaticPool,
        # Transactions are begun by hand, as BEGIN IMMEDIATE: two writers then wait for each
        # other at the start instead of failing in the middle.
        connect_args={
            "isolation_level": None,
            "timeout": _BUSY_TIMEOUT_S,
            "check_same_thread": False,
        },
    )
    sa.event.listen(engine, "connect", _set_pragmas)
    return engine


def _set_pragmas(connection: Any, _record: object) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}").close()


@contextlib.contextmanager
def _converted(path: Path) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as exc:
        reason = str(getattr(exc, "orig", None) or exc)
        if "locked" in reason:
            raise BusyError(f"store {path} is locked by another process") from exc
        raise HostError("use", str(path), 0, hint=f"sqlite: {reason}") from exc
