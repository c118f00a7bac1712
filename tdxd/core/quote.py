"""Read a TDX quote by fixed offsets. This reads; it proves nothing: dcap-qvl verifies.

Source: Intel TDX DCAP Quoting Library API, appendix A.3 (version 4) and A.4 (version 5);
offsets of the TD 1.5-ex body compared field by field with dcap-qvl 0.7.0. All integers are
little-endian.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from collections.abc import Iterable

from tdxd.errors import EvidenceMalformedError

__all__ = [
    "MAX_QUOTE_BYTES",
    "MEASUREMENT_BYTES",
    "REPORT_DATA_BYTES",
    "TD_ATTRIBUTE_BITS",
    "TEE_TYPE_TDX",
    "BodyKind",
    "Quote",
    "TdReport",
    "parse_quote",
    "td_attribute_names",
    "td_attributes_bytes",
]

MAX_QUOTE_BYTES = 16384
"""The largest quote that Intel's own library passes on (libtdx_attest)."""
REPORT_DATA_BYTES = 64
MEASUREMENT_BYTES = 48
"""SHA-384."""
TEE_TYPE_TDX = 0x81
HEADER_BYTES = 48
BODY_DESCRIPTOR_BYTES = 6
ECDSA_P256_KEY_TYPE = 2
_MIN_SIGNATURE_BYTES = 64 + 64 + 6
"""Quote signature, attestation key, type and length of the certification data."""

TD_ATTRIBUTE_BITS = {
    "DEBUG": 0,
    "HGS_PLUS_PROF": 4,
    "PERF_PROF": 5,
    "PMT_PROF": 6,
    "ICSSD": 16,
    "SERVTD_EXT": 17,
    "LASS": 27,
    "SEPT_VE_DISABLE": 28,
    "MIGRATABLE": 29,
    "PKS": 30,
    "KL": 31,
    "TPA": 62,
    "PERFMON": 63,
}
"""Names of the TD attribute bits (TDX module ABI, ATTRIBUTES)."""


class BodyKind(enum.Enum):
    """The three layouts of a TD report inside a quote."""

    TD10 = "TD10"
    TD15 = "TD15"
    TD15_EX = "TD15Ex"


BODY_BYTES = {BodyKind.TD10: 584, BodyKind.TD15: 648, BodyKind.TD15_EX: 885}
BODY_TYPES = {2: BodyKind.TD10, 3: BodyKind.TD15, 4: BodyKind.TD15_EX}
"""Body type of a version 5 quote."""

