"""One record of the audit log: its bytes, and the chain that joins it to all before it.

A record is canonical msgpack: a map with the keys of `AuditRecord` in bytewise order, `checks` a
list of [name, ok, expected] or, where they differ, [name, ok, expected, actual]. The chain is

    hash(n) = SHA-256( LP("tdxd/audit/v1") || hash(n - 1) || LP(record n) )

from 32 zero bytes on. It needs no key, so that anybody may follow it from one signed checkpoint to
the next; that nobody who writes to the database can make a new head is the seal's work
(`store/seal.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import msgpack

from tdxd.core.check import Check
from tdxd.core.decode import strict_map
from tdxd.core.keyrelease import encode_lp
from tdxd.errors import DataError

__all__ = [
    "GENESIS",
    "HASH_BYTES",
    "AuditRecord",
    "bounded",
    "chain_hash",
    "encode_record",
    "parse_record",
]

HASH_BYTES = 32
GENESIS = bytes(HASH_BYTES)
_PREFIX = encode_lp(b"tdxd/audit/v1")
_RECORD_MAX_BYTES = 1024 * 1024
_TEXT_MAX_CHARS = 512
_TEXT_KEPT_CHARS = 240
"""At each end of a text that is longer; what says so fits between."""
_SAME = 3
_DIFFERENT = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """One decision on one volume, with every check; `seq` is 0 before it is stored.

    `decision` is "released", "denied", "rollback" where the owner accepted that older records
    are lost, or "kek-rotated" where the whole store was put under another key. Digests are hex of
    what the request carried, "" where there was none; that of the quote tells which bytes were
    judged and is no identity of the guest: a quote has many encodings.
    """

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
    request_sha384: str = ""
    quote_sha256: str = ""
    event_log_sha384: str = ""
    runtime_log_sha384: str = ""
    nonce_sha256: str = ""
    lease_s: int = 0


def bounded(checks: Sequence[Check]) -> tuple[Check, ...]:
    """Return checks as they are recorded: a longer text than 512 characters is cut in its middle.

    A stranger's log and a long policy decide how long these texts are, and each of up to 64 records
    of one request carries them.
    """
    return tuple(
        dataclasses.replace(
            one, expected=_bounded(one.expected), actual=_bounded(one.actual)
        )
        if len(one.expected) > _TEXT_MAX_CHARS or len(one.actual) > _TEXT_MAX_CHARS
        else one
        for one in checks
    )


def _bounded(text: str) -> str:
    if len(text) <= _TEXT_MAX_CHARS:
        return text
    left_out = len(text) - 2 * _TEXT_KEPT_CHARS
    start, end = text[:_TEXT_KEPT_CHARS], text[-_TEXT_KEPT_CHARS:]
    return f"{start}… {left_out} characters …{end}"


def encode_record(record: AuditRecord, seq: int) -> bytes:
    """Encode a record as number `seq` of the log, in canonical msgpack."""
    # The keys stand in order here: sorting them again would be half of the cost.
    packed = msgpack.packb(
        {
            "at_s": record.at_s,
            "checks": [
                (one.name, one.ok, one.expected)
                if one.expected == one.actual
                else (one.name, one.ok, one.expected, one.actual)
                for one in record.checks
            ],
            "decision": record.decision,
            "denial_id": record.denial_id,
            "event_log_sha384": record.event_log_sha384,
            "generation": record.generation,
            "lease_s": record.lease_s,
            "nonce_sha256": record.nonce_sha256,
            "peer": record.peer,
            "policy_version": record.policy_version,
            "quote_sha256": record.quote_sha256,
            "reason": record.reason,
            "report_data": record.report_data,
            "request_id": record.request_id,
            "request_sha384": record.request_sha384,
            "runtime_log_sha384": record.runtime_log_sha384,
            "seq": seq,
            "simulated": record.simulated,
            "volume_id": record.volume_id,
        },
        use_bin_type=True,
    )
    assert isinstance(packed, bytes)
    return packed


def chain_hash(before: bytes, record: bytes) -> bytes:
    """Return the hash of a record whose predecessor has the hash `before`: 32 bytes."""
    return hashlib.sha256(_PREFIX + before + encode_lp(record)).digest()


def parse_record(data: bytes, *, source: str) -> AuditRecord:
    """Decode what `encode_record` made.

    Raises: DataError, also for what is not in canonical form.
    """
    found = strict_map(data, source=source, max_bytes=_RECORD_MAX_BYTES)
    if (
        not isinstance(found, dict)
        or {name: type(value) for name, value in found.items() if name != "denial_id"}
        != _TYPES
    ):
        raise DataError(f"{source}: not the fields of a record")
    record = AuditRecord(
        **{**found, "checks": tuple(_check(one, source) for one in found["checks"])}
    )
    if not isinstance(record.denial_id, str | None):
        raise DataError(f"{source}: not the fields of a record")
    # One record has one form: encoding it again must give the very same bytes.
    if encode_record(record, record.seq) != data:
        raise DataError(f"{source}: msgpack is not in canonical form")
    return record


_TYPES = {
    "at_s": int,
    "checks": list,
    "decision": str,
    "event_log_sha384": str,
    "generation": int,
    "lease_s": int,
    "nonce_sha256": str,
    "peer": str,
    "policy_version": int,
    "quote_sha256": str,
    "reason": str,
    "report_data": str,
    "request_id": str,
    "request_sha384": str,
    "runtime_log_sha384": str,
    "seq": int,
    "simulated": bool,
    "volume_id": str,
}


def _check(found: object, source: str) -> Check:
    if (
        not isinstance(found, list)
        or len(found) not in {_SAME, _DIFFERENT}
        or [type(one) for one in found] != [str, bool, *[str] * (len(found) - 2)]
    ):
        raise DataError(f"{source}: a check has a wrong form")
    return Check(name=found[0], ok=found[1], expected=found[2], actual=found[-1])
