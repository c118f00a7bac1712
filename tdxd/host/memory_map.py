"""The `memory` mapper: verify and decrypt a whole image into memory, for kernels without dm.

The plaintext is a memfd that nobody can write any more, behind a read-only loop device. It costs
as much memory as the image; later changes of the file do not matter. A foreign image is decrypted
only: there is nothing to verify it with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from tdxd.core import sealed
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, volume_key
from tdxd.core.foreign import AnyBundle, AnyManifest, PassphraseBundle
from tdxd.errors import HostError, IntegrityError, TdxdError
from tdxd.host import loop
from tdxd.host.image_file import (
    check_image,
    open_file,
    open_image,
    open_tree,
    read_range,
)
from tdxd.host.os_error import as_host_error
from tdxd.host.ports import MappedVolume
from tdxd.host.range_worker import Task
from tdxd.host.workers import RANGE_BLOCKS, Workers

if TYPE_CHECKING:
    from tdxd.core.luks2_read import Luks2Header

__all__ = ["MemoryMapper"]

_NAME = "tdxd:"
_KEEP = "keep the plaintext of"
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

    def check(self, image: str, bundle: AnyBundle) -> None:
        """Check that an image is the one of a key, and open nothing.

        Raises: MissingError, BadHeaderError, IntegrityError, HostError.
        """
        check_image(image, bundle)

    def map_volume(
        self,
        image: str,
        bundle: AnyBundle,
        *,
        cancelled: Callable[[], bool],
        writable: bool = False,
    ) -> MappedVolume:
        """Open the image; polls `cancelled` and leaves nothing behind if it turns true.

        Raises: MissingError, BadHeaderError, WrongPassphraseError, IntegrityError; HostError,
        with ENOMEM over the limit, with ECANCELED when cancelled, with EROFS for `writable`.
        """
        if writable:
            hint = 'only mapper = "dm" can write, this one maps a copy in memory'
            raise HostError("map for writing", image, errno.EROFS, hint=hint)
        if isinstance(bundle, PassphraseBundle):
            return self._map_foreign(image, bundle, cancelled)
        return self._map_sealed(image, bundle, cancelled)

    def _map_sealed(
        self, image: str, bundle: KeyBundle, cancelled: Callable[[], bool]
    ) -> MappedVolume:
        manifest = bundle.manifest
        with open_image(image, manifest) as fd:
            self._check_limit(image, manifest.payload_bytes)
            with _memory(manifest) as memory:
                self._open(image, fd, bundle, memory, cancelled)
                return _shown(memory, manifest, manifest.payload_bytes)

    def _map_foreign(
        self, image: str, bundle: PassphraseBundle, cancelled: Callable[[], bool]
    ) -> MappedVolume:
        from tdxd.host import luks2_map  # 10 ms: not at start

        manifest = bundle.manifest
        with open_file(image) as fd:
            opened = luks2_map.read_foreign(image, fd, manifest)
            header = opened.header
            self._check_limit(image, header.payload_bytes)
            _check_size(
                image,
                header.payload_bytes,
                luks2_map.spare_memory_bytes(),
                "to be had is",
            )
            with (
                luks2_map.unlocked(opened, bundle.secret, cancelled=cancelled) as key,
                _memory(manifest) as memory,
            ):
                self._decrypt(image, fd, header, key.reveal(), memory, cancelled)
                sector_bytes = header.sector_bytes
                return _shown(memory, manifest, header.payload_bytes, sector_bytes)

    def _check_limit(self, image: str, payload_bytes: int) -> None:
        _check_size(image, payload_bytes, self._limit_bytes, "memory_limit_bytes is")

    def _open(
        self,
        image: str,
        image_fd: int,
        bundle: KeyBundle,
        memory: int,
        cancelled: Callable[[], bool],
    ) -> None:
        """Put the verified plaintext of the file system into `memory`."""
        manifest, blocks = bundle.manifest, bundle.manifest.data_blocks
        with (
            volume_key(bundle) as key,
            as_host_error("work on", image),
            self._started(image, (image_fd, memory), blocks) as workers,
        ):
            # The workers load their libraries meanwhile.
            leaves = open_tree(image, image_fd, manifest, key.reveal(), memory)
            task = Task(
                op="open",
                in_fd=image_fd,
                in_base=manifest.payload_offset_bytes,
                out_fd=memory,
                out_base=0,
                digests_fd=memory,
                digests_base=leaves.digests_base,
                leaf_block=leaves.first_block,
                key=key.reveal(),
                salt=manifest.salt,
            )
            workers.run(task, blocks=blocks, cancelled=cancelled)
        with as_host_error(_KEEP, image):
            os.ftruncate(memory, manifest.data_blocks * BLOCK_BYTES)

    def _decrypt(
        self,
        image: str,
        image_fd: int,
        header: Luks2Header,
        key: bytes,
        memory: int,
        cancelled: Callable[[], bool],
    ) -> None:
        """Put the plaintext of a foreign payload into `memory`."""
        task = Task(
            op="decrypt",
            in_fd=image_fd,
            in_base=header.payload_offset_bytes,
            out_fd=memory,
            out_base=0,
            key=key,
            sector_bytes=header.sector_bytes,
        )
        blocks, tail_bytes = divmod(header.payload_bytes, BLOCK_BYTES)
        with (
            as_host_error("work on", image),
            self._started(image, (image_fd, memory), blocks) as workers,
        ):
            workers.run(task, blocks=blocks, cancelled=cancelled)
        if tail_bytes:  # a few sectors of 512 bytes: not work for workers
            start = header.payload_offset_bytes + blocks * BLOCK_BYTES
            run = read_range(image, image_fd, start, tail_bytes)
            if len(run) < tail_bytes:
                hint = "the file is truncated; copy it again"
                raise IntegrityError(f"{image}: ends inside block {blocks}", hint=hint)
            out = memoryview(bytearray(tail_bytes + sealed.RUN_SLACK_BYTES))
            size = header.sector_bytes
            sealed.decrypt_run(key, blocks, memoryview(run), out, sector_bytes=size)
            with as_host_error(_KEEP, image):
                written = os.pwrite(memory, out[:tail_bytes], blocks * BLOCK_BYTES)
            if written < tail_bytes:
                raise HostError(_KEEP, image, errno.ENOSPC)

    def _started(self, image: str, fds: tuple[int, int], blocks: int) -> Workers:
        """Start no more workers than there is work for."""
        count = min(self._workers, -(-blocks // RANGE_BLOCKS))
        return Workers(count, fds=fds, what=image)

    def unmap(self, mapped: MappedVolume) -> None:
        """Let go of the loop device and its memory; harmless when repeated.

        The kernel frees both at once, or when the last mount on the device is gone. The
        descriptor is closed only while it still is that device's.
        """
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{mapped.fd}") == mapped.device:
                os.close(mapped.fd)

    def intact(self, mapped: MappedVolume) -> bool:
        """Say that no wrong block was met: all that can be known is known before mapping ends."""
        return mapped.mapper == "memory"

    def sweep(self) -> tuple[str, ...]:
        """Detach the devices that a killed daemon left; those in use go with their last user."""
        found = loop.attached(_BACKING_PREFIX)
        for path in found:
            with contextlib.suppress(TdxdError):  # gone meanwhile
                loop.detach(path)
        return found


def _check_size(image: str, payload_bytes: int, most_bytes: int, most: str) -> None:
    """Check that a payload takes at most some memory, whose name is `most`.

    Raises: HostError with ENOMEM.
    """
    if payload_bytes > most_bytes:
        hint = f"it needs {payload_bytes} bytes of memory, {most} {most_bytes}"
        raise HostError("map into memory", image, errno.ENOMEM, hint=hint)


@contextlib.contextmanager
def _memory(manifest: AnyManifest) -> Iterator[int]:
    """Yield a descriptor of new memory, which lives on only behind a loop device."""
    flags = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC
    with as_host_error("make memory for", _name(manifest)):
        memory = os.memfd_create(_name(manifest), flags)
    try:
        yield memory
    finally:
        os.close(memory)


def _shown(
    memory: int,
    manifest: AnyManifest,
    payload_bytes: int,
    sector_bytes: int = BLOCK_BYTES,
) -> MappedVolume:
    """Let nobody write the memory any more, and show it as a block device."""
    name = _name(manifest)
    with as_host_error("seal the memory of", name):
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)
    device, fd = loop.attach(memory, name=name, block_bytes=sector_bytes)
    return MappedVolume(
        manifest=manifest,
        device=device,
        mapper="memory",
        fd=fd,
        payload_bytes=payload_bytes,
    )


def _name(manifest: AnyManifest) -> str:
    return f"{_NAME}{manifest.volume_id}:{manifest.generation}"
