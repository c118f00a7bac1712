"""The events of a boot that firmware, stub and kernel measure, predicted from the image alone.

The boot: firmware finds /EFI/BOOT/BOOTX64.EFI on a GPT disk by its first boot option and starts
it; it is a UKI, whose stub loads the kernel through firmware; the kernel takes over. No boot option
failed before, and there is no other boot loader.

Source: edk2, OvmfPkg/Tcg/TdTcg2Dxe and SecurityPkg/Tcg/Tcg2Dxe (actions, separators),
DxeTpm2MeasureBootLib (partition table, images); systemd and Linux as in core/measure/uki.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

from tdxd.core.event_meaning import (
    EV_EFI_ACTION,
    EV_EFI_GPT_EVENT,
    EV_EFI_VARIABLE_BOOT,
    EV_EVENT_TAG,
    EV_IPL,
    EV_SEPARATOR,
)
from tdxd.core.eventlog import extend
from tdxd.core.measure.gpt import GptTable
from tdxd.core.measure.machines import Machine
from tdxd.core.measure.pe import authenticode_sha384, parse_pe
from tdxd.core.measure.uki import Uki

__all__ = ["BOOT_APPLICATION", "ExpectedEvent", "Prediction", "predict"]

BOOT_APPLICATION = 0x80000003
_CALLING = b"Calling EFI Application from Boot Option"
_EXITING = (
    b"Exit Boot Services Invocation",
    b"Exit Boot Services Returned with Success",
)
_PCR_LOADER, _PCR_TABLE = 4, 5
_PCR_KERNEL, _PCR_SECTIONS = 9, 11


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedEvent:
    """One event: `digest` is its SHA-384, or None with the reason `why` it cannot be known.

    `any_number`: events of this type may stand here, none or several; where the digest is known,
    none or this one.
    """

    register: int
    type: int
    digest: bytes | None
    meaning: str
    why: str = ""
    any_number: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The events of a boot in the order of each register, and what is worth a word."""

    machine: Machine
    events: tuple[ExpectedEvent, ...]
    remarks: tuple[str, ...] = ()

    def unknown(self, register: int) -> tuple[ExpectedEvent, ...]:
        """Return the events that keep a register from being computed."""
        return tuple(
            one
            for one in self.events
            if one.register == register and (one.digest is None or one.any_number)
        )

    def value(self, register: int) -> bytes | None:
        """Return a register after the boot, 48 bytes; None if an event of it is not known."""
        if self.unknown(register):
            return None
        value = bytes(48)
        for one in self.events:
            if one.register == register:
                assert one.digest is not None
                value = extend(value, one.digest)
        return value


def predict(uki: Uki, table: GptTable | None, machine: Machine) -> Prediction:
    """Return what a boot of this UKI from a disk with this table measures.

    `table` None: the disk is not known. Registers that firmware fills from what the host gives it
    (RTMR0; PCR 0 and 1) are left out.

    Raises: DataError, if the kernel in the UKI is no PE image.
    """
    events = (
        *_firmware(uki, table, machine),
        *_stub(uki, machine),
        *_kernel(uki, machine),
    )
    return Prediction(
        machine=machine,
        events=tuple(one for one in events if one.register in machine.predicted),
        remarks=tuple(_remarks(uki, machine)),
    )


def _sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()


# --- firmware ------------------------------------------------------------------


def _firmware(
    uki: Uki, table: GptTable | None, machine: Machine
) -> Iterator[ExpectedEvent]:
    loader, disk = machine.register(_PCR_LOADER), machine.register(_PCR_TABLE)
    if machine.boot_variables != 0 and not machine.tpm:
        yield ExpectedEvent(
            register=machine.boot_variables,
            type=EV_EFI_VARIABLE_BOOT,
            digest=None,
            meaning="BootOrder and Boot####",
            why="the cloud sets the boot variables; they name its disk and its firmware's volume",
            any_number=True,
        )
    yield _action(loader, _CALLING, "firmware starts its first boot option")
    for register in machine.separators:
        yield ExpectedEvent(
            register=register,
            type=EV_SEPARATOR,
            digest=_sha384(bytes(4)),
            meaning="end of what firmware does by itself",
        )
    yield _partition_table(disk, table)
    yield _application(loader, uki.digest, "the UKI, EFI\\BOOT\\BOOTX64.EFI: all of it")
    yield _kernel_image(loader, uki)
    for text in _EXITING:
        yield _action(disk, text, "the kernel takes the machine over")


