"""Checks a sealed image: against its public record, or block by block with the bundle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from tdxd.core import verity
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, volume_key
from tdxd.core.sealed import PublicRecord
from tdxd.errors import HostError, IntegrityError
from tdxd.host.image_file import open_image, open_tree
from tdxd.host.range_worker import Task
from tdxd.host.workers import Workers

__all__ = ["check_payload", "check_record"]

Progress = Callable[[int, int], None]

_HINT = "the file is damaged, of another generation, or of another volume"
_READ_BYTES = 1024 * 1024


def check_record(image: Path, record: PublicRecord, progress: Progress) -> None:
    """Compare size and SHA-256 of an image with its public record; proves a good copy only.

    Raises: IntegrityError, HostError.
    """
    try:
        with image.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.size_bytes:
                text = f"{image}: {size} bytes, the record says {record.size_bytes}"
                raise IntegrityError(text, hint=_HINT)
            state, done = hashlib.sha256(), 0
            while data := file.read(_READ_BYTES):
                state.update(data)
                done += len(data)
                progress(done, size)
    except OSError as exc:
        raise HostError.of("read", str(image), exc) from exc
    if state.hexdigest() != record.sha256:
        text = f"{image}: SHA-256 {state.hexdigest()}, the record says {record.sha256}"
        raise IntegrityError(text, hint=_HINT)


def check_payload(image: Path, bundle: KeyBundle, progress: Progress) -> None:
    """Decrypt the whole payload and verify it up to the root hash, on all processors.

    Takes memory for the hash tree, which is 0.8 % of the image.

    Raises: MissingError, BadHeaderError; IntegrityError, naming a wrong block; HostError.
    """
    manifest, name = bundle.manifest, str(image)
    levels = verity.geometry(manifest.data_blocks).levels
    leaves = levels[-1].first_block if levels else manifest.data_blocks
    done = 0

    def count(_first: int, blocks: int) -> None:
        nonlocal done
        done += blocks * BLOCK_BYTES
        progress(done, manifest.data_blocks * BLOCK_BYTES)

    tree = os.memfd_create("hash tree")
    try:
        with open_image(name, manifest) as fd, volume_key(bundle) as key:
            open_tree(name, fd, manifest, key.reveal(), tree)
            task = Task(
                op="open",
                in_fd=fd,
                in_base=manifest.payload_offset_bytes,
                out_fd=-1,
                out_base=0,
                digests_fd=tree,
                digests_base=leaves * BLOCK_BYTES,
                key=key.reveal(),
                salt=manifest.salt,
            )
            processes = len(os.sched_getaffinity(0))
            with Workers(processes, fds=(fd, tree), what=name) as workers:
                workers.run(task, blocks=manifest.data_blocks, done=count)
    finally:
        os.close(tree)
