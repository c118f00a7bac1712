"""Image files on the host's disk: which candidates there are, and how to tell a new one."""

from __future__ import annotations

import dataclasses
import glob
import os

__all__ = ["ImageFile", "candidates", "tag_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageFile:
    """A file that matches a volume's `image`; nothing is derived from its name."""

    path: str
    device: int
    inode: int
    size_bytes: int
    mtime_ns: int


def candidates(pattern: str) -> tuple[ImageFile, ...]:
    """Return what matches a path or a glob now, sorted by path; links are not followed.

    A name that is not printable text is passed over: the host gave it, and status, events and
    terminals would have to show it.
    """
    found = []
    for path in sorted(filter(str.isprintable, glob.glob(pattern))):
        try:
            seen = os.lstat(path)
        except OSError:
            continue  # gone between the listing and the look
        found.append(
            ImageFile(
                path=path,
                device=seen.st_dev,
                inode=seen.st_ino,
                size_bytes=seen.st_size,
                mtime_ns=seen.st_mtime_ns,
            )
        )
    return tuple(found)


def tag_of(files: tuple[ImageFile, ...]) -> tuple[int, ...] | None:
    """Return a value that changes when any candidate is replaced; `None` without one."""
    numbers: list[int] = []
    for item in files:
        numbers += [item.device, item.inode, item.size_bytes, item.mtime_ns]
    return tuple(numbers) or None
