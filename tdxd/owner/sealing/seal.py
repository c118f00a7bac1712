"""Seals a directory into an encrypted image."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from pathlib import Path

from tdxd.core import erofs
from tdxd.core.bundle import BLOCK_BYTES
from tdxd.errors import DataError, HostError
from tdxd.owner.sealing.image import (
    ImageRequest,
    Progress,
    Sealed,
    derived,
    make_image,
)
from tdxd.owner.sealing.survey import survey

__all__ = ["SealRequest", "Sealed", "seal_directory"]

_NOT_FOUND = 127
"""What setpriv ends with, as a shell does, if there is no such program."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SealRequest(ImageRequest):
    """What to seal, and where to."""

    directory: Path


def seal_directory(request: SealRequest, progress: Progress) -> Sealed:
    """Seal a directory.

    Raises: DataError for a directory that cannot be sealed, HostError for the disk; nothing
    is left under a final name.
    """
    size_bytes = survey(request.directory)

    def fill(plain: int) -> None:
        progress("file system", 0, size_bytes)
        _make_file_system(request, plain)

    return make_image(request, size_bytes, fill, progress)


def _make_file_system(request: SealRequest, plain: int) -> None:
    """Run mkfs.erofs into `plain`, then set the modes that it cannot."""
    uuid_bytes = derived(request, "fs-uuid", 16)
    text = uuid_bytes.hex()
    uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    target = f"/proc/self/fd/{plain}"
    options = ("-x-1", "-T0", f"-U{uuid}", "--all-root", "--quiet")
    # An absolute path cannot be taken for an option.
    source = str(request.directory.absolute())
    _run_mkfs([*options, target, source], plain, request.directory)
    os.ftruncate(plain, -(-os.fstat(plain).st_size // BLOCK_BYTES) * BLOCK_BYTES)

    def read(offset: int, size: int) -> bytes:
        return os.pread(plain, size, offset)

    for offset, data in erofs.normalised_modes(read):
        os.pwrite(plain, data, offset)
    patch = erofs.superblock_checksum(read(0, BLOCK_BYTES))
    if patch is not None:
        os.pwrite(plain, patch[1], patch[0])


def _run_mkfs(arguments: list[str], plain: int, directory: Path) -> None:
    """Run mkfs.erofs, which ends when we do: it must not fill the disk after kill -9."""
    command = ["setpriv", "--pdeathsig=KILL", "mkfs.erofs", *arguments]
    try:
        made = subprocess.run(
            command, pass_fds=(plain,), capture_output=True, check=False
        )
    except FileNotFoundError as exc:
        hint = "install util-linux"
        raise HostError.of("run", "setpriv", exc, hint=hint) from exc
    if made.returncode == _NOT_FOUND:
        hint = "install erofs-utils"
        raise HostError("run", "mkfs.erofs", errno.ENOENT, hint=hint)
    if made.returncode != 0:
        said = made.stderr.decode(errors="replace").strip()[-300:]
        raise DataError(f"mkfs.erofs failed on {directory}: {said}")
