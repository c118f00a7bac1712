"""The SGX extension of a PCK certificate: which platform, at which patch level.

Source: Intel SGX PCK Certificate and CRL Profile Specification, rev. 1.5, section 1.3.5: a
SEQUENCE of SEQUENCE {OBJECT IDENTIFIER, value} below 1.2.840.113741.1.13.1.
"""

from __future__ import annotations

import dataclasses

__all__ = ["SGX_EXTENSION_OID", "PckIdentity", "sgx_extension"]

SGX_EXTENSION_OID = "1.2.840.113741.1.13.1"
_BOOLEAN, _INTEGER, _OCTETS, _OID, _ENUMERATED, _SEQUENCE = 1, 2, 4, 6, 10, 0x30
_SCALABLE = b"\x01"
"""SGX type: no memory integrity in hardware, as every TDX platform."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PckIdentity:
    """What a PCK certificate says of its platform.

    `ppid` and `platform_instance_id` are 16 bytes, `fmspc` 6, `pce_id` 2; `cpu_svns` are the 16
    SGX TCB component SVNs.
    """

    ppid: bytes
    platform_instance_id: bytes
    fmspc: bytes
    pce_id: bytes
    cpu_svns: bytes
    pce_svn: int
    dynamic_platform: bool = True
    cached_keys: bool = True
    smt_enabled: bool = True


def sgx_extension(identity: PckIdentity) -> bytes:
    """Return the extension's DER."""
    flags = (
        _entry("1.7.1", _boolean(identity.dynamic_platform)),
        _entry("1.7.2", _boolean(identity.cached_keys)),
        _entry("1.7.3", _boolean(identity.smt_enabled)),
    )
    return _tlv(
        _SEQUENCE,
        _entry("1.1", _tlv(_OCTETS, identity.ppid))
        + _entry("1.2", _tlv(_SEQUENCE, _tcb(identity)))
        + _entry("1.3", _tlv(_OCTETS, identity.pce_id))
        + _entry("1.4", _tlv(_OCTETS, identity.fmspc))
        + _entry("1.5", _tlv(_ENUMERATED, _SCALABLE))
        + _entry("1.6", _tlv(_OCTETS, identity.platform_instance_id))
        + _entry("1.7", _tlv(_SEQUENCE, b"".join(flags))),
    )


def _tcb(identity: PckIdentity) -> bytes:
    components = b"".join(
        _entry(f"1.2.{number}", _integer(svn))
        for number, svn in enumerate(identity.cpu_svns, start=1)
    )
    return (
        components
        + _entry("1.2.17", _integer(identity.pce_svn))
        + _entry("1.2.18", _tlv(_OCTETS, identity.cpu_svns))
    )


def _entry(suffix: str, value: bytes) -> bytes:
    """Return SEQUENCE {1.2.840.113741.1.13.`suffix`, value}."""
    arcs = [int(arc) for arc in f"1.2.840.113741.1.13.{suffix}".split(".")]
    body = bytes([arcs[0] * 40 + arcs[1]]) + b"".join(map(_base128, arcs[2:]))
    return _tlv(_SEQUENCE, _tlv(_OID, body) + value)


def _base128(value: int) -> bytes:
    digits = [value & 0x7F]
    while value := value >> 7:
        digits.append(value & 0x7F | 0x80)
    return bytes(reversed(digits))


def _boolean(value: bool) -> bytes:  # noqa: FBT001
    return _tlv(_BOOLEAN, b"\xff" if value else b"\x00")


def _integer(value: int) -> bytes:
    return _tlv(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def _tlv(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content
