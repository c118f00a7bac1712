"""Boots a disk by OVMF with a virtual TPM, which stands in for RTMRs: what was extended, and when.

The TPM's emulator writes down each command that it gets, so that an image that tells nobody
anything is observed, too.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from contrib.guest.machine import CPU

__all__ = ["Extend", "MeasuredBoot", "measured_boot"]

_FIRMWARE = Path("/usr/share/OVMF")
_SHA384_BYTES = 48
_SIZES = {0x0004: 20, 0x000B: 32, 0x000C: _SHA384_BYTES, 0x000D: 64}
_PCR_EXTEND = 0x0182
_HEX_LINE = re.compile(r" ?(?:[0-9A-F]{2} )+\s*")


@dataclasses.dataclass(frozen=True, slots=True)
class Extend:
    """One TPM2_PCR_Extend: the PCR and the SHA-384 digest."""

    pcr: int
    digest: bytes


class MeasuredBoot:
    """A machine that is on; `serial` are the files of its two serial ports."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self._log = directory / "swtpm.log"
        self._process = process
        self.serial = (directory / "serial0", directory / "serial1")

    @property
    def on(self) -> bool:
        return self._process.poll() is None

    def extends(self) -> list[Extend]:
        """Return what was extended so far, in order."""
        return list(_extends(self._log.read_text(encoding="ascii", errors="replace")))

    def wait(self, done: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait until something is so, or the machine goes off by itself."""
        deadline = time.monotonic() + timeout_s
        while self.on and not done():
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.2)

    def tail(self) -> str:
        text = self.serial[0].read_text(errors="replace")
        return "\n".join(text.splitlines()[-40:])


@contextmanager
def measured_boot(
    directory: Path, disk: Path, options: Sequence[str] = ()
) -> Iterator[MeasuredBoot]:
    """Switch a machine on that boots this disk, which is not written to."""
    directory.mkdir()
    (directory / "tpm").mkdir()
    shutil.copy(_FIRMWARE / "OVMF_VARS_4M.fd", directory / "vars.fd")
    emulator = [
        *("swtpm", "socket", "--tpm2", "--terminate"),
        *("--tpmstate", f"dir={directory}/tpm"),
        *("--ctrl", f"type=unixio,path={directory}/tpm.sock"),
        *("--log", f"file={directory}/swtpm.log,level=20"),
    ]
    processes = [_started(emulator, directory / "swtpm.out")]
    try:
        deadline = time.monotonic() + 10
        while not (directory / "tpm.sock").exists():
            assert time.monotonic() < deadline, (directory / "swtpm.out").read_text()
            time.sleep(0.02)
        command = [*_machine(directory, disk), *options]
        processes.append(_started(command, directory / "qemu.out"))
        yield MeasuredBoot(directory, processes[-1])
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait(30)


def _started(command: Sequence[str], out: Path) -> subprocess.Popen[bytes]:
    with out.open("wb") as log:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _machine(directory: Path, disk: Path) -> list[str]:
    flash = "if=pflash,format=raw"
    code = _FIRMWARE / "OVMF_CODE_4M.fd"
    return [
        *("qemu-system-x86_64", "-no-user-config", "-nodefaults", "-no-reboot"),
        *("-machine", "q35,hpet=off", "-accel", "tcg,thread=multi", "-cpu", CPU),
        *("-smp", "2", "-m", "1024M", "-display", "none"),
        *("-drive", f"{flash},readonly=on,file={code}"),
        *("-drive", f"{flash},file={directory}/vars.fd"),
        *("-drive", f"file={disk},format=raw,if=none,id=disk,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=disk,bootindex=0"),
        *("-chardev", f"socket,id=tpm,path={directory}/tpm.sock"),
        *("-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0"),
        *(
            "-serial",
            f"file:{directory}/serial0",
            "-serial",
            f"file:{directory}/serial1",
        ),
    ]


def _extends(log: str) -> Iterator[Extend]:
    """Read the emulator's log: commands in hex after a line that announces them."""
    for part in log.split("SWTPM_IO_Read: length ")[1:]:
        size, *lines = part.split("\n")
        digits = ""
        for line in lines:
            if not _HEX_LINE.fullmatch(line):
                break
            digits += line
        data = bytes.fromhex(digits)
        if len(data) == int(size) and int.from_bytes(data[6:10], "big") == _PCR_EXTEND:
            yield _extend(data)


def _extend(data: bytes) -> Extend:
    """Read the command: handle, authorisation, then digests by algorithm.

    Source: TPM 2.0 Library Specification, part 3, TPM2_PCR_Extend.
    """
    at = 14 + 4 + int.from_bytes(data[14:18], "big")
    count = int.from_bytes(data[at : at + 4], "big")
    at += 4
    for _ in range(count):
        algorithm = int.from_bytes(data[at : at + 2], "big")
        size = _SIZES[algorithm]
        if size == _SHA384_BYTES:
            pcr = int.from_bytes(data[10:14], "big")
            return Extend(pcr, data[at + 2 : at + 2 + size])
        at += 2 + size
    raise AssertionError("the bank SHA-384 is not active")
