"""Compares rows of the database with the sealed state, and says in words what is wrong.

A row passes if it carries its own MAC and this MAC is the one that the state lists: the first shows
that tdx-keyd made it, the second that it still stands.
"""

from __future__ import annotations

import hmac
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tdxd.owner.store.key import StoreKey
from tdxd.owner.store.rows import (
    GenerationRow,
    PolicyRow,
    Row,
    TokenKeyRow,
    authentic,
    read_generations,
    read_policy,
    read_token_keys,
)
from tdxd.owner.store.state import State

__all__ = [
    "generation_troubles",
    "policy_trouble",
    "row_troubles",
    "stored_ids",
    "token_key_troubles",
]

_IDS = (
    "SELECT volume_id FROM policies UNION SELECT volume_id FROM generations ORDER BY 1"
)


def stored_ids(sqlite: sqlite3.Connection, state: State) -> list[str]:
    """Return the ids of all volumes that a row or the state knows, sorted."""
    stored = {row[0] for row in sqlite.execute(_IDS)}
    return sorted({*stored, *state.policies, *state.generations}, key=str)


def row_troubles(
    sqlite: sqlite3.Connection, key: StoreKey, state: State
) -> Iterator[str]:
    """Say what is wrong with any row under the seal."""
    for name in stored_ids(sqlite, state):
        trouble = policy_trouble(key, state, name, read_policy(sqlite, name))
        if trouble:
            yield trouble
        rows = read_generations(sqlite, name)
        yield from generation_troubles(key, state, name, rows)
    yield from token_key_troubles(key, state, read_token_keys(sqlite))


def policy_trouble(
    key: StoreKey, state: State, volume_id: str, row: PolicyRow | None
) -> str:
    """Say what is wrong with the policy row of a volume, or return ""."""
    version, mac = state.policies.get(volume_id, (0, b""))
    what = f"policy of volume {volume_id!r}"
    if row is None:
        return f"{what} is missing, sealed is version {version}" if version else ""
    if authentic(key, row) and row.version != version:
        sealed = f"version {version}" if version else "none"
        return f"{what} is version {row.version}, sealed is {sealed}"
    return _trouble(key, f"{what} version {row.version}", row, mac)


def generation_troubles(
    key: StoreKey, state: State, volume_id: str, rows: Iterable[GenerationRow]
) -> Iterator[str]:
    """Say what is wrong with the generations of a volume, removed ones included."""
    found = {row.generation: row for row in rows}
    sealed = {n: one[0] for n, one in state.generations.get(volume_id, {}).items()}
    yield from _troubles(key, f"volume {volume_id!r} generation", found, sealed)


def token_key_troubles(
    key: StoreKey, state: State, rows: Iterable[TokenKeyRow]
) -> Iterator[str]:
    """Say what is wrong with the token keys."""
    found = {_hex(row.key_id): row for row in rows}
    yield from _troubles(key, "token key", found, state.token_keys)


def _troubles(
    key: StoreKey, what: str, found: Mapping[Any, Row], sealed: Mapping[Any, bytes]
) -> Iterator[str]:
    for name in sorted({*found, *sealed}, key=lambda one: (len(str(one)), str(one))):
        row = found.get(name)
        if row is None:
            yield f"{what} {name} is missing"
        elif trouble := _trouble(key, f"{what} {name}", row, sealed.get(name, b"")):
            yield trouble


def _trouble(key: StoreKey, what: str, row: Row, sealed_mac: bytes) -> str:
    if not authentic(key, row):
        return f"{what} was edited or put in past tdx-keyd: its MAC does not fit"
    if not hmac.compare_digest(row.mac, sealed_mac):
        return (
            f"{what} is another row than the one that was sealed, an older one perhaps"
        )
    return ""


def _hex(key_id: object) -> str:
    return key_id.hex() if isinstance(key_id, bytes) else repr(key_id)
