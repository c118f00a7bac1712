"""Compares the rows that count releases against quotas with the audit log, which cannot be edited.

The rows carry no MAC of their own: to delete one gives a guest a release more in this hour, and
shows here.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator

from tdxd.errors import DataError
from tdxd.owner.audit.record import AuditRecord, parse_record

__all__ = ["quota_troubles"]

_NEWEST = "SELECT seq, record FROM audit ORDER BY seq DESC"
_NONCES = "SELECT volume_id, nonce, at_s FROM nonces"
_WINDOW_S = 3600
_SLACK_S = 300
"""A release may repeat a nonce that was counted some minutes earlier (a token's lifetime)."""


def quota_troubles(sqlite: sqlite3.Connection) -> Iterator[str]:
    """Say which releases of the last hour are not counted, and which counted ones never were."""
    counted = {}
    for volume_id, nonce, at_s in sqlite.execute(_NONCES):
        if [type(one) for one in (volume_id, nonce, at_s)] != [str, bytes, int]:
            yield f"quota of volume {volume_id!r}: a row was edited"
        else:
            counted[volume_id, hashlib.sha256(nonce).hexdigest()] = at_s
    seen = set()
    for record in _last_hour(sqlite):
        name = (record.volume_id, record.nonce_sha256)
        seen.add(name)
        at_s = counted.get(name)
        if at_s is None or not 0 <= record.at_s - at_s <= _SLACK_S:
            yield (
                f"audit record {record.seq}: the release of volume {record.volume_id!r} is not "
                "counted against its quota any more"
            )
    if not seen:
        return
    newest_s = max(counted.values(), default=0)
    for (volume_id, nonce), at_s in sorted(counted.items()):
        if (volume_id, nonce) not in seen and at_s > newest_s - _WINDOW_S + _SLACK_S:
            yield (
                f"quota of volume {volume_id!r}: a release is counted (nonce sha256:"
                f"{nonce[:16]}…) that is not in the audit log"
            )


def _last_hour(sqlite: sqlite3.Connection) -> Iterator[AuditRecord]:
    """Return the releases of the hour before the newest record that had a quota."""
    first_s = None
    for seq, data in sqlite.execute(_NEWEST):
        try:
            record = parse_record(data, source=f"audit record {seq}")
        except (DataError, TypeError):  # the chain names it
            continue
        if first_s is None:
            first_s = record.at_s - _WINDOW_S + _SLACK_S
        if record.at_s <= first_s:
            return
        quota = any(one.name == "quota" and one.ok for one in record.checks)
        if record.decision == "released" and quota and record.nonce_sha256:
            yield record
