"""How tdx-keyd shows volumes, audit records and denials: plain tables, one line a row."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence

from tdxd.owner.store import AuditRecord, Store

__all__ = ["audit_row", "print_denial", "print_table", "volume", "when"]

_WIDE = 48
"""Longer values stand on lines of their own in a denial: registers have 96 digits."""


def when(at_s: int) -> str:
    """Write unix time as ISO 8601, UTC."""
    return dt.datetime.fromtimestamp(at_s, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def volume(store: Store, volume_id: str) -> dict[str, object]:
    """Return one volume as plain values."""
    policy = store.policy(volume_id)
    return {
        "id": volume_id,
        "generations": [row.generation for row in store.generations(volume_id)],
        "policy_version": policy.version if policy else None,
    }


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
        "report_data": record.report_data,
        "checks": [
            {
                "name": check.name,
                "expected": check.expected,
                "actual": check.actual,
                "ok": check.ok,
            }
            for check in record.checks
        ],
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


def print_denial(record: AuditRecord) -> None:
    """Print every check of a denial, the failed ones marked and with whole values."""
    simulated = ", simulated platform" if record.simulated else ""
    print(
        f"denial {record.denial_id} at {when(record.at_s)} to {record.peer}{simulated}"
    )
    print(
        f"volume {record.volume_id}, policy version {record.policy_version or 'none'}"
    )
    print(f"reason {record.reason}")
    print()
    width = max(len(check.name) for check in record.checks)
    print(f"     {'CHECK'.ljust(width)}  EXPECTED / ACTUAL")
    for check in record.checks:
        name = check.name.ljust(width)
        if check.ok:
            print(f"ok   {name}  {_short(check.actual)}")
        else:
            print(f"FAIL {name}  expected {check.expected}")
            print(f"     {''.ljust(width)}  actual   {check.actual}")


def _short(text: str) -> str:
    return text if len(text) <= _WIDE else text[: _WIDE - 1] + "…"
