"""A small boot log as firmware, grub and Linux write one, and the quote's report that fits it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from tdxd.core.event_meaning import (
    EV_EFI_ACTION,
    EV_EFI_VARIABLE_DRIVER_CONFIG,
    EV_EVENT_TAG,
    EV_IPL,
    EV_SEPARATOR,
    SECURE_BOOT_VARIABLES,
)
from tdxd.core.eventlog import Event, replay
from tdxd.core.policy import RtmrSet
from tdxd.core.quote import TdReport
from tdxd.core.runtime_log import RuntimeEvent, replay_runtime

COMMAND_LINE = "/vmlinuz root=/dev/vda1 ro"
FILE_TYPE = 0xD
PLATFORM_CONFIG = 0xA


def sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


def event(rtmr: int, kind: int, data: bytes, measured: bytes | None = None) -> Event:
    """An event whose digest is that of `measured`, or else of its data."""
    digest = sha384(data if measured is None else measured)
    return Event(rtmr=rtmr, type=kind, digest=digest, data=data)


def variable_data(name: str, value: bytes) -> bytes:
    vendor = SECURE_BOOT_VARIABLES[name].bytes_le
    head = vendor + struct.pack("<QQ", len(name), len(value))
    return head + name.encode("utf-16-le") + value


def variable(name: str, value: bytes, rtmr: int = 0) -> Event:
    return event(rtmr, EV_EFI_VARIABLE_DRIVER_CONFIG, variable_data(name, value))


def separator(rtmr: int) -> Event:
    return event(rtmr, EV_SEPARATOR, bytes(4))


def grub(text: str, prefix: str = "grub_cmd: ", rtmr: int = 2) -> Event:
    return event(rtmr, EV_IPL, f"{prefix}{text}\0".encode(), text.encode())


def file(path: str, content: bytes) -> Event:
    return event(2, FILE_TYPE, path.encode() + b"\0", content)


def load_options(text: str) -> Event:
    """What Linux' EFI stub logs: the data names the options and does not hold them."""
    data = struct.pack("<II", 0x8F3B22ED, 26) + b"LOADED_IMAGE::LoadOptions\0"
    return event(2, EV_EVENT_TAG, data, (text + "\0").encode("utf-16-le"))


BOOT = (
    event(0, 0x8000000B, b"\x09TdxTable\0", b"the TD HOB"),
    variable("SecureBoot", b"\x01"),
    variable("PK", b"platform key"),
    separator(0),
    event(0, PLATFORM_CONFIG, b"ACPI DATA", b"tables"),
    event(1, EV_EFI_ACTION, b"Calling EFI Application from Boot Option"),
    separator(1),
    event(1, 0x80000003, b"device path", b"a PE image"),
    grub("linux " + COMMAND_LINE),
    file("/vmlinuz", b"the kernel"),
    grub(COMMAND_LINE, "kernel_cmdline: "),
    file("/initrd", b"the initrd"),
    event(1, EV_EFI_ACTION, b"Exit Boot Services Returned with Success"),
)


def report_of(
    events: Sequence[Event] = BOOT, runtime: Sequence[RuntimeEvent] = ()
) -> TdReport:
    """The report of a TD that measured this."""
    rtmr0, rtmr1, rtmr2, rtmr3 = replay(events)
    zero = bytes(48)
    return TdReport(
        tee_tcb_svn=bytes(16),
        mr_seam=zero,
        mr_signer_seam=zero,
        seam_attributes=bytes(8),
        td_attributes=bytes(8),
        xfam=bytes(8),
        mr_td=zero,
        mr_config_id=zero,
        mr_owner=zero,
        mr_owner_config=zero,
        rtmrs=(rtmr0, rtmr1, rtmr2, replay_runtime(rtmr3, runtime)),
        report_data=bytes(64),
    )


def rtmr_set(name: str = "image", events: Sequence[Event] = BOOT) -> RtmrSet:
    """The registers that a policy pins for this boot."""
    values = [value.hex() for value in replay(events)]
    return RtmrSet(
        name=name, rtmr0=values[0], rtmr1=values[1], rtmr2=values[2], rtmr3=values[3]
    )
