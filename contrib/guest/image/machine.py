"""A virtual machine that boots the measured image as a cloud does: firmware, then the disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from contrib.guest.build_image import GuestImage
from contrib.guest.disk import Disk
from contrib.guest.image.build import MeasuredImage
from contrib.guest.machine import CPU, Machine

__all__ = ["FirmwareMachine"]

_FIRMWARE = Path("/usr/share/OVMF")
# QEMU 7.2 emulates the instruction cmpxchg16b wrongly, and kernel 6.12 uses it, unless its command
# line says that it must not. Programs need it: numpy does not load without.
_KERNEL_LEAVES_CX16 = "clearcpuid=112,141"


class FirmwareMachine(Machine):
    """Boots the image's disk, or one in its place, by OVMF."""

    def __init__(
        self,
        directory: Path,
        image: MeasuredImage,
        *,
        root: Path | None = None,
        disks: Sequence[Disk] = (),
        memory_mib: int = 3072,
        options: Sequence[str] = (),
    ) -> None:
        """`root` is what is booted instead of the image's own disk."""
        none, source = Path("/dev/null"), root or image.disk
        parts = GuestImage(kernel=none, initrd=none, root=source, tools=none)
        super().__init__(
            directory, parts, disks=disks, memory_mib=memory_mib, options=options
        )
        self.facts = image.read_facts()
        # A copy without layers: where a byte lies in it is known.
        self.root.path.unlink()
        self.root_format = "raw"
        self.root = Disk(name="root", path=directory / "root.raw")
        copy = ["cp", "--sparse=always", "--", str(source), str(self.root.path)]
        subprocess.run(copy, check=True, timeout=60)
        self.variables = directory / "variables.fd"
        """The firmware's variables, which the host keeps and may write."""
        shutil.copy(_FIRMWARE / "OVMF_VARS_4M.fd", self.variables)

    def booted_by(self) -> list[str]:
        flash = "if=pflash,format=raw"
        left = _KERNEL_LEAVES_CX16 in self.facts["command_line"].split()
        return [
            *("-cpu", CPU if left else f"{CPU},cx16=off"),
            *("-drive", f"{flash},readonly=on,file={_FIRMWARE}/OVMF_CODE_4M.fd"),
            *("-drive", f"{flash},file={self.variables}"),
        ]

    def flip_root(self, place: int, mask: int = 1) -> None:
        """Change one byte of the disk that is booted, behind the guest's back."""
        fd = os.open(self.root.path, os.O_RDWR)
        try:
            (byte,) = os.pread(fd, 1, place)
            os.pwrite(fd, bytes([byte ^ mask]), place)
        finally:
            os.close(fd)
