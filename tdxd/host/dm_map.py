"""The `dm` mapper: loop device, dm-crypt, dm-verity. Any size opens in the same time.

Whatever the host changes in the file ends as EIO when it is read, and dm-verity remembers it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from tdxd.core import dm_table
from tdxd.core.bundle import KeyBundle, Manifest, volume_key
from tdxd.core.dm_table import Layer
from tdxd.errors import HostError
from tdxd.host import dm, keyring, loop
from tdxd.host.image_file import check_root, open_image
from tdxd.host.ports import MappedVolume
from tdxd.host.workers import cancelled_error

__all__ = ["DmMapper"]


class DmMapper:
    """Implements `ports.Mapper` on the kernel's device mapper.

    Call `map_volume` in one thread from its start to its end: the key is in that thread's
    keyring for a moment.
    """

    name: Literal["dm", "memory"] = "dm"

    def map_volume(
        self, image: str, bundle: KeyBundle, *, cancelled: Callable[[], bool]
    ) -> MappedVolume:
        """Open the image; polls `cancelled` and leaves nothing behind if it turns true.

        Raises: MissingError, BadHeaderError, IntegrityError if the top of the hash tree does not
        open with the key; BusyError if this generation is open already; HostError.
        """
        manifest = bundle.manifest
        with open_image(image, manifest) as fd, volume_key(bundle) as key:
            check_root(image, fd, manifest, key.reveal())
            if cancelled():
                raise cancelled_error(image)
            with _below(fd, manifest) as (device, offset_bytes):
                crypt = dm_table.crypt_table(
                    manifest, device=device, offset_bytes=offset_bytes
                )
                with keyring.logon_key(dm_table.key_description(manifest), key):
                    lower = _create(manifest, "crypt", crypt)
            with ExitStack() as stack:
                stack.callback(dm.remove, lower.uuid)
                verity = dm_table.verity_table(manifest, device=lower.number)
                upper = _create(manifest, "verity", verity)
                stack.pop_all()
        return MappedVolume(manifest=manifest, device=upper.path, mapper="dm")

    def unmap(self, mapped: MappedVolume) -> None:
        """Remove both devices; the loop device goes with its last user. Harmless when repeated.

        Raises: BusyError, HostError.
        """
        for layer in _TOP_DOWN:
            dm.remove(dm_table.device_uuid(mapped.manifest, layer))

    def intact(self, mapped: MappedVolume) -> bool:
        """Say whether dm-verity met no wrong block yet.

        A device that is gone has shown none; whoever mounts or reads it next finds out.
        """
        try:
            text = dm.status(dm_table.device_uuid(mapped.manifest, "verity"))
        except HostError as exc:
            if exc.errno == errno.ENXIO:
                return True
            raise
        return dm_table.verity_is_intact(text)

    def sweep(self) -> tuple[str, ...]:
        """Remove every device of ours; the kernel does it later for one that is still in use."""
        found = dm.mappings(dm_table.OURS)
        for uuid in found:
            dm.remove(uuid, deferred=True)
        return found


_TOP_DOWN: tuple[Layer, ...] = ("verity", "crypt")


def _create(manifest: Manifest, layer: Layer, table: dm_table.Table) -> dm.Device:
    name = dm_table.device_name(manifest, layer)
    return dm.create(name, dm_table.device_uuid(manifest, layer), table)


@contextmanager
def _below(fd: int, manifest: Manifest) -> Iterator[tuple[str, int]]:
    """Yield the block device (MAJOR:MINOR) that holds the payload, and where in it.

    An image file is put behind a loop device that shows its payload only; a block device is
    used as it is. Whatever opens the device meanwhile keeps the loop device attached.
    """
    seen = os.fstat(fd)
    if stat.S_ISBLK(seen.st_mode):
        yield _number(seen.st_rdev), manifest.payload_offset_bytes
        return
    _path, device = loop.attach(
        fd,
        name=f"tdxd:{manifest.volume_id}:{manifest.generation}",
        offset_bytes=manifest.payload_offset_bytes,
        size_bytes=manifest.payload_bytes,
        direct_io=True,
    )
    try:
        yield _number(os.fstat(device).st_rdev), 0
    finally:
        os.close(device)


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"