_TD10 = struct.Struct("<16s48s48s8s8s8s48s48s48s48s48s48s48s48s64s")
_TD15_TAIL = struct.Struct("<16s48s")
_TD15_EX = struct.Struct("<B32s204s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TdReport:
    """The body of a quote: what a policy reads. All fields are bytes as they stand there.

    Measurements are 48 bytes each, `tee_tcb_svn` 16, the attributes and `xfam` 8 (little-endian
    bit sets), `report_data` 64, `td_id` 32. The last five are None where the body has no such
    field: the first two before TD 1.5, the others before TD 1.5-ex. `ex_tail` is what follows
    `td_id`, 204 bytes: of assigned devices and of service TDs that took part in the TD's making.
    """

    tee_tcb_svn: bytes
    mr_seam: bytes
    mr_signer_seam: bytes
    seam_attributes: bytes
    td_attributes: bytes
    xfam: bytes
    mr_td: bytes
    mr_config_id: bytes
    mr_owner: bytes
    mr_owner_config: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    report_data: bytes
    tee_tcb_svn2: bytes | None = None
    mr_service_td: bytes | None = None
    vmid: int | None = None
    td_id: bytes | None = None
    ex_tail: bytes | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quote(TdReport):
    """A quote: its report, and the header fields that say how to read it."""

    version: int
    tee_type: int
    body: BodyKind


def parse_quote(data: bytes) -> Quote:
    """Read a version 4 or 5 TDX quote; nothing in the result is authenticated.

    The signature data must fill the rest of `data` exactly; its inside is dcap-qvl's business.

    Raises: EvidenceMalformedError.
    """
    if not HEADER_BYTES <= len(data) <= MAX_QUOTE_BYTES:
        text = (
            f"quote is {len(data)} bytes long, not {HEADER_BYTES} to {MAX_QUOTE_BYTES}"
        )
        raise EvidenceMalformedError(text)
    version, key_type, tee_type = struct.unpack_from("<HHI", data)
    if version not in (4, 5):
        raise EvidenceMalformedError(
            f"quote version is {version}, not 4 or 5",
            hint="an SGX quote has version 3" if version == 3 else "",
        )
    if tee_type != TEE_TYPE_TDX:
        raise EvidenceMalformedError(f"quote TEE type is {tee_type:#x}, not 0x81 (TDX)")
    if key_type != ECDSA_P256_KEY_TYPE:
        raise EvidenceMalformedError(
            f"quote key type is {key_type}, not 2 (ECDSA P-256)"
        )
    kind, start = _body_kind(data, version)
    end = start + BODY_BYTES[kind]
    _check_signature_data(data, end)
    return _read_body(data[start:end], version, kind)


def _body_kind(data: bytes, version: int) -> tuple[BodyKind, int]:
    """Return the layout of the body and its offset."""
    if version == 4:
        return BodyKind.TD10, HEADER_BYTES
    start = HEADER_BYTES + BODY_DESCRIPTOR_BYTES
    if len(data) < start:
        raise EvidenceMalformedError(f"quote ends at {len(data)}, before its body")
    number, size = struct.unpack_from("<HI", data, HEADER_BYTES)
    kind = BODY_TYPES.get(number)
    if kind is None:
        raise EvidenceMalformedError(
            f"quote body type is {number}, not a TD report (2 to 4)"
        )
    if size != BODY_BYTES[kind]:
        text = (
            f"quote body of type {number} is {size} bytes long, not {BODY_BYTES[kind]}"
        )
        raise EvidenceMalformedError(text)
    return kind, start


def _check_signature_data(data: bytes, offset: int) -> None:
    if len(data) < offset + 4:
        text = f"quote ends at {len(data)}, before its signature data at {offset}"
        raise EvidenceMalformedError(text)
    (size,) = struct.unpack_from("<I", data, offset)
    found = len(data) - offset - 4
    if size != found or size < _MIN_SIGNATURE_BYTES:
        text = f"quote announces {size} bytes of signature data and holds {found}"
        raise EvidenceMalformedError(text)


def _read_body(body: bytes, version: int, kind: BodyKind) -> Quote:
    fields = _TD10.unpack_from(body)
    tcb_svn2 = service_td = td_id = vmid = ex_tail = None
    if kind is not BodyKind.TD10:
        tcb_svn2, service_td = _TD15_TAIL.unpack_from(body, BODY_BYTES[BodyKind.TD10])
    if kind is BodyKind.TD15_EX:
        vmid, td_id, ex_tail = _TD15_EX.unpack_from(body, BODY_BYTES[BodyKind.TD15])
    return Quote(
        version=version,
        tee_type=TEE_TYPE_TDX,
        body=kind,
        tee_tcb_svn=fields[0],
        mr_seam=fields[1],
        mr_signer_seam=fields[2],
        seam_attributes=fields[3],
        td_attributes=fields[4],
        xfam=fields[5],
        mr_td=fields[6],
        mr_config_id=fields[7],
        mr_owner=fields[8],
        mr_owner_config=fields[9],
        rtmrs=(fields[10], fields[11], fields[12], fields[13]),
        report_data=fields[14],
        tee_tcb_svn2=tcb_svn2,
        mr_service_td=service_td,
        vmid=vmid,
        td_id=td_id,
        ex_tail=ex_tail,
    )


def td_attribute_names(attributes: bytes) -> tuple[str, ...]:
    """Return the names of the set bits, lowest first; one without a name is `BIT_n`."""
    value = int.from_bytes(attributes, "little")
    names = {bit: name for name, bit in TD_ATTRIBUTE_BITS.items()}
    return tuple(names.get(bit, f"BIT_{bit}") for bit in range(64) if value >> bit & 1)


def td_attributes_bytes(names: Iterable[str]) -> bytes:
    """Return the 8 bytes that have exactly the named bits set.

    Raises: ValueError for a name that is not in `TD_ATTRIBUTE_BITS`.
    """
    value = 0
    for name in names:
        if name not in TD_ATTRIBUTE_BITS:
            known = ", ".join(TD_ATTRIBUTE_BITS)
            raise ValueError(f"unknown TD attribute {name!r}; known are {known}")
        value |= 1 << TD_ATTRIBUTE_BITS[name]
    return value.to_bytes(8, "little")
