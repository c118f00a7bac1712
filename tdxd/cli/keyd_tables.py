"""How tdx-keyd shows volumes and audit records: plain tables, one line a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tdxd.core.decode import plain
from tdxd.core.foreign import ForeignManifest
from tdxd.core.showing import when
from tdxd.owner.store.store import AuditRecord, GenerationRow, Store

__all__ = ["audit_row", "header", "print_table", "secret", "volume", "when"]


def volume(store: Store, volume_id: str) -> dict[str, object]:
    """Return one volume, or one named secret, as plain values."""
    policy = store.policy(volume_id)
    rows = store.generations(volume_id)
    return {
        "id": volume_id,
        "kind": rows[-1].kind if rows else None,
        "generations": [row.generation for row in rows],
        "policy_version": policy.version if policy else None,
    }


def secret(store: Store, secret_id: str) -> dict[str, object] | None:
    """Return one named secret as plain values; `None` for a volume."""
    rows = store.generations(secret_id)
    if not rows or rows[-1].kind != "secret":
        return None
    policy = store.policy(secret_id)
    return {
        "id": secret_id,
        "content": rows[-1].content,
        "generations": [row.generation for row in rows],
        "policy_version": policy.version if policy else None,
        "added": when(rows[-1].added_at_s),
    }


def header(row: GenerationRow) -> str:
    """Say which LUKS2 header a generation's image must have: its SHA-256, or `any`.

    Empty for a sealed image, whose header nobody reads, and for a secret. Nothing of this is
    authenticated here.
    """
    manifest = row.clear_manifest()
    if not isinstance(manifest, ForeignManifest):
        return ""
    return manifest.header_sha256.hex() or "any"


def audit_row(record: AuditRecord) -> dict[str, object]:
    """Return one audit record as plain values."""
    return {
        "seq": record.seq,
        "at": when(record.at_s),
        "decision": record.decision,
        "volume": record.volume_id,
        "generation": record.generation,
        "reason": record.reason,
        "denial_id": record.denial_id,
        "request_id": record.request_id,
        "simulated": record.simulated,
        "peer": record.peer,
        "policy_version": record.policy_version,
        "lease_s": record.lease_s,
        "report_data": record.report_data,
        "request_sha384": record.request_sha384,
        "quote_sha256": record.quote_sha256,
        "event_log_sha384": record.event_log_sha384,
        "runtime_log_sha384": record.runtime_log_sha384,
        "nonce_sha256": record.nonce_sha256,
        "checks": plain(record.checks),
    }


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Print columns as wide as their widest value; a missing value is a dash."""
    lines = [tuple(column.replace("_", " ").upper() for column in columns)]
    lines += [tuple(_cell(row[column]) for column in columns) for row in rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(str(item) for item in value) or "-"
    return str(value)
