"""The tables of the key server's store, in SQLAlchemy Core."""

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
)

__all__ = [
    "AUDIT",
    "GENERATIONS",
    "META",
    "METADATA",
    "NONCES",
    "POLICIES",
    "SCHEMA_VERSION",
    "VOLUMES",
]

SCHEMA_VERSION = 1

METADATA = MetaData()

META = Table(
    "meta",
    METADATA,
    Column("key", String(32), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""`schema`: SCHEMA_VERSION. `revision`: counts changes of volumes, generations and policies."""

VOLUMES = Table(
    "volumes",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("added_at_s", BigInteger, nullable=False),
)

GENERATIONS = Table(
    "generations",
    METADATA,
    Column("volume_id", String(64), primary_key=True),
    Column("generation", BigInteger, primary_key=True, autoincrement=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("added_at_s", BigInteger, nullable=False),
)

POLICIES = Table(
    "policies",
    METADATA,
    Column("volume_id", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("set_at_s", BigInteger, nullable=False),
)
"""Kept when its volume is removed, so that the version never goes back."""

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
    Column("seq", Integer, primary_key=True),
    Column("at_s", BigInteger, nullable=False),
    Column("request_id", String(16), nullable=False),
    Column("denial_id", String(16)),
    Column("volume_id", String(64), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("decision", String(8), nullable=False),
    Column("reason", String(32), nullable=False),
    Column("peer", String(128), nullable=False),
    Column("simulated", Integer, nullable=False),
    Column("policy_version", Integer, nullable=False),
    Column("report_data", String(128), nullable=False),
    Column("checks", Text, nullable=False),
)
Index(
    "audit_denial",
    AUDIT.c.denial_id,
    unique=True,
    sqlite_where=AUDIT.c.denial_id.is_not(None),  # a release then touches no index page
)
"""Append-only: one row for each volume of each request, written before the answer leaves."""
