"""The `memory` mapper: verify and decrypt a whole image into memory, for kernels without dm.

The plaintext is a memfd that nobody can write any more, behind a read-only loop device. It costs
as much memory as the image; later changes of the file do not matter.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable
from typing import Literal

from tdxd.core import verity
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, Manifest, volume_key
from tdxd.errors import HostError, TdxdError
from tdxd.host import loop
from tdxd.host.image_file import open_image, open_tree
from tdxd.host.ports import MappedVolume
from tdxd.host.range_worker import Task
from tdxd.host.workers import RANGE_BLOCKS, Workers

__all__ = ["MemoryMapper"]

_NAME = "tdxd:"
_BACKING_PREFIX = f"/memfd:{_NAME}"
_SEALS = (
    fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
)


class MemoryMapper:
    """Implements `ports.Mapper`.

    `limit_bytes` is the largest payload it takes; `workers` how many processes share the work,
    by default one for each processor this process may use.
    """

    name: Literal["dm", "memory"] = "memory"

    def __init__(self, *, limit_bytes: int, workers: int | None = None) -> None:
        self._limit_bytes = limit_bytes
        self._workers = workers or len(os.sched_getaffinity(0))

    def map_volume(
        self, image: str, bundle: KeyBundle, *, cancelled: Callable[[], bool]
    ) -> MappedVolume:
        """Open the image; polls `cancelled` and leaves nothing behind if it turns true.

        Raises: MissingError, BadHeaderError, IntegrityError; HostError, with ENOMEM over the
        limit and with ECANCELED when cancelled.
        """
        manifest = bundle.manifest
        name = f"{_NAME}{manifest.volume_id}:{manifest.generation}"
        with open_image(image, manifest) as image_fd:
            self._check_limit(image, manifest)
            memory = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
            try:
                self._fill(image, image_fd, bundle, memory, cancelled)
                fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
                device, fd = loop.attach(memory, name=name)
            finally:
                os.close(memory)
        return MappedVolume(manifest=manifest, device=device, mapper="memory", fd=fd)

    def _check_limit(self, image: str, manifest: Manifest) -> None:
        if manifest.payload_bytes > self._limit_bytes:
            hint = (
                f"it needs {manifest.payload_bytes} bytes of memory, "
                f"memory_limit_bytes is {self._limit_bytes}"
            )
            raise HostError("map into memory", image, errno.ENOMEM, hint=hint)

    def _fill(
        self,
        image: str,
        image_fd: int,
        bundle: KeyBundle,
        memory: int,
        cancelled: Callable[[], bool],
    ) -> None:
        """Put the verified plaintext of the file system into `memory`."""
        manifest = bundle.manifest
        with volume_key(bundle) as key:
            open_tree(image, image_fd, manifest, key.reveal(), memory)
            task = Task(
                op="open",
                in_fd=image_fd,
                in_base=manifest.payload_offset_bytes,
                out_fd=memory,
                out_base=0,
                digests_fd=memory,
                digests_base=_leaves(manifest) * BLOCK_BYTES,
                key=key.reveal(),
                salt=manifest.salt,
            )
            ranges = -(-manifest.data_blocks // RANGE_BLOCKS)
            count = min(self._workers, ranges)
            with Workers(count, fds=(image_fd, memory), what=image) as workers:
                workers.run(task, blocks=manifest.data_blocks, cancelled=cancelled)
        os.ftruncate(memory, manifest.data_blocks * BLOCK_BYTES)

    def unmap(self, mapped: MappedVolume) -> None:
        """Let go of the loop device and its memory; harmless when repeated.

        The kernel frees both at once, or when the last mount on the device is gone. The
        descriptor is closed only while it still is that device's.
        """
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{mapped.fd}") == mapped.device:
                os.close(mapped.fd)

    def intact(self, mapped: MappedVolume) -> bool:
        """Say that no wrong block was met: every one was verified before there was a device."""
        return mapped.mapper == "memory"

    def sweep(self) -> tuple[str, ...]:
        """Detach the devices that a killed daemon left; those in use go with their last user."""
        found = loop.attached(_BACKING_PREFIX)
        for path in found:
            with contextlib.suppress(TdxdError):  # gone meanwhile
                loop.detach(path)
        return found


def _leaves(manifest: Manifest) -> int:
    """Return the payload block where the digests of the data begin."""
    levels = verity.geometry(manifest.data_blocks).levels
    return levels[-1].first_block if levels else manifest.data_blocks
