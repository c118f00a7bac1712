"""What one event of a CCEL log says, where its digest proves it.

A digest covers neither the type of its event nor, in general, its data. So each type has a rule
of its own here, by which the digest is computed again from the data; where it does not agree, the
event has no meaning. And the rules cannot tell one another's bytes apart: who gets chosen bytes
measured (ACPI tables, boot variables, files that grub reads) can pass them off as another type's.
`core/event_rules.py` says how a policy must deal with that.

How many events of the 11 real CCEL files in the test vectors get a meaning (tests/core/
test_event_meaning.py counts them again):

    EV_EFI_VARIABLE_DRIVER_CONFIG     50 of 50   SHA-384 of UEFI_VARIABLE_DATA
    EV_EFI_VARIABLE_AUTHORITY         12 of 12   the same
    EV_EFI_VARIABLE_BOOT              31 of 31   of the value alone: the name is not proved
    EV_EFI_ACTION                     30 of 30   of the string
    EV_SEPARATOR                      22 of 22   of the four bytes
    EV_EFI_GPT_EVENT                   7 of 7    of UEFI_GPT_DATA
    EV_IPL                           146 of 189  of the string that grub or systemd-stub measured;
                                                 what they read from a file or a section has none
    EV_EVENT_TAG                       2 of 10   of the tagged event; Linux' own stub hashes load
                                                 options and initrd, and names them only
    all others                         0 of 78   firmware volumes, PE images, TD HOB, ACPI tables

Source: TCG PC Client Platform Firmware Profile 1.06, section 10.4.1 (event types); UEFI 2.10,
section 32.2 (key databases); GRUB, grub-core/commands/tpm.c; systemd, src/boot/measure.c.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import struct
import uuid

from tdxd.core.eventlog import EV_NO_ACTION, Event

__all__ = [
    "EV_EFI_ACTION",
    "EV_EFI_VARIABLE_DRIVER_CONFIG",
    "EV_EVENT_TAG",
    "EV_IPL",
    "EV_SEPARATOR",
    "SECURE_BOOT_VARIABLES",
    "SEPARATOR_DIGESTS",
    "Meaning",
    "describe",
    "meaning_of",
    "text_digests",
    "type_name",
    "variable_digest",
]

EV_POST_CODE = 0x1
EV_SEPARATOR = 0x4
EV_EVENT_TAG = 0x6
EV_IPL = 0xD
EV_EFI_VARIABLE_DRIVER_CONFIG = 0x80000001
EV_EFI_VARIABLE_BOOT = 0x80000002
EV_EFI_GPT_EVENT = 0x80000006
EV_EFI_ACTION = 0x80000007
EV_EFI_VARIABLE_BOOT2 = 0x8000000C
EV_EFI_VARIABLE_AUTHORITY = 0x800000E0

_TYPE_NAMES = {
    EV_POST_CODE: "EV_POST_CODE",
    EV_NO_ACTION: "EV_NO_ACTION",
    EV_SEPARATOR: "EV_SEPARATOR",
    0x5: "EV_ACTION",
    EV_EVENT_TAG: "EV_EVENT_TAG",
    0x7: "EV_S_CRTM_CONTENTS",
    0x8: "EV_S_CRTM_VERSION",
    0xA: "EV_PLATFORM_CONFIG_FLAGS",
    0xB: "EV_TABLE_OF_DEVICES",
    0xC: "EV_COMPACT_HASH",
    EV_IPL: "EV_IPL",
    EV_EFI_VARIABLE_DRIVER_CONFIG: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    EV_EFI_VARIABLE_BOOT: "EV_EFI_VARIABLE_BOOT",
    0x80000003: "EV_EFI_BOOT_SERVICES_APPLICATION",
    0x80000004: "EV_EFI_BOOT_SERVICES_DRIVER",
    0x80000005: "EV_EFI_RUNTIME_SERVICES_DRIVER",
    EV_EFI_GPT_EVENT: "EV_EFI_GPT_EVENT",
    EV_EFI_ACTION: "EV_EFI_ACTION",
    0x80000008: "EV_EFI_PLATFORM_FIRMWARE_BLOB",
    0x80000009: "EV_EFI_HANDOFF_TABLES",
    0x8000000A: "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
    0x8000000B: "EV_EFI_HANDOFF_TABLES2",
    EV_EFI_VARIABLE_BOOT2: "EV_EFI_VARIABLE_BOOT2",
    EV_EFI_VARIABLE_AUTHORITY: "EV_EFI_VARIABLE_AUTHORITY",
}

_GLOBAL = uuid.UUID("8be4df61-93ca-11d2-aa0d-00e098032b8c")
_IMAGE_SECURITY = uuid.UUID("d719b2cb-3d3a-4596-a3bc-dad00e67656f")
SECURE_BOOT_VARIABLES = {
    "SecureBoot": _GLOBAL,
    "PK": _GLOBAL,
    "KEK": _GLOBAL,
    "db": _IMAGE_SECURITY,
    "dbx": _IMAGE_SECURITY,
    "dbt": _IMAGE_SECURITY,
    "dbr": _IMAGE_SECURITY,
}
"""The variables that firmware measures before the first separator, and their vendor GUIDs."""
_SEPARATORS = (bytes(4), b"\xff" * 4, b"\x01\0\0\0")
SEPARATOR_DIGESTS = tuple(hashlib.sha384(data).digest() for data in _SEPARATORS)
"""Digests by which a separator is known, whatever type its event claims; the last is "error"."""
_GRUB_PREFIXES = (
    b"grub_cmd: ",
    b"kernel_cmdline: ",
    b"module_cmdline: ",
    b"grub_cmd ",
    b"grub_kernel_cmdline ",
)
"""What grub writes before the string that it measures: since 2.04 with a colon."""
_VARIABLE = struct.Struct("<16sQQ")
_GPT_SIGNATURE = b"EFI PART"
_GPT_HEADER_BYTES = 92
_GPT_DISK_GUID = slice(56, 72)
_SHOWN_CHARS = 80
_IPL_MAX_BYTES = 65536
"""Boot loaders measure command lines and names; real ones have up to 2 KiB."""
_READABLE = re.compile(rb"(?:[\x20-\x7e]\0){3,}|[\x20-\x7e]{3,}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Meaning:
    """What the digest of an event proves about its data.

    kind            name                       value
    variable        NAME or NAME-VENDORGUID    its value in hex
    boot-variable   not proved, empty          its value in hex
    text            empty                      the string
    separator       empty                      four bytes in hex
    gpt             empty                      GUID of the disk
    tagged          the tag in hex             its data in hex
    """

    kind: str
    name: str = ""
    value: str


def meaning_of(event: Event) -> Meaning | None:
    """Return what an event says if its digest is computed again from its data.

    None for EV_NO_ACTION, which extends nothing, and for every type without such a rule.
    """
    if event.type == EV_IPL:
        return _ipl(event)
    if event.type == EV_EFI_VARIABLE_BOOT:
        return _boot_variable(event)
    reader = _WHOLE_DATA.get(event.type)
    if reader is None or hashlib.sha384(event.data).digest() != event.digest:
        return None
    return reader(event.data)


def variable_digest(name: str, value: bytes) -> bytes:
    """Return the digest of a variable of `SECURE_BOOT_VARIABLES` with that value, 48 bytes."""
    head = _VARIABLE.pack(SECURE_BOOT_VARIABLES[name].bytes_le, len(name), len(value))
    return hashlib.sha384(head + name.encode("utf-16-le") + value).digest()


def text_digests(text: str) -> tuple[bytes, ...]:
    """Return the digests of a string as boot loaders measure one.

    UTF-8 or UTF-16LE, each without and with a final NUL.
    """
    forms = (text.encode(), text.encode("utf-16-le"))
    ends = (b"", b"\0"), (b"", b"\0\0")
    return tuple(
        hashlib.sha384(form + end).digest()
        for form, both in zip(forms, ends, strict=True)
        for end in both
    )


def type_name(kind: int) -> str:
    """Return the specification's name of an event type, or the number."""
    return _TYPE_NAMES.get(kind, f"{kind:#010x}")


