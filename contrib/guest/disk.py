"""A disk of the guest, as its host sees it: a raw file that it can read and change at any time."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

__all__ = ["Disk"]

_BLOCK_BYTES = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """`name` is its serial number: /dev/disk/by-id/virtio-NAME in the guest."""

    name: str
    path: Path
    read_only: bool = False

    def offset_of(self, file: str, offset_bytes: int) -> int:
        """Return where in the raw file a byte of an ext4 file stands.

        For a mounted disk this is right for files that were there before it was mounted: what the
        guest makes, even synced, stands in the journal for a while.
        """
        block = offset_bytes // _BLOCK_BYTES
        found = self._debugfs(f'bmap "{file}" {block}').split()
        assert found, f"{file}: not on disk {self.name}"
        assert found[-1] != b"0", f"{file}: a hole at {offset_bytes}"
        return int(found[-1]) * _BLOCK_BYTES + offset_bytes % _BLOCK_BYTES

    def flip(self, file: str, offset_bytes: int, mask: int = 1) -> None:
        """Change one byte of a file behind the guest's back."""
        place = self.offset_of(file, offset_bytes)
        fd = os.open(self.path, os.O_RDWR)
        try:
            (byte,) = os.pread(fd, 1, place)
            os.pwrite(fd, bytes([byte ^ mask]), place)
        finally:
            os.close(fd)

    def read(self, file: str) -> bytes:
        """Return a file's content, as `offset_of` finds it."""
        return self._debugfs(f'cat "{file}"')

    def _debugfs(self, request: str) -> bytes:
        done = subprocess.run(
            ["debugfs", "-R", request, self.path],
            capture_output=True,
            check=True,
            timeout=60,
        )
        errors = done.stderr.splitlines()[1:]  # the first line is its version
        assert not errors, f"{request}: {errors}"
        return done.stdout
