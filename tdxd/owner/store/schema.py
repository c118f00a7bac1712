"""The tables of the key server's store, in SQLAlchemy Core.

What each `mac` covers stands in `rows.py` and `seal.py`.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

__all__ = [
    "AUDIT",
    "GENERATIONS",
    "META",
    "METADATA",
    "NONCES",
    "POLICIES",
    "SCHEMA_VERSION",
    "SEAL",
    "STATE",
    "TOKEN_KEYS",
]

SCHEMA_VERSION = 4
"""3 added the manifests of foreign volumes, 4 named secrets: the same columns."""

METADATA = MetaData()

META = Table(
    "meta",
    METADATA,
    Column("key", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""`schema`: SCHEMA_VERSION."""

SEAL = Table(
    "seal",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("head", LargeBinary(32), nullable=False),
    Column("state_sha256", LargeBinary(32), nullable=False),
    Column("exported_revision", BigInteger, nullable=False),
    Column("exported_seq", BigInteger, nullable=False),
    Column("exported_at_s", BigInteger, nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
)
"""One row, written by each transaction: it ties the state to the head of the audit log.

`revision` counts changes of the state, `seq` and `head` are the newest audit record's number and
hash; `exported_*` say which checkpoint was exported last.
"""

STATE = Table(
    "state",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("body", LargeBinary, nullable=False),
)
"""One row: which policies, generations and token keys there are, and the collateral floors."""

GENERATIONS = Table(
    "generations",
    METADATA,
    Column("volume_id", String(64), primary_key=True),
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("added_at_s", BigInteger, nullable=False),
    Column("removed_at_s", BigInteger, nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
    Column("manifest", LargeBinary, nullable=False, server_default=text("x''")),
)
"""Kept when removed, without the secret: guests that serve it still prove that they do."""

POLICIES = Table(
    "policies",
    METADATA,
    Column("volume_id", String(64), primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("text", Text, nullable=False),
    Column("set_at_s", BigInteger, nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
)
"""Kept when its volume is removed, so that the version never goes back."""

TOKEN_KEYS = Table(
    "token_keys",
    METADATA,
    Column("key_id", LargeBinary(8), primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
    Column("made_at_s", BigInteger, nullable=False),
    Column("mac", LargeBinary(32), nullable=False),
)

NONCES = Table(
    "nonces",
    METADATA,
    Column("volume_id", String(64), primary_key=True),
    Column("nonce", LargeBinary(32), primary_key=True),
    Column("at_s", BigInteger, nullable=False, index=True),
)
"""Releases of the last hour of volumes with a quota, each nonce once."""

AUDIT = Table(
    "audit",
    METADATA,
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("record", LargeBinary, nullable=False),
    Column("hash", LargeBinary(32), nullable=False),
    Column("denial_id", String(16)),
)
"""Append-only: one row for each volume of each request, written before the answer leaves.

`denial_id` repeats the record's own, to find denials by.
"""
Index(
    "audit_denial",
    AUDIT.c.denial_id,
    unique=True,
    sqlite_where=AUDIT.c.denial_id.is_not(None),  # a release then touches no index page
)
