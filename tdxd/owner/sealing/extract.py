"""Looks into a sealed image with its bundle: lists the files, and extracts them.

Needs no root and no mount: the file system is read as `tdxd.core.erofs` does, every block verified
against the root hash before it is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from tdxd.core import erofs
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle
from tdxd.errors import DataError, HostError
from tdxd.owner.sealing.payload import Payload, open_payload

__all__ = ["extract", "files"]

Progress = Callable[[int, int], None]


def files(image: Path, bundle: KeyBundle) -> Iterator[erofs.Entry]:
    """Yield what the image holds; only the blocks that say so are read.

    Raises: MissingError, BadHeaderError, IntegrityError, DataError, HostError.
    """
    with open_payload(image, bundle) as payload:
        yield from erofs.entries(payload.read)


def extract(
    image: Path, bundle: KeyBundle, target: Path, progress: Progress
) -> tuple[int, int]:
    """Write everything into a new directory; return how many files and bytes.

    It gets its name last: until then it is `.NAME.PID.new` beside it, mode 0700, and is removed
    if anything fails.

    Raises: DataError if there is something of that name; MissingError, BadHeaderError,
    IntegrityError, HostError.
    """
    if os.path.lexists(target):
        raise DataError(f"{target} exists already", hint="name a new directory")
    whole = bundle.manifest.data_blocks * BLOCK_BYTES
    count = done = 0
    with _new_directory(target) as fresh, open_payload(image, bundle) as payload:
        linked: dict[int, Path] = {}
        for entry in erofs.entries(payload.read):
            path = fresh / entry.path
            if stat.S_ISDIR(entry.inode.mode):
                # Sealed modes let nobody write; the owner may want to.
                path.mkdir(entry.inode.mode & 0o777 | 0o200)
            elif entry.inode.nid in linked:
                path.hardlink_to(linked[entry.inode.nid])
                count += 1
            else:
                _write_file(path, entry.inode, payload)
                if entry.inode.links > 1:
                    linked[entry.inode.nid] = path
                count, done = count + 1, done + entry.inode.size_bytes
                progress(min(done, whole), whole)
    return count, done


@contextlib.contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """Yield a directory that is renamed to `target` in the end, or removed."""
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        fresh.mkdir(0o700)
    except OSError as exc:
        raise HostError.of("make the directory", str(fresh), exc) from exc
    try:
        yield fresh
        _bring_to_disk(fresh)
        mask = os.umask(0)
        os.umask(mask)
        fresh.chmod(0o755 & ~mask)
        fresh.rename(target)
    except OSError as exc:
        shutil.rmtree(fresh, ignore_errors=True)
        name = exc.filename2 or exc.filename or str(target)
        raise HostError.of("extract to", os.fsdecode(name), exc) from exc
    except BaseException:  # SIGINT and SIGTERM, too
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _write_file(path: Path, inode: erofs.Inode, payload: Payload) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, inode.mode & 0o777 | 0o200)
    with open(fd, "wb", buffering=0) as file:
        got = 0
        for offset, size in inode.extents:
            for piece in payload.pieces(offset, size):
                got += len(piece)
                rest = piece
                while rest:
                    rest = rest[file.write(rest) :]
    if got != inode.size_bytes:
        raise DataError(
            f"the file system ends inside {inode.size_bytes} bytes of a file"
        )


def _bring_to_disk(directory: Path) -> None:
    """Sync the whole file system at once: one fsync per file would take minutes."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))
    finally:
        os.close(fd)
