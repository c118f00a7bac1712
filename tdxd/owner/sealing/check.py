"""Checks a sealed image: against its public record, or block by block with the bundle."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, Manifest, volume_key
from tdxd.core.sealed import PublicRecord
from tdxd.core.secret import Secret
from tdxd.errors import BadHeaderError, HostError, IntegrityError
from tdxd.host.image_file import open_image, open_tree
from tdxd.host.range_worker import Task
from tdxd.host.workers import Workers
from tdxd.owner.sealing.payload import real_path

__all__ = ["check_payload", "check_record", "decrypt_payload"]

Progress = Callable[[int, int], None]

_HINT = "the file is damaged, of another generation, or of another volume"
_READ_BYTES = 1024 * 1024


def check_record(image: Path, record: PublicRecord, progress: Progress) -> None:
    """Compare size and SHA-256 of an image with its public record; proves a good copy only.

    A block device may be longer than the image on it.

    Raises: BadHeaderError for anything but a file or block device; IntegrityError, HostError.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer for ever.
        with open(
            os.open(image, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb"
        ) as file:
            _check_size(image, file.fileno(), record)
            state, done = hashlib.sha256(), 0
            while data := file.read(min(_READ_BYTES, record.size_bytes - done)):
                state.update(data)
                done += len(data)
                progress(done, record.size_bytes)
    except OSError as exc:
        raise HostError.of("read", str(image), exc) from exc
    if state.hexdigest() != record.sha256:
        text = f"{image}: SHA-256 {state.hexdigest()}, the record says {record.sha256}"
        raise IntegrityError(text, hint=_HINT)


def _check_size(image: Path, fd: int, record: PublicRecord) -> None:
    mode = os.fstat(fd).st_mode
    on_device = stat.S_ISBLK(mode)
    if not (stat.S_ISREG(mode) or on_device):
        hint = "an image is a file or a block device"
        raise BadHeaderError(
            f"{image}: is neither a file nor a block device", hint=hint
        )
    size = os.lseek(fd, 0, os.SEEK_END)
    os.lseek(fd, 0, os.SEEK_SET)
    if size < record.size_bytes or (size > record.size_bytes and not on_device):
        text = f"{image}: {size} bytes, the record says {record.size_bytes}"
        raise IntegrityError(text, hint=_HINT)


def check_payload(image: Path, bundle: KeyBundle, progress: Progress) -> None:
    """Decrypt the whole payload and verify it up to the root hash, on all processors.

    Memory does not grow with the image, but by the upper levels of its hash tree: 1 MiB for 16 GiB.

    Raises: MissingError, BadHeaderError; IntegrityError, naming a wrong block; HostError.
    """
    name = str(real_path(image))
    tree = os.memfd_create("hash tree")
    try:
        with open_image(name, bundle.manifest) as fd, volume_key(bundle) as key:
            decrypt_payload(
                name,
                fd,
                bundle.manifest,
                key,
                tree_fd=tree,
                out_fd=-1,
                progress=progress,
            )
    finally:
        os.close(tree)


def decrypt_payload(
    name: str,
    fd: int,
    manifest: Manifest,
    key: Secret,
    *,
    tree_fd: int,
    out_fd: int,
    progress: Progress,
) -> None:
    """Verify the payload of an open image, on all processors.

    The upper levels of the hash tree are written to `tree_fd`, the file system to `out_fd`
    unless that is -1, each at its place in the payload: they may be the same.

    Raises: IntegrityError, naming a wrong block; HostError.
    """
    whole, done = manifest.data_blocks * BLOCK_BYTES, 0

    def count(_first: int, blocks: int) -> None:
        nonlocal done
        done += blocks * BLOCK_BYTES
        progress(done, whole)

    leaves = open_tree(name, fd, manifest, key.reveal(), tree_fd)
    task = Task(
        op="open",
        in_fd=fd,
        in_base=manifest.payload_offset_bytes,
        out_fd=out_fd,
        out_base=0,
        digests_fd=tree_fd,
        digests_base=leaves.digests_base,
        leaf_block=leaves.first_block,
        key=key.reveal(),
        salt=manifest.salt,
    )
    fds = {one for one in (fd, tree_fd, out_fd) if one >= 0}
    processes = len(os.sched_getaffinity(0))
    with Workers(processes, fds=tuple(fds), what=name) as workers:
        workers.run(task, blocks=manifest.data_blocks, done=count)
