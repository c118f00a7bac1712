"""The `dm` mapper: loop device, dm-crypt, dm-verity. Any size opens in the same time.

Whatever the host changes in a sealed image ends as EIO when it is read, and dm-verity remembers
it. A foreign volume has no dm-verity: what the host changes there is read as noise, 16 bytes or
more of it, and nobody is told.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Literal

from tdxd.core import dm_table
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, volume_key
from tdxd.core.dm_table import Layer
from tdxd.core.foreign import (
    AnyBundle,
    AnyManifest,
    ForeignManifest,
    PassphraseBundle,
)
from tdxd.errors import BusyError, HostError
from tdxd.host import dm, keyring, loop
from tdxd.host.image_file import check_image, check_root, open_file, open_image
from tdxd.host.os_error import as_host_error
from tdxd.host.ports import MappedVolume
from tdxd.host.workers import cancelled_error

if TYPE_CHECKING:
    from tdxd.core.secret import Secret
    from tdxd.host.luks2_map import ForeignImage

__all__ = ["DmMapper"]


class DmMapper:
    """Implements `ports.Mapper` on the kernel's device mapper.

    Call `map_volume` in one thread from its start to its end: the key is in that thread's
    keyring for a moment.
    """

    name: Literal["dm", "memory"] = "dm"

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

        Raises: MissingError, BadHeaderError, WrongPassphraseError, IntegrityError if the top of
        the hash tree does not open with the key; BusyError if this generation is open already;
        HostError, with EROFS for a sealed image that shall be writable.
        """
        if isinstance(bundle, PassphraseBundle):
            return _map_foreign(image, bundle, cancelled=cancelled, writable=writable)
        if writable:
            hint = "a sealed image is read-only: seal a new generation"
            raise HostError("map for writing", image, errno.EROFS, hint=hint)
        return self._map_sealed(image, bundle, cancelled)

    def _map_sealed(
        self, image: str, bundle: KeyBundle, cancelled: Callable[[], bool]
    ) -> MappedVolume:
        manifest = bundle.manifest
        with open_image(image, manifest) as fd, volume_key(bundle) as key:
            check_root(image, fd, manifest, key.reveal())
            if cancelled():
                raise cancelled_error(image)
            with _below(
                image,
                fd,
                manifest,
                offset_bytes=manifest.payload_offset_bytes,
                size_bytes=manifest.payload_bytes,
            ) as (device, offset_bytes):
                crypt = dm_table.crypt_table(
                    manifest, device=device, offset_bytes=offset_bytes
                )
                with keyring.logon_key(dm_table.key_description(manifest), key):
                    lower = _create(manifest, "crypt", crypt)
            with ExitStack() as stack:
                stack.callback(dm.remove, lower.uuid, deferred=True)
                verity = dm_table.verity_table(manifest, device=lower.number)
                upper = _create(manifest, "verity", verity)
                stack.pop_all()
        return MappedVolume(
            manifest=manifest,
            device=upper.path,
            mapper="dm",
            payload_bytes=manifest.payload_bytes,
        )

    def unmap(self, mapped: MappedVolume) -> None:
        """Remove both devices; the loop device goes with its last user. Harmless when repeated.

        Raises: BusyError, HostError.
        """
        for layer in _TOP_DOWN:
            dm.remove(dm_table.device_uuid(mapped.manifest, layer))

    def intact(self, mapped: MappedVolume) -> bool:
        """Say whether dm-verity met no wrong block yet.

        A device that is gone has shown none; whoever mounts or reads it next finds out. A
        foreign volume is intact while its device is there.
        """
        foreign = isinstance(mapped.manifest, ForeignManifest)
        layer: Layer = "crypt" if foreign else "verity"
        try:
            text = dm.status(dm_table.device_uuid(mapped.manifest, layer))
        except HostError as exc:
            if exc.errno == errno.ENXIO:
                return not foreign
            raise
        return foreign or dm_table.verity_is_intact(text)

    def sweep(self) -> tuple[str, ...]:
        """Remove every device of ours; the kernel does it later for one that is still in use."""
        found = dm.mappings(dm_table.OURS)
        for uuid in found:
            dm.remove(uuid, deferred=True)
        return found