def _action(register: int, text: bytes, meaning: str) -> ExpectedEvent:
    return ExpectedEvent(
        register=register,
        type=EV_EFI_ACTION,
        digest=_sha384(text),
        meaning=f"{text.decode()}: {meaning}",
    )


def _application(register: int, digest: bytes, meaning: str) -> ExpectedEvent:
    return ExpectedEvent(
        register=register, type=BOOT_APPLICATION, digest=digest, meaning=meaning
    )


def _kernel_image(register: int, uki: Uki) -> ExpectedEvent:
    kernel = uki.section(".linux") or b""
    digest = authenticode_sha384(parse_pe(kernel, source="section .linux"))
    meaning = "the kernel in the UKI, started by its stub"
    if uki.starts_kernel_itself:
        return ExpectedEvent(
            register=register,
            type=BOOT_APPLICATION,
            digest=digest,
            meaning=meaning,
            why="systemd-stub from 258 on may start it without firmware",
            any_number=True,
        )
    return _application(register, digest, meaning)


def _partition_table(register: int, table: GptTable | None) -> ExpectedEvent:
    if table is None:
        return ExpectedEvent(
            register=register,
            type=EV_EFI_GPT_EVENT,
            digest=None,
            meaning="partition table of the disk",
            why="only the UKI was given, not the disk with its partition table",
        )
    return ExpectedEvent(
        register=register,
        type=EV_EFI_GPT_EVENT,
        digest=_sha384(table.event_data),
        meaning=f"partition table of the disk {table.disk}",
    )


# --- stub and kernel -----------------------------------------------------------


def _stub(uki: Uki, machine: Machine) -> Iterator[ExpectedEvent]:
    if not (machine.tpm or uki.stub_to_rtmr):
        return
    register = machine.register(_PCR_SECTIONS)
    for name in uki.measured_sections:
        contents = uki.section(name) or b""
        for data, what in ((name.encode() + b"\0", "name"), (contents, "content")):
            yield ExpectedEvent(
                register=register,
                type=EV_IPL,
                digest=_sha384(data),
                meaning=f"section {name} of the UKI: its {what}",
            )
    if not uki.known_rules:
        yield ExpectedEvent(
            register=register,
            type=EV_IPL,
            digest=None,
            meaning="what a newer systemd-stub measures besides",
            why=f"systemd-stub {uki.version} is newer than what this version knows",
            any_number=True,
        )


def _kernel(uki: Uki, machine: Machine) -> Iterator[ExpectedEvent]:
    if not (machine.tpm or uki.kernel_to_rtmr):
        return
    register = machine.register(_PCR_KERNEL)
    if uki.kernel_measures_options:
        options = uki.load_options()
        yield _tagged(
            register, options, "kernel command line", "the UKI does not fix it"
        )
    if uki.kernel_measures_initrd:
        initrd = uki.initrd()
        yield _tagged(register, initrd, "initrd", "the stub adds archives of its own")


def _tagged(register: int, data: bytes | None, meaning: str, why: str) -> ExpectedEvent:
    return ExpectedEvent(
        register=register,
        type=EV_EVENT_TAG,
        digest=None if data is None else _sha384(data),
        meaning=f"{meaning}, as the kernel got it",
        why=why if data is None else "",
    )


def _remarks(uki: Uki, machine: Machine) -> Iterator[str]:
    if machine.tpm or (uki.kernel_to_rtmr and uki.kernel_measures_initrd):
        return
    if not uki.stub_to_rtmr:
        yield (
            f"systemd-stub {uki.version_text} and the kernel extend no RTMR: what the stub takes "
            "from the EFI system partition besides the UKI, such as credentials, is in no register"
        )
    yield (
        "the kernel's EFI stub extends no RTMR (Linux 6.9 and later do): a command line that a "
        "boot option brings is in the register of the boot variables alone"
    )
