"""The device-mapper tables of a volume.

Of a sealed image, from the manifest alone: dm-crypt below, dm-verity above. The root hash covers
the plaintext that the file system reads, so that whatever the host does to the file ends as EIO
and never as data. Nothing in such a table comes from the image file.

Of a foreign one: dm-crypt alone. Cipher and tweak are ours; from the image come three numbers,
which the strict reader validated: where the payload begins, its size and its sectors' size.

Source: Linux, Documentation/admin-guide/device-mapper/dm-crypt.rst and verity.rst.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from tdxd.core.bundle import BLOCK_BYTES, VOLUME_KEY_BYTES, Manifest
from tdxd.core.foreign import AnyManifest, ForeignManifest

__all__ = [
    "OURS",
    "SECTOR_BYTES",
    "Layer",
    "Table",
    "crypt_table",
    "device_name",
    "device_uuid",
    "foreign_table",
    "key_description",
    "verity_is_intact",
    "verity_table",
]

SECTOR_BYTES = 512
"""Unit of all starts and lengths in tables."""
OURS = "TDXD-"
"""What the uuid of each of our devices begins with: how a sweep and udev know them."""
_MANIFEST_HEX = 32

Layer = Literal["crypt", "verity"]


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """One target that spans a whole device: `sectors` of 512 bytes."""

    target: Layer
    sectors: int
    parameters: str


def device_uuid(manifest: AnyManifest, layer: Layer) -> str:
    """Return `TDXD-<volume>-<first 32 hex digits of SHA-256(manifest)>-<layer>`.

    At most 109 characters; the kernel takes 128. The kernel keeps uuids unique, so that one
    generation of a volume is open once.
    """
    digest = manifest.digest().hex()[:_MANIFEST_HEX]
    return f"{OURS}{manifest.volume_id}-{digest}-{layer}"


def device_name(manifest: AnyManifest, layer: Layer) -> str:
    """Return a name a person can read in `dmsetup ls`: at most 99 of the kernel's 127 bytes."""
    return f"tdxd-{manifest.volume_id}-{manifest.generation}-{layer}"


def key_description(manifest: AnyManifest) -> str:
    """Return the description under which the kernel's keyring holds the volume key."""
    return f"tdxd:{manifest.volume_id}:{manifest.generation}"


def crypt_table(manifest: Manifest, *, device: str, offset_bytes: int) -> Table:
    """Return the dm-crypt table of the payload, which starts `offset_bytes` into `device`.

    `device` is MAJOR:MINOR. The tweak of a 4096-byte sector is its number in units of 512 bytes,
    counted from the start of the payload: the format's plain64 without iv_large_sectors.
    """
    start = _crypt(manifest, device, offset_bytes)
    sectors = manifest.payload_bytes // SECTOR_BYTES
    return Table("crypt", sectors, f"{start} 1 sector_size:{BLOCK_BYTES}")


def foreign_table(
    manifest: ForeignManifest,
    *,
    device: str,
    offset_bytes: int,
    payload_bytes: int,
    sector_bytes: int,
) -> Table:
    """Return the dm-crypt table of a foreign volume, as `cryptsetup` would make it.

    Sectors of 512 bytes are what dm-crypt has without being told, and it does not tell them.

    Raises: ValueError for sectors of another size, and for numbers that are not whole sectors.
    """
    ragged = offset_bytes % sector_bytes or payload_bytes % sector_bytes
    if sector_bytes not in (SECTOR_BYTES, BLOCK_BYTES) or ragged or payload_bytes <= 0:
        msg = f"payload of {payload_bytes} bytes from {offset_bytes} in sectors of {sector_bytes}"
        raise ValueError(msg)
    start = _crypt(manifest, device, offset_bytes)
    sectors = payload_bytes // SECTOR_BYTES
    if sector_bytes == SECTOR_BYTES:
        return Table("crypt", sectors, start)
    return Table("crypt", sectors, f"{start} 1 sector_size:{sector_bytes}")


def _crypt(manifest: AnyManifest, device: str, offset_bytes: int) -> str:
    """Return the parameters of dm-crypt up to the optional ones."""
    key = f":{VOLUME_KEY_BYTES}:logon:{key_description(manifest)}"
    return f"aes-xts-plain64 {key} 0 {device} {offset_bytes // SECTOR_BYTES}"


def verity_table(manifest: Manifest, *, device: str) -> Table:
    """Return the dm-verity table over the decrypted payload `device`, MAJOR:MINOR.

    Without `check_at_most_once`, which would miss a change between two reads, and without
    `ignore_corruption`.
    """
    blocks = manifest.data_blocks
    return Table(
        "verity",
        blocks * BLOCK_BYTES // SECTOR_BYTES,
        f"1 {device} {device} {BLOCK_BYTES} {BLOCK_BYTES} {blocks} {blocks} sha256 "
        f"{manifest.root_hash.hex()} {manifest.salt.hex()}",
    )


def verity_is_intact(status: str) -> bool:
    """Read dm-verity's status: `V` while every block was right, `C` once one was not."""
    return status.split(" ", maxsplit=1)[0] != "C"
