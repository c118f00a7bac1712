"""The rows of the store that an owner makes, and what each row's MAC covers."""

from __future__ import annotations

import dataclasses
import hmac
import sqlite3
from typing import Literal

from tdxd.core.bundle import Manifest
from tdxd.core.foreign import ForeignManifest
from tdxd.core.named_secret import SecretManifest, parse_released_manifest
from tdxd.errors import DataError
from tdxd.owner.store.key import StoreKey

__all__ = [
    "GenerationRow",
    "PolicyRow",
    "Row",
    "TokenKeyRow",
    "authentic",
    "read_generations",
    "read_policy",
    "read_token_keys",
    "row_mac",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRow:
    """One generation of a volume or a named secret; `wrapped` is its bundle sealed to the KEK.

    A removed one keeps its row, with `removed_at_s` and without `wrapped`: guests that serve it
    have its event in their runtime logs until they boot again. `manifest` is a foreign volume's
    or a named secret's, encoded, in clear: it tells nothing that the image file does not, or what
    a secret is for. Empty for a sealed image, in whose manifest there is a secret salt.
    """

    volume_id: str
    generation: int
    wrapped: bytes
    manifest_sha256: str
    added_at_s: int
    removed_at_s: int = 0
    mac: bytes = b""
    manifest: bytes = b""

    def clear_manifest(self) -> ForeignManifest | SecretManifest | None:
        """Return the manifest, where it is in clear.

        Raises: DataError.
        """
        if not self.manifest:
            return None
        what = f"manifest of {self.volume_id!r} generation {self.generation}"
        found = parse_released_manifest(self.manifest, source=what)
        if isinstance(found, Manifest):
            raise DataError(f"{what} is that of a sealed image")
        return found

    @property
    def kind(self) -> Literal["sealed", "luks2", "secret"]:
        """What it is: the secret or the passphrase of a volume, or a secret of its own.

        Raises: DataError.
        """
        found = self.clear_manifest()
        return "sealed" if found is None else found.kind

    @property
    def content(self) -> str:
        """What a named secret is for; empty for a volume.

        Raises: DataError.
        """
        found = self.clear_manifest()
        return found.content if isinstance(found, SecretManifest) else ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PolicyRow:
    """The policy text of a volume; `version` counts up with each change."""

    volume_id: str
    version: int
    text: str
    set_at_s: int
    mac: bytes = b""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenKeyRow:
    """A key that challenge tokens are sealed with, sealed to the KEK itself.

    `key_id` is the 8 bytes by which a token names it.
    """

    key_id: bytes
    wrapped: bytes
    made_at_s: int
    mac: bytes = b""


Row = GenerationRow | PolicyRow | TokenKeyRow


def row_mac(key: StoreKey, row: Row) -> bytes:
    """Return the MAC that a row must carry: over its kind and every other column."""
    if isinstance(row, PolicyRow):
        policy = (row.volume_id, row.version, row.text, row.set_at_s)
        return key.mac("policy", policy)
    if isinstance(row, TokenKeyRow):
        return key.mac("token-key", (row.key_id, row.wrapped, row.made_at_s))
    fields = (
        row.volume_id,
        row.generation,
        row.wrapped,
        row.manifest_sha256,
        row.added_at_s,
        row.removed_at_s,
    )
    # One field more, not an empty one: rows from before there were two kinds stay authentic.
    return key.mac("generation", (*fields, row.manifest) if row.manifest else fields)


def authentic(key: StoreKey, row: Row) -> bool:
    """Say whether a row carries its MAC (constant time), on values of the very types.

    SQLite keeps any type in any column, and a MAC covers bytes: eight of them are a number, too.
    """
    for field in dataclasses.fields(row):
        if type(getattr(row, field.name)).__name__ != field.type:
            return False
    try:
        wanted = row_mac(key, row)
        return hmac.compare_digest(wanted, row.mac)
    except OverflowError:  # a negative number, which no verb writes
        return False


_GENERATIONS = (
    "SELECT volume_id, generation, wrapped, manifest_sha256, added_at_s, removed_at_s, mac, "
    "manifest FROM generations WHERE volume_id = ? ORDER BY generation"
)
_POLICY = (
    "SELECT volume_id, version, text, set_at_s, mac FROM policies WHERE volume_id = ?"
)
_TOKENS = (
    "SELECT key_id, wrapped, made_at_s, mac FROM token_keys "
    "ORDER BY made_at_s DESC, key_id"
)


def read_generations(
    sqlite: sqlite3.Connection, volume_id: str
) -> tuple[GenerationRow, ...]:
    """Read the generations of a volume, oldest first, removed ones included."""
    return tuple(
        GenerationRow(
            volume_id=row[0],
            generation=row[1],
            wrapped=row[2],
            manifest_sha256=row[3],
            added_at_s=row[4],
            removed_at_s=row[5],
            mac=row[6],
            manifest=row[7],
        )
        for row in sqlite.execute(_GENERATIONS, (volume_id,))
    )


def read_policy(sqlite: sqlite3.Connection, volume_id: str) -> PolicyRow | None:
    """Read the policy of a volume, if there is one."""
    row = sqlite.execute(_POLICY, (volume_id,)).fetchone()
    if row is None:
        return None
    return PolicyRow(
        volume_id=row[0], version=row[1], text=row[2], set_at_s=row[3], mac=row[4]
    )


def read_token_keys(sqlite: sqlite3.Connection) -> tuple[TokenKeyRow, ...]:
    """Read the token keys, newest first."""
    return tuple(
        TokenKeyRow(key_id=row[0], wrapped=row[1], made_at_s=row[2], mac=row[3])
        for row in sqlite.execute(_TOKENS)
    )
