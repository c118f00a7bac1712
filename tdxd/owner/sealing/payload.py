"""The plaintext of a sealed image, read in any order; no byte is handed out unverified."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdxd.core import sealed, verity
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, Manifest, volume_key
from tdxd.core.verity import DIGEST_BYTES, DIGESTS_PER_BLOCK
from tdxd.errors import HostError, IntegrityError
from tdxd.host.image_file import check_root, open_image
from tdxd.host.range_worker import blocks_of, crypt

__all__ = ["Payload", "open_payload", "real_path"]

_KEPT_BLOCKS = 256
"""Hash blocks that are kept once verified: 1 MiB, for 128 MiB of data."""


def real_path(image: Path) -> Path:
    """Follow links as far as the image: to the owner, /dev/disk/by-id/… is a good name."""
    return image.resolve() if image.is_symlink() else image


@contextmanager
def open_payload(image: Path, bundle: KeyBundle) -> Iterator[Payload]:
    """Open an image, a file or a block device, and see that the bundle fits.

    Raises: MissingError, BadHeaderError, IntegrityError, HostError.
    """
    name, manifest = str(real_path(image)), bundle.manifest
    with open_image(name, manifest) as fd, volume_key(bundle) as key:
        check_root(name, fd, manifest, key.reveal())
        yield Payload(fd, manifest, key.reveal(), name=name)


class Payload:
    """Reads an open image; memory does not grow with it."""

    def __init__(self, fd: int, manifest: Manifest, key: bytes, *, name: str) -> None:
        self._fd, self._manifest, self._name = fd, manifest, name
        self._levels = verity.geometry(manifest.data_blocks).levels
        size = DIGESTS_PER_BLOCK * BLOCK_BYTES
        source, self._plain = bytearray(size), bytearray(size)
        self._source = memoryview(source)
        blocks, plain = blocks_of(source), blocks_of(self._plain)
        self._decrypt = crypt(key, blocks, plain, encrypt=False)
        self._kept = functools.lru_cache(_KEPT_BLOCKS)(self._hash_block)

    def read(self, offset: int, size: int) -> bytes:
        """Return a piece of the file system, shorter where that ends.

        Raises: IntegrityError, naming a wrong block; HostError.
        """
        return b"".join(self.pieces(offset, size))

    def pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        """Yield a piece of the file system in parts, each valid until the next is asked for."""
        stop = min(offset + size, self._manifest.data_blocks * BLOCK_BYTES)
        while offset < stop:
            first, skip = divmod(offset, BLOCK_BYTES)
            # One hash block's worth at most: to the end of what its digests cover.
            room = DIGESTS_PER_BLOCK - first % DIGESTS_PER_BLOCK
            count = min(room, -(-stop // BLOCK_BYTES) - first)
            run = self._open_run(first, count, self._digests(len(self._levels), first))
            piece = run[skip : skip + stop - offset]
            yield piece
            offset += len(piece)

    def _digests(self, depth: int, index: int) -> memoryview:
        """Return the digests of the blocks from `index` on, of the level below level `depth`."""
        if depth == 0:
            return memoryview(self._manifest.root_hash)
        place, at = divmod(index, DIGESTS_PER_BLOCK)
        return memoryview(self._kept(depth - 1, place))[at * DIGEST_BYTES :]

    def _hash_block(self, depth: int, index: int) -> bytes:
        digests = self._digests(depth, index)
        block = self._levels[depth].first_block + index
        return bytes(self._open_run(block, 1, digests))

    def _open_run(self, first: int, count: int, digests: memoryview) -> memoryview:
        size = count * BLOCK_BYTES
        offset = self._manifest.payload_offset_bytes + first * BLOCK_BYTES
        got = 0
        while got < size:
            try:
                more = os.preadv(self._fd, [self._source[got:size]], offset + got)
            except OSError as exc:
                raise HostError.of("read", self._name, exc) from exc
            if more == 0:
                block = first + got // BLOCK_BYTES
                raise IntegrityError(
                    f"{self._name}: ends inside block {block}",
                    hint="the file is truncated; copy it again",
                )
            got += more
        self._decrypt(first, count)
        plain = memoryview(self._plain)[:size]
        bad = sealed.first_bad_block(self._manifest.salt, plain, digests)
        if bad >= 0:
            raise IntegrityError(
                f"{self._name}: block {first + bad} is not what was sealed",
                hint="the file was damaged or tampered with; copy it again",
            )
        return plain
