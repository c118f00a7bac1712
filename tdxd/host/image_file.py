"""An image as a file that a hostile host provides: open it, and verify a sealed one's hash tree.

Of a sealed image only the payload is ever read, each block once into private memory; the LUKS2
header in front of it is for the owner's tools. A foreign image's header is read once by
`read_into`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from tdxd.core import sealed, verity
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, Manifest, volume_key
from tdxd.core.foreign import AnyBundle
from tdxd.core.verity import DIGESTS_PER_BLOCK, Level
from tdxd.errors import BadHeaderError, HostError, IntegrityError, MissingError
from tdxd.host.os_error import as_host_error

__all__ = [
    "Leaves",
    "check_image",
    "check_root",
    "open_file",
    "open_image",
    "open_tree",
    "read_into",
    "read_range",
    "size_bytes",
]

_TWO_LEVELS = 2

_WRITING_HINT = (
    "a writable volume needs a drop-in for tdxd.service: ReadWritePaths= with the directory of "
    "the image, DeviceAllow=block-loop rw, DeviceAllow=block-device-mapper rw; where the image "
    "is a disk, rw for its class, too"
)


@contextlib.contextmanager
def open_image(path: str, manifest: Manifest) -> Iterator[int]:
    """Open a sealed image read-only, following no link; yields its descriptor.

    A longer file is accepted, since a block device has its own size: what follows the payload
    is never read.

    Raises: MissingError, BadHeaderError for anything but a regular file or block device,
    IntegrityError for one that is too short, HostError.
    """
    with open_file(path) as fd:
        _check_size(path, fd, manifest)
        yield fd


@contextlib.contextmanager
def open_file(path: str, *, writable: bool = False) -> Iterator[int]:
    """Open a regular file or block device, following no link; yields its descriptor.

    Raises: MissingError, BadHeaderError for anything else, HostError.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer for ever; without O_NOCTTY, a terminal
    # that the host puts there would be ours, and its interrupt key, too.
    access = os.O_RDWR if writable else os.O_RDONLY
    flags = access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as exc:
        raise MissingError(f"{path}: no such file", hint="copy it there") from exc
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            hint = "name the file itself"
            raise BadHeaderError(f"{path}: is a symbolic link", hint=hint) from exc
        if exc.errno == errno.EISDIR:  # for writing it does not even open
            raise _no_image(path, "a directory") from exc
        if exc.errno in (errno.ENXIO, errno.ENODEV):
            raise BadHeaderError(f"{path}: is no regular file") from exc
        hint = _WRITING_HINT if writable else ""
        raise HostError.of("open", path, exc, hint=hint) from exc
    try:
        with as_host_error("examine", path):
            mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise _no_image(path, kind)
        yield fd
    finally:
        os.close(fd)


def _no_image(path: str, kind: str) -> BadHeaderError:
    hint = "an image is a file or a block device"
    return BadHeaderError(f"{path}: is {kind}", hint=hint)


def size_bytes(path: str, fd: int) -> int:
    """Return the size of an open file or block device.

    Raises: HostError.
    """
    with as_host_error("examine", path):
        return os.lseek(fd, 0, os.SEEK_END)


def read_range(path: str, fd: int, start: int, size: int) -> bytes:
    """Return `size` bytes, or all there are, each read once into private memory.

    Raises: HostError.
    """
    buffer = bytearray(size)
    got = read_into(path, fd, start, memoryview(buffer))
    return bytes(memoryview(buffer)[:got])


def read_into(path: str, fd: int, start: int, into: memoryview) -> int:
    """Fill a private buffer, each byte read once; return how much of it there was.

    Raises: HostError.
    """
    got = 0
    with as_host_error("read", path):
        while got < len(into) and (more := os.preadv(fd, [into[got:]], start + got)):
            got += more
    return got


def _check_size(path: str, fd: int, manifest: Manifest) -> None:
    name = f"{manifest.volume_id} generation {manifest.generation}"
    tree_blocks = verity.geometry(manifest.data_blocks).hash_blocks
    if manifest.hash_blocks != tree_blocks:
        raise IntegrityError(
            f"{path}: the manifest of {name} has {manifest.hash_blocks} hash blocks, "
            f"its {manifest.data_blocks} data blocks need {tree_blocks}",
            hint="the bundle is damaged; seal again",
        )
    size = size_bytes(path, fd)
    if size < manifest.image_bytes:
        raise IntegrityError(
            f"{path}: {size} bytes, {name} needs {manifest.image_bytes}",
            hint="the file is truncated or another image; copy it again",
        )


class Leaves(NamedTuple):
    """Where the lowest level of a hash tree lies, which is verified together with the data.

    `first_block` counts in the payload; it is -1 if there is one data block only, and no tree.
    The digest of its block n is 32 bytes at `digests_base` + n·32 of the file that the levels
    above were written to; without a tree it is that of the data block.
    """

    first_block: int
    digests_base: int


def open_tree(
    path: str, fd: int, manifest: Manifest, key: bytes, out_fd: int
) -> Leaves:
    """Decrypt the hash tree and verify it from the root down, all but its lowest level.

    Verified hash blocks are written to `out_fd` at their place in the payload: 1/16000 of the
    image. With one level or none, the root hash itself is written behind the data.

    Raises: IntegrityError, before anything else is read if the key and the file do not belong
    together; HostError.
    """
    levels = verity.geometry(manifest.data_blocks).levels
    if len(levels) < _TWO_LEVELS:
        check_root(path, fd, manifest, key)
        offset = manifest.data_blocks * BLOCK_BYTES
        _write(path, out_fd, memoryview(manifest.root_hash), offset)
        return Leaves(levels[0].first_block if levels else -1, offset)
    tree = _Tree(path=path, fd=fd, manifest=manifest, key=key, out_fd=out_fd)
    tree.open_top(levels[0].first_block)
    for above, level in itertools.pairwise(levels[:-1]):
        tree.open_level(above, level)
    return Leaves(levels[-1].first_block, levels[-2].first_block * BLOCK_BYTES)


def check_root(path: str, fd: int, manifest: Manifest, key: bytes) -> None:
    """Decrypt the one block that the root hash covers, and verify it.

    So one sealed image is told from another by one read, whatever their size.

    Raises: IntegrityError, HostError.
    """
    levels = verity.geometry(manifest.data_blocks).levels
    top = levels[0].first_block if levels else 0
    _Tree(path=path, fd=fd, manifest=manifest, key=key, out_fd=-1).open_top(top)


def check_image(path: str, bundle: AnyBundle) -> None:
    """Check that an image is the one of a key, by one block; of a foreign one nothing is known.

    Raises: MissingError, BadHeaderError, IntegrityError, HostError.
    """
    if isinstance(bundle, KeyBundle):
        with open_image(path, bundle.manifest) as fd, volume_key(bundle) as key:
            check_root(path, fd, bundle.manifest, key.reveal())


def _write(path: str, fd: int, data: memoryview, offset: int) -> None:
    with as_host_error("keep the hash tree of", path):
        while data:
            done = os.pwrite(fd, data, offset)
            data, offset = data[done:], offset + done


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
            with as_host_error("keep the hash tree of", self.path):
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
        with as_host_error("read", self.path):
            run = os.pread(self.fd, count * BLOCK_BYTES, offset)
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
            offset = first * BLOCK_BYTES
            _write(self.path, self.out_fd, out[: len(run)], offset)
        return None
