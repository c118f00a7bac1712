"""The database file of a store: how it is opened, and how its errors become ours.

SQLite with a write-ahead log: admin verbs and several server processes may use one file at a time.
"""

from __future__ import annotations

import contextlib
import functools
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from tdxd.errors import BusyError, HostError
from tdxd.owner.store.schema import METADATA, SCHEMA_VERSION

__all__ = [
    "DATABASE_NAME",
    "OLD_SCHEMA_VERSIONS",
    "converted",
    "make_engine",
    "schema_troubles",
    "upgrade",
]

DATABASE_NAME = "store.sqlite3"
OLD_SCHEMA_VERSIONS = (2, 3)
"""Those that `upgrade` starts from: 2 had no manifests, 3 no named secrets in them."""
_VERSION = "SELECT value FROM meta WHERE key = 'schema'"
_SET_VERSION = "UPDATE meta SET value = ? WHERE key = 'schema'"
_ADD_MANIFEST = "ALTER TABLE generations ADD COLUMN manifest BLOB DEFAULT x'' NOT NULL"
_BUSY_TIMEOUT_S = 10.0


def make_engine(path: Path) -> sa.Engine:
    """Make an engine with one connection, whose transactions are begun by hand."""
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
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        # Others may have written to the file: what the schema says is not trusted to be ours.
        # Source: https://www.sqlite.org/security.html, "Untrusted SQLite Database Files".
        "trusted_schema=OFF",
        "cell_size_check=ON",
        # What is deleted or replaced, a secret under an old key perhaps, is gone from the pages.
        "secure_delete=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def upgrade(sqlite: sqlite3.Connection) -> int:
    """Give an older database the columns of today; return the version that it has then.

    All rows stay authentic as they are: their MACs cover the new column where it is not empty.

    Raises: sqlite3.Error.
    """
    sqlite.execute("BEGIN IMMEDIATE")
    try:
        ((version,),) = sqlite.execute(_VERSION).fetchall()
        if version in OLD_SCHEMA_VERSIONS:  # another process may have been faster
            if version == 2:
                sqlite.execute(_ADD_MANIFEST)
            sqlite.execute(_SET_VERSION, (SCHEMA_VERSION,))
            version = SCHEMA_VERSION
        sqlite.execute("COMMIT")
    finally:
        sqlite.rollback()
    return int(version)


_OBJECTS = "SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite%'"
_COLUMNS = (
    'SELECT name, type, "notnull", dflt_value, pk, hidden FROM pragma_table_xinfo(?)'
)
_Form = tuple[str, bool, tuple[tuple[object, ...], ...]]


def _schema(sqlite: sqlite3.Connection) -> dict[str, _Form]:
    """Return kind and columns of every object; the words of a statement do not matter."""
    found = {}
    for kind, name, text in sqlite.execute(_OBJECTS).fetchall():
        virtual = "VIRTUAL" in str(text).upper().split()[:2]
        columns = (
            sqlite.execute(_COLUMNS, (name,)).fetchall() if kind == "table" else ()
        )
        found[name] = (kind, virtual, tuple(columns))
    return found


@functools.cache
def _own_schema() -> dict[str, _Form]:
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    try:
        METADATA.create_all(engine)
        with engine.connect() as made:
            raw = made.connection.driver_connection
            return _schema(cast("sqlite3.Connection", raw))
    finally:
        engine.dispose()


def schema_troubles(sqlite: sqlite3.Connection) -> Iterator[str]:
    """Say what is in the database that tdx-keyd did not make: a trigger could undo its work."""
    own, found = _own_schema(), _schema(sqlite)
    for name in sorted({*own, *found}):
        if name not in own:
            yield f"{found[name][0]} {name!r} of the database is none of tdx-keyd's"
        elif found.get(name) != own[name]:
            yield f"{own[name][0]} {name!r} of the database is not as tdx-keyd made it"


@contextlib.contextmanager
def converted(path: Path) -> Iterator[None]:
    """Turn a database error inside into ours.

    Raises: BusyError, HostError.
    """
    try:
        yield
    except (SQLAlchemyError, sqlite3.Error) as exc:
        reason = str(getattr(exc, "orig", None) or exc)
        if "locked" in reason:
            raise BusyError(f"store {path} is locked by another process") from exc
        raise HostError("use", str(path), 0, hint=f"sqlite: {reason}") from exc