_TOP_DOWN: tuple[Layer, ...] = ("verity", "crypt")


def _create(
    manifest: AnyManifest,
    layer: Layer,
    table: dm_table.Table,
    *,
    writable: bool = False,
) -> dm.Device:
    name = dm_table.device_name(manifest, layer)
    uuid = dm_table.device_uuid(manifest, layer)
    return dm.create(name, uuid, table, writable=writable)


def _map_foreign(
    image: str,
    bundle: PassphraseBundle,
    *,
    cancelled: Callable[[], bool],
    writable: bool,
) -> MappedVolume:
    from tdxd.host import luks2_map  # 10 ms: not at start

    manifest = bundle.manifest
    with open_file(image, writable=writable) as fd:
        _claim(image, fd, writable=writable)
        opened = luks2_map.read_foreign(image, fd, manifest)
        with luks2_map.unlocked(opened, bundle.secret, cancelled=cancelled) as key:
            made = _decrypted(opened, fd, manifest, key, writable=writable)
    return MappedVolume(
        manifest=manifest,
        device=made.path,
        mapper="dm",
        writable=writable,
        payload_bytes=opened.header.payload_bytes,
    )


def _claim(image: str, fd: int, *, writable: bool) -> None:
    """Take the file for one writer or any readers, for as long as the loop device holds it.

    Two mounts must not write to one file, found under two names. A disk has no such lock.

    Raises: BusyError.
    """
    kind = fcntl.LOCK_EX if writable else fcntl.LOCK_SH
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        hint = "another volume has the same file open, and one of them writes"
        raise BusyError(f"map {image}: in use", hint=hint) from exc


def _decrypted(
    image: ForeignImage,
    fd: int,
    manifest: ForeignManifest,
    key: Secret,
    *,
    writable: bool,
) -> dm.Device:
    """Make the device of a foreign payload."""
    header = image.header
    with _below(
        image.path,
        fd,
        manifest,
        offset_bytes=header.payload_offset_bytes,
        size_bytes=header.payload_bytes,
        block_bytes=header.sector_bytes,
        writable=writable,
    ) as (device, offset_bytes):
        table = dm_table.foreign_table(
            manifest,
            device=device,
            offset_bytes=offset_bytes,
            payload_bytes=header.payload_bytes,
            sector_bytes=header.sector_bytes,
        )
        with keyring.logon_key(dm_table.key_description(manifest), key):
            return _create(manifest, "crypt", table, writable=writable)


@contextmanager
def _below(
    image: str,
    fd: int,
    manifest: AnyManifest,
    *,
    offset_bytes: int,
    size_bytes: int,
    block_bytes: int = BLOCK_BYTES,
    writable: bool = False,
) -> Iterator[tuple[str, int]]:
    """Yield the block device (MAJOR:MINOR) that holds the payload, and where in it.

    An image file is put behind a loop device that shows its payload only; a block device is
    used as it is. Whatever opens the device meanwhile keeps the loop device attached.
    """
    with as_host_error("examine", image):
        seen = os.fstat(fd)
    if stat.S_ISBLK(seen.st_mode):
        yield _number(seen.st_rdev), offset_bytes
        return
    _path, device = loop.attach(
        fd,
        name=f"tdxd:{manifest.volume_id}:{manifest.generation}",
        offset_bytes=offset_bytes,
        size_bytes=size_bytes,
        direct_io=True,
        block_bytes=block_bytes,
        writable=writable,
    )
    try:
        with as_host_error("examine the loop device of", image):
            number = _number(os.fstat(device).st_rdev)
        yield number, 0
    finally:
        os.close(device)


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
