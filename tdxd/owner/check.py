"""Checks a sealed image: against its public record, or block by block with the bundle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from tdxd.core import sealed, verity
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, volume_key
from tdxd.core.sealed import PublicRecord
from tdxd.errors import HostError, IntegrityError

__all__ = ["check_payload", "check_record"]

Progress = Callable[[int, int], None]

_RUN_BLOCKS = 64
_HINT = "the file is damaged, of another generation, or of another volume"


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as exc:
        raise HostError.of("open", str(path), exc) from exc


def check_record(image: Path, record: PublicRecord, progress: Progress) -> None:
    """Compare size and SHA-256 of an image with its public record; proves a good copy only.

    Raises: IntegrityError, HostError.
    """
    fd = _open(image)
    try:
        size = os.fstat(fd).st_size
        if size != record.size_bytes:
            text = f"{image}: {size} bytes, the record says {record.size_bytes}"
            raise IntegrityError(text, hint=_HINT)
        state, step = hashlib.sha256(), 1024 * 1024
        for offset in range(0, size, step):
            state.update(os.pread(fd, step, offset))
            progress(min(offset + step, size), size)
    finally:
        os.close(fd)
    if state.hexdigest() != record.sha256:
        text = f"{image}: SHA-256 {state.hexdigest()}, the record says {record.sha256}"
        raise IntegrityError(text, hint=_HINT)


def check_payload(image: Path, bundle: KeyBundle, progress: Progress) -> None:
    """Decrypt the whole payload and verify it up to the root hash, level by level.

    Raises: IntegrityError, naming the first wrong block; HostError.
    """
    fd = _open(image)
    try:
        size, needed = os.fstat(fd).st_size, bundle.manifest.image_bytes
        if size < needed:
            text = f"{image}: {size} bytes, the bundle's manifest needs {needed}"
            raise IntegrityError(text, hint=_HINT)
        with volume_key(bundle) as key:
            _check_levels(fd, image, bundle, key.reveal(), progress)
    finally:
        os.close(fd)


def _check_levels(
    fd: int, image: Path, bundle: KeyBundle, key: bytes, progress: Progress
) -> None:
    manifest = bundle.manifest
    levels = verity.geometry(manifest.data_blocks).levels
    whole = manifest.payload_bytes
    covers = [(level.covered_first_block, level.covered_blocks) for level in levels]
    tops = [(levels[0].first_block, 1), *covers] if levels else [(0, 1)]
    digest_at: int | None = (
        None  # the first block of the level above; none above the root
    )
    done = 0
    for first, blocks in tops:
        for start in range(0, blocks, _RUN_BLOCKS):
            count = min(_RUN_BLOCKS, blocks - start)
            digests = manifest.root_hash
            if digest_at is not None:
                digests = _digests(fd, bundle, key, digest_at, start, count)
            plain = _plain(fd, bundle, key, first + start, count)
            bad = sealed.first_bad_block(manifest.salt, plain, memoryview(digests))
            if bad >= 0:
                text = f"{image}: block {first + start + bad} of the payload is wrong"
                raise IntegrityError(text, hint=_HINT)
            done += count * BLOCK_BYTES
            progress(done, whole)
        digest_at = first


def _plain(
    fd: int, bundle: KeyBundle, key: bytes, first: int, count: int
) -> memoryview:
    offset = bundle.manifest.payload_offset_bytes + first * BLOCK_BYTES
    run = os.pread(fd, count * BLOCK_BYTES, offset)
    out = memoryview(bytearray(len(run) + sealed.RUN_SLACK_BYTES))
    sealed.decrypt_run(key, first, memoryview(run), out)
    return out[: len(run)]


def _digests(
    fd: int, bundle: KeyBundle, key: bytes, level_first: int, start: int, count: int
) -> bytes:
    """Return the digests of `count` blocks from the level above, which was verified before."""
    per = verity.DIGESTS_PER_BLOCK
    first, last = start // per, (start + count - 1) // per
    blocks = _plain(fd, bundle, key, level_first + first, last - first + 1)
    begin = (start - first * per) * verity.DIGEST_BYTES
    return bytes(blocks[begin : begin + count * verity.DIGEST_BYTES])
