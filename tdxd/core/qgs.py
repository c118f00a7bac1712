"""The frames of Intel's quote generation service (QGS), and where it listens. Pure: no socket.

A stream carries frames: the length as u32 big-endian, then a message whose header is u16 major,
u16 minor, u32 type, u32 size (header included), u32 error, all little-endian. A quote request
holds a TDREPORT and no list of quoting enclaves; the response an id (ignored) and the quote.

Source: Intel DCAP, QuoteGeneration/quote_wrapper/qgs_msg_lib (qgs_msg_lib.h, qgs_msg_lib.cpp) and
tdx_attest/tdx_attest.c.
"""

from __future__ import annotations

import dataclasses
import re
import struct

from tdxd.core.td_report import TD_REPORT_BYTES
from tdxd.errors import EvidenceMalformedError, EvidenceUnavailableError

__all__ = [
    "DEFAULT_PORT",
    "HEADER_BYTES",
    "HOST_CID",
    "LENGTH_BYTES",
    "MAX_MESSAGE_BYTES",
    "QgsAddress",
    "encode_frame",
    "error_words",
    "frame_length",
    "parse_qgs_address",
    "parse_quote_request",
    "parse_quote_response",
    "port_of_attest_conf",
    "quote_request",
    "quote_response",
]

HOST_CID = 2
"""The hypervisor's address in AF_VSOCK (VMADDR_CID_HOST)."""
DEFAULT_PORT = 4050
LENGTH_BYTES = 4
HEADER_BYTES = 16
MAX_MESSAGE_BYTES = 16384
"""What libtdx_attest takes at most."""
_MAJOR = 1
"""Intel checks this one alone; of the minor versions 0 is old, 1 stands since DCAP 1.21."""
_GET_QUOTE_REQUEST = 0
_GET_QUOTE_RESPONSE = 1
_HEADER = struct.Struct("<HHIII")
_SIZES = struct.Struct("<II")
_ANY = 0xFFFFFFFF
"""VMADDR_CID_ANY and VMADDR_PORT_ANY: where nobody listens."""
_PORT_LINE = re.compile(r"^\s*port\s*=\s*([0-9]{1,10})\s*$", re.MULTILINE | re.ASCII)
_HOST_HINT = (
    "on the host: journalctl -u qgsd; its platform must be registered, its PCCS reached"
)
_ERRORS = {
    0x00012001: "an unexpected error; its own log tells which",
    0x00012002: "it is out of memory",
    0x00012003: "it calls the TD report invalid: this TD does not run on its platform",
    0x00012004: "it does not know this version of the protocol",
    0x00012005: "it does not know this type of message",
    0x00012006: "it calls the size of the message wrong",
    0x00012007: "it calls the error code of the message wrong",
}


@dataclasses.dataclass(frozen=True, slots=True)
class QgsAddress:
    """A Unix socket's `path`; or `cid` and `port` of AF_VSOCK, `None`: the machine's default."""

    path: str | None = None
    cid: int = HOST_CID
    port: int | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"vsock:{self.cid}" + ("" if self.port is None else f":{self.port}")


def parse_qgs_address(text: str) -> QgsAddress:
    """Parse `vsock:CID`, `vsock:CID:PORT` or `unix:/PATH`.

    Raises: ValueError, naming the text.
    """
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest.startswith("/"):
        return QgsAddress(path=rest)
    numbers = rest.split(":")
    decimal = all(one.isascii() and one.isdigit() and len(one) <= 10 for one in numbers)
    if kind == "vsock" and decimal and len(numbers) <= 2:
        cid, *port = (int(one) for one in numbers)
        if all(0 <= value < _ANY for value in (cid, *port)):
            return QgsAddress(cid=cid, port=port[0] if port else None)
    msg = f"{text!r} is not vsock:CID, vsock:CID:PORT or unix:/PATH"
    raise ValueError(msg)


def port_of_attest_conf(text: str) -> int | None:
    """Return the port that /etc/tdx-attest.conf names; None if it names none above 0.

    Source: get_vsock_port() of tdx_attest.c: the first line `port = NUMBER` of at most 10 digits
    counts, whatever else stands in the file.
    """
    found = _PORT_LINE.search(text)
    number = int(found[1]) if found else 0
    return number if 0 < number < _ANY else None


def encode_frame(message: bytes) -> bytes:
    """Put the length before a message."""
    return len(message).to_bytes(LENGTH_BYTES, "big") + message


