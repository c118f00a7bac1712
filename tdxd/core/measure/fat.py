"""Read one file of a FAT file system: the UKI in the EFI system partition of a disk image.

Source: Microsoft Extensible Firmware Initiative FAT32 File System Specification 1.03. Only short
(8.3) names are looked at: /EFI/BOOT/BOOTX64.EFI is one, and firmware looks for no other.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterator

from tdxd.errors import DataError

__all__ = ["FatVolume", "Read"]

Read = Callable[[int, int], bytes]
"""Returns `size` bytes at an offset of the volume, or fewer at its end."""
_BOOT = struct.Struct("<11sHBHBHHBHHHIIIHHI")
_ENTRY_BYTES = 32
_FILE_MAX_BYTES = 1 << 30
_DIRECTORY_MAX_BYTES = 2 << 20
_VOLUME, _DIRECTORY, _LONG_NAME = 0x08, 0x10, 0x0F
_FREED, _LAST = 0xE5, 0x00
_FAT12_CLUSTERS, _FAT16_CLUSTERS = 4085, 65525


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    directory: bool
    cluster: int
    size_bytes: int


class FatVolume:
    """A FAT12, FAT16 or FAT32 volume. Raises DataError for what it cannot be."""

    def __init__(self, read: Read, *, source: str) -> None:
        self._read, self._source = read, source
        head = read(0, 512)
        if len(head) < 512 or head[510:512] != b"\x55\xaa":
            raise DataError(f"{source} is no FAT file system")
        fields = _BOOT.unpack_from(head)
        sector, per_cluster, reserved, fats, root_entries = fields[1:6]
        sectors = fields[6] or fields[12]
        fat_sectors = fields[8] or fields[13]
        if sector not in (512, 1024, 2048, 4096) or not per_cluster or not fats:
            raise DataError(f"{source} is no FAT file system")
        root_bytes = root_entries * _ENTRY_BYTES
        root_sectors = -(-root_bytes // sector)
        self._fat = reserved * sector
        self._root = self._fat + fats * fat_sectors * sector, root_bytes
        self._data = self._root[0] + root_sectors * sector
        self._cluster_bytes = sector * per_cluster
        self._clusters = (sectors - self._data // sector) // per_cluster
        if self._clusters <= 0:
            raise DataError(f"{source} is a FAT file system without room for files")
        self._fat32 = self._clusters >= _FAT16_CLUSTERS or not fields[8]
        self._root_cluster = fields[16] if self._fat32 else 0
        self._bits = 32 if self._fat32 else 16
        if self._clusters < _FAT12_CLUSTERS and not self._fat32:
            self._bits = 12

    def file(self, *names: str) -> bytes:
        """Return a file by the names on its path, in capitals.

        Raises: DataError if it is not there.
        """
        path = "\\".join(names)
        found = _Found(directory=True, cluster=self._root_cluster, size_bytes=0)
        for name in names:
            if not found.directory:
                raise DataError(f"{self._source} has no file {path}")
            entry = self._lookup(found, name)
            if entry is None:
                raise DataError(f"{self._source} has no file {path}: no {name}")
            found = entry
        if found.directory:
            raise DataError(f"{self._source}: {path} is a directory")
        if found.size_bytes > _FILE_MAX_BYTES:
            text = f"{self._source}: {path} has {found.size_bytes} bytes"
            raise DataError(text, hint=f"at most {_FILE_MAX_BYTES} are read")
        content = self._content(found.cluster, found.size_bytes)
        if len(content) < found.size_bytes:
            raise DataError(f"{self._source}: {path} is cut short")
        return content

    def _lookup(self, directory: _Found, name: str) -> _Found | None:
        if directory.cluster == 0:
            table = self._read(*self._root)
        else:
            table = self._content(directory.cluster, _DIRECTORY_MAX_BYTES)
        for start in range(0, len(table) - _ENTRY_BYTES + 1, _ENTRY_BYTES):
            entry = table[start : start + _ENTRY_BYTES]
            attributes = entry[11]
            if entry[0] == _LAST:
                return None
            if entry[0] == _FREED or attributes & _LONG_NAME == _LONG_NAME:
                continue
            if not attributes & _VOLUME and _name(entry) == name:
                high = int.from_bytes(entry[20:22], "little") if self._fat32 else 0
                low, size = struct.unpack_from("<HI", entry, 26)
                is_directory = bool(attributes & _DIRECTORY)
                return _Found(is_directory, high << 16 | low, size)
        return None

    def _content(self, cluster: int, size_bytes: int) -> bytes:
        """Return what a chain of clusters holds, up to a size."""
        parts, taken = [], 0
        for one in self._chain(cluster):
            if taken >= size_bytes:
                break
            parts.append(
                self._read(
                    self._data + (one - 2) * self._cluster_bytes, self._cluster_bytes
                )
            )
            taken += self._cluster_bytes
        return b"".join(parts)[:size_bytes]

    def _chain(self, cluster: int) -> Iterator[int]:
        """Yield the clusters of a chain; one that runs in a circle ends by their number."""
        for _ in range(self._clusters):
            if not 2 <= cluster < self._clusters + 2:
                return
            yield cluster
            cluster = self._next(cluster)

    def _next(self, cluster: int) -> int:
        if self._bits == 12:
            pair = self._read(self._fat + cluster + cluster // 2, 2)
            value = int.from_bytes(pair, "little")
            return value >> 4 if cluster % 2 else value & 0xFFF
        size = self._bits // 8
        value = int.from_bytes(self._read(self._fat + cluster * size, size), "little")
        return value & 0x0FFFFFFF


def _name(entry: bytes) -> str:
    stem, extension = entry[:8].rstrip(b" "), entry[8:11].rstrip(b" ")
    whole = stem + b"." + extension if extension else stem
    return whole.decode("latin-1")
