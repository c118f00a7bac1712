"""A sealed image as a file that a hostile host provides: open it, and verify its hash tree.

Only the payload is ever read, each block once into private memory; the LUKS2 header in front of
it is for the owner's tools.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import stat
from collections.abc import Iterator

from tdxd.core import sealed, verity
from tdxd.core.bundle import BLOCK_BYTES, Manifest
from tdxd.core.verity import DIGESTS_PER_BLOCK, Level
from tdxd.errors import BadHeaderError, HostError, IntegrityError, MissingError

__all__ = ["check_root", "open_image", "open_tree"]


@contextlib.contextmanager
def open_image(path: str, manifest: Manifest) -> Iterator[int]:
    """Open the image read-only, following no link; yields its descriptor.

    A longer file is accepted, since a block device has its own size: what follows the payload
    is never read.

    Raises: MissingError, BadHeaderError for anything but a regular file or block device,
    IntegrityError for one that is too short, HostError.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer for ever.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as exc:
        raise MissingError(f"{path}: no such file", hint="copy it there") from exc
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            hint = "name the file itself"
            raise BadHeaderError(f"{path}: is a symbolic link", hint=hint) from exc
        if exc.errno in (errno.ENXIO, errno.ENODEV):
            raise BadHeaderError(f"{path}: is no regular file") from exc
        raise HostError.of("open", path, exc) from exc
    try:
        _check_file(path, fd, manifest)
        yield fd
    finally:
        os.close(fd)


def _check_file(path: str, fd: int, manifest: Manifest) -> None:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
        hint = "an image is a file or a block device"
        raise BadHeaderError(f"{path}: is {kind}", hint=hint)
    name = f"{manifest.volume_id} generation {manifest.generation}"
    tree_blocks = verity.geometry(manifest.data_blocks).hash_blocks
    if manifest.hash_blocks != tree_blocks:
        raise IntegrityError(
            f"{path}: the manifest of {name} has {manifest.hash_blocks} hash blocks, "
            f"its {manifest.data_blocks} data blocks need {tree_blocks}",
            hint="the bundle is damaged; seal again",
        )
    size = os.lseek(fd, 0, os.SEEK_END)
    if size < manifest.image_bytes:
        raise IntegrityError(
            f"{path}: {size} bytes, {name} needs {manifest.image_bytes}",
            hint="the file is truncated or another image; copy it again",
        )


def open_tree(path: str, fd: int, manifest: Manifest, key: bytes, out_fd: int) -> None:
    """Decrypt the hash tree and verify it from the root down.

    Verified hash blocks are written to `out_fd` at their place in the payload, so that
    the digests of data block n stand at (first leaf block)·4096 + n·32. With one data block
    there is no tree, and the root hash itself is written behind the data.

    Raises: IntegrityError, before anything else is read if the key and the file do not belong
    together; HostError.
    """
    levels = verity.geometry(manifest.data_blocks).levels
    if not levels:
        os.pwrite(out_fd, manifest.root_hash, manifest.data_blocks * BLOCK_BYTES)
        return
    tree = _Tree(path=path, fd=fd, manifest=manifest, key=key, out_fd=out_fd)
    tree.open_top(levels[0].first_block)
    for above, level in itertools.pairwise(levels):
        tree.open_level(above, level)


def check_root(path: str, fd: int, manifest: Manifest, key: bytes) -> None:
    """Decrypt the one block that the root hash covers, and verify it.

    So one sealed image is told from another by one read, whatever their size.

    Raises: IntegrityError, HostError.
    """
    levels = verity.geometry(manifest.data_blocks).levels
    top = levels[0].first_block if levels else 0
    _Tree(path=path, fd=fd, manifest=manifest, key=key, out_fd=-1).open_top(top)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Tree:
    """What is decrypted and verified is written to `out_fd`, or dropped if that is -1."""

    path: str
    fd: int
    manifest: Manifest
    key: bytes
    out_fd: int

    def open_top(self, block: int) -> None:
        bad = self._open_run(block, 1, self.manifest.root_hash)
        if bad is not None:
            name = f"{self.manifest.volume_id} generation {self.manifest.generation}"
            raise IntegrityError(
                f"{self.path}: does not open with the key of {name}",
                hint="is it the image of another volume, or of another generation?",
            )

    def open_level(self, above: Level, level: Level) -> None:
        for index in range(above.blocks):
            offset = (above.first_block + index) * BLOCK_BYTES
            digests = os.pread(self.out_fd, BLOCK_BYTES, offset)
            start = index * DIGESTS_PER_BLOCK
            count = min(DIGESTS_PER_BLOCK, level.blocks - start)
            bad = self._open_run(level.first_block + start, count, digests)
            if bad is not None:
                raise IntegrityError(
                    f"{self.path}: block {bad} is not what was sealed",
                    hint="the file was damaged or tampered with; copy it again",
                )

    def _open_run(self, first: int, count: int, digests: bytes) -> int | None:
        """Decrypt, verify and keep some blocks; return the first bad one's number."""
        offset = self.manifest.payload_offset_bytes + first * BLOCK_BYTES
        try:
            run = os.pread(self.fd, count * BLOCK_BYTES, offset)
        except OSError as exc:
            raise HostError.of("read", self.path, exc) from exc
        if len(run) != count * BLOCK_BYTES:
            raise IntegrityError(
                f"{self.path}: ends inside block {first + len(run) // BLOCK_BYTES}",
                hint="the file is truncated; copy it again",
            )
        out = memoryview(bytearray(len(run) + sealed.RUN_SLACK_BYTES))
        bad = sealed.open_run(
            self.key,
            self.manifest.salt,
            first_block=first,
            run=memoryview(run),
            digests=memoryview(digests),
            out=out,
        )
        if bad >= 0:
            return first + bad
        if self.out_fd >= 0:
            os.pwrite(self.out_fd, out[: len(run)], first * BLOCK_BYTES)
        return None