def frame_length(prefix: bytes) -> int:
    """Return the length that the first 4 bytes of a frame announce: 16 to 16384.

    Raises: EvidenceMalformedError.
    """
    length = int.from_bytes(prefix, "big")
    if HEADER_BYTES <= length <= MAX_MESSAGE_BYTES:
        return length
    text = f"QGS announces a message of {length} bytes, not {HEADER_BYTES} to {MAX_MESSAGE_BYTES}"
    swapped = int.from_bytes(prefix, "little")
    hint = ""
    if HEADER_BYTES <= swapped <= MAX_MESSAGE_BYTES:
        hint = "its length has the wrong byte order: what listens there is no QGS"
    raise EvidenceMalformedError(text, hint=hint)


def quote_request(td_report: bytes, *, minor: int = 1) -> bytes:
    """Return the 1048 bytes that ask for a quote over a TDREPORT of 1024 bytes."""
    if len(td_report) != TD_REPORT_BYTES:
        msg = f"TD report is {len(td_report)} bytes long, not {TD_REPORT_BYTES}"
        raise ValueError(msg)
    return _message(minor, _GET_QUOTE_REQUEST, 0, td_report, b"")


def parse_quote_request(message: bytes) -> tuple[int, bytes]:
    """Return the requester's minor version and the TDREPORT.

    Raises: EvidenceMalformedError.
    """
    minor, error, report, rest = _parse(message, _GET_QUOTE_REQUEST)
    if error or rest or len(report) != TD_REPORT_BYTES:
        text = f"QGS request holds a report of {len(report)} bytes, {len(rest)} more, error {error}"
        raise EvidenceMalformedError(text)
    return minor, report


def quote_response(quote: bytes, *, minor: int = 1, error: int = 0) -> bytes:
    """Return the response that holds a quote, or an error without one."""
    return _message(minor, _GET_QUOTE_RESPONSE, error, b"", quote)


def parse_quote_response(message: bytes) -> bytes:
    """Return the quote; it is not looked into.

    Raises: EvidenceMalformedError; EvidenceUnavailableError if QGS reports an error or no quote.
    """
    _minor, error, _id, quote = _parse(message, _GET_QUOTE_RESPONSE)
    if error:
        text = f"the host's QGS made no quote: {error_words(error)}"
        raise EvidenceUnavailableError(text, hint=_HOST_HINT)
    if not quote:
        text = "the host's QGS answered with an empty quote"
        raise EvidenceUnavailableError(text, hint=_HOST_HINT)
    return quote


def error_words(error: int) -> str:
    """Say what an error code of QGS means."""
    return f"error {error:#010x}: {_ERRORS.get(error, 'unknown to this program')}"


def _message(minor: int, kind: int, error: int, first: bytes, second: bytes) -> bytes:
    size = HEADER_BYTES + _SIZES.size + len(first) + len(second)
    head = _HEADER.pack(_MAJOR, minor, kind, size, error)
    return head + _SIZES.pack(len(first), len(second)) + first + second


def _parse(message: bytes, kind: int) -> tuple[int, int, bytes, bytes]:
    """Return minor version, error, and the two variable parts, which fill the message exactly."""
    if len(message) < HEADER_BYTES:
        text = f"QGS message is {len(message)} bytes long, shorter than its header"
        raise EvidenceMalformedError(text)
    major, minor, found, size, error = _HEADER.unpack_from(message)
    if major != _MAJOR:
        text = f"QGS speaks version {major}.{minor}, not {_MAJOR}"
        hint = "its numbers have the wrong byte order" if major == 0x0100 else ""
        raise EvidenceMalformedError(text, hint=hint)
    if found != kind:
        raise EvidenceMalformedError(f"QGS message is of type {found}, not {kind}")
    if size != len(message):
        text = f"QGS message says it is {size} bytes long and is {len(message)}"
        raise EvidenceMalformedError(text)
    if error and size == HEADER_BYTES:
        return minor, error, b"", b""
    if size < HEADER_BYTES + _SIZES.size:
        raise EvidenceMalformedError(f"QGS message of {size} bytes has no sizes")
    first, second = _SIZES.unpack_from(message, HEADER_BYTES)
    start = HEADER_BYTES + _SIZES.size
    if first + second != size - start:
        text = (
            f"QGS message announces {first} and {second} bytes and holds {size - start}"
        )
        raise EvidenceMalformedError(text)
    return minor, error, message[start : start + first], message[start + first :]