def describe(event: Event) -> str:
    """Return the type and the content on one line of printable ASCII, shortened.

    What the digest does not prove is marked so.
    """
    meaning = meaning_of(event)
    if meaning is None:
        shown = _readable(event.data)
        return f"{type_name(event.type)} {shown} (not proved by its digest)"
    parts = (type_name(event.type), meaning.name, meaning.value)
    return " ".join(_short(part) for part in parts if part)


# --- rules of the types --------------------------------------------------------


def _variable(data: bytes) -> Meaning | None:
    """Read UEFI_VARIABLE_DATA, which must fill `data` exactly."""
    if len(data) < _VARIABLE.size:
        return None
    vendor, name_chars, value_bytes = _VARIABLE.unpack_from(data)
    value_at = _VARIABLE.size + 2 * name_chars
    if value_at + value_bytes != len(data):
        return None
    name = _decode(data[_VARIABLE.size : value_at], "utf-16-le")
    if name is None:
        return None
    guid = uuid.UUID(bytes_le=vendor)
    if SECURE_BOOT_VARIABLES.get(name) != guid:
        name = f"{name}-{guid}"
    return Meaning(kind="variable", name=name, value=data[value_at:].hex())


def _boot_variable(event: Event) -> Meaning | None:
    if len(event.data) < _VARIABLE.size:
        return None
    _, name_chars, _ = _VARIABLE.unpack_from(event.data)
    value = event.data[_VARIABLE.size + 2 * name_chars :]
    if hashlib.sha384(value).digest() != event.digest:
        return None
    return Meaning(kind="boot-variable", value=value.hex())


def _separator(data: bytes) -> Meaning | None:
    return Meaning(kind="separator", value=data.hex()) if data in _SEPARATORS else None


def _text(data: bytes) -> Meaning | None:
    text = _decode(data.rstrip(b"\0"), "utf-8")
    return None if text is None else Meaning(kind="text", value=text)


def _gpt(data: bytes) -> Meaning | None:
    if not data.startswith(_GPT_SIGNATURE) or len(data) < _GPT_HEADER_BYTES:
        return None
    return Meaning(kind="gpt", value=str(uuid.UUID(bytes_le=data[_GPT_DISK_GUID])))


def _tagged(data: bytes) -> Meaning | None:
    """Read TCG_PCClientTaggedEvent: tag, size, data."""
    if len(data) < 8:
        return None
    tag, size = struct.unpack_from("<II", data)
    if size != len(data) - 8:
        return None
    return Meaning(kind="tagged", name=f"{tag:#010x}", value=data[8:].hex())


_WHOLE_DATA = {
    EV_EFI_VARIABLE_DRIVER_CONFIG: _variable,
    EV_EFI_VARIABLE_BOOT2: _variable,
    EV_EFI_VARIABLE_AUTHORITY: _variable,
    EV_SEPARATOR: _separator,
    EV_EFI_ACTION: _text,
    EV_POST_CODE: _text,
    EV_EFI_GPT_EVENT: _gpt,
    EV_EVENT_TAG: _tagged,
}
"""Types whose digest is that of all the data, and how the data reads then."""


def _ipl(event: Event) -> Meaning | None:
    """Find the string of grub or systemd-stub that has the digest.

    What follows the first NUL is not measured (grub logs one byte too many) and not read.
    """
    if len(event.data) > _IPL_MAX_BYTES:
        return None
    head = event.data.split(b"\0", 1)[0]
    prefix = next((one for one in _GRUB_PREFIXES if head.startswith(one)), b"")
    candidates = (
        _decode(head.removeprefix(prefix), "utf-8"),
        _decode(event.data, "utf-16-le"),
    )
    for candidate in candidates:
        text = candidate and candidate.split("\0", 1)[0]
        if text and event.digest in text_digests(text):
            return Meaning(kind="text", value=text)
    return None


def _decode(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


# --- showing -------------------------------------------------------------------


def _short(text: str) -> str:
    """Return printable ASCII only: logs must not write to the owner's terminal."""
    head = text[: _SHOWN_CHARS + 1]
    clean = "".join(char if " " <= char <= "~" else "." for char in head)
    return clean if len(clean) <= _SHOWN_CHARS else clean[: _SHOWN_CHARS - 3] + "..."


def _readable(data: bytes) -> str:
    """Return the longest readable run in `data`, quoted, or its length."""
    runs = _READABLE.findall(data[:4096])
    if not runs:
        return f"{len(data)} bytes"
    return f'"{_short(max(runs, key=len).replace(bytes(1), b"").decode())}"'
