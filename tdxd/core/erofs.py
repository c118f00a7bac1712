"""Just enough of erofs to set file modes in an image that mkfs.erofs has made, and to read it.

mkfs.erofs keeps the modes it finds and has no option for others, and neither the owner's
directory nor a copy of it must be touched: so the modes are set in the finished image. Reads
the uncompressed layout that `mkfs.erofs -x-1` writes; anything else is refused.

Source: Linux, fs/erofs/erofs_fs.h.
"""

from __future__ import annotations

import dataclasses
import stat
import struct
from collections.abc import Callable, Iterator

from tdxd.errors import DataError

__all__ = [
    "Entry",
    "Inode",
    "Patch",
    "Read",
    "entries",
    "normalised_modes",
    "superblock_checksum",
]

Read = Callable[[int, int], bytes]
"""Returns exactly (offset, size) of the image."""
Patch = tuple[int, bytes]
"""Bytes to write at an offset of the image."""

_BLOCK = 4096
_SUPER_OFFSET = 1024
_SUPER = struct.Struct("<IIIBBH24xII")
"""magic, checksum, feature_compat, blkszbits, extslots, root_nid, …, meta_blkaddr, xattr_…"""
_SUPER_MAGIC = 0xE0F5E1E2
_COMPAT_CHECKSUM = 0x1
_CHECKSUM_OFFSET = _SUPER_OFFSET + 4
_COMPACT = struct.Struct("<HHHHI4xI12x")
_EXTENDED = struct.Struct("<HHH2xQI24xI16x")
"""i_format, i_xattr_icount, i_mode, i_nlink and i_size (here the other way round), i_u."""
_MODE_OFFSET = 4
_SLOT_BYTES = 32
_FLAT_PLAIN, _FLAT_INLINE = 0, 2
_DIRENT = struct.Struct("<QHBB")
"""nid, nameoff, file_type, reserved."""
_PRIVATE = b"tls"
_CRC32C_POLYNOMIAL = 0x82F63B78


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inode:
    """One file or directory. Its content is what stands in `extents`: (offset, size) each."""

    nid: int
    offset: int
    mode: int
    links: int
    size_bytes: int
    extents: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One name: the path below the root, without a slash in front, and what it names.

    Bytes that are not UTF-8 are escaped as surrogates.
    """

    path: str
    inode: Inode


def entries(read: Read) -> Iterator[Entry]:
    """Yield every file and directory, a directory before what it holds, but not the root.

    Raises: DataError for a layout that mkfs.erofs does not write without compression, for
    anything but files and directories, and for names that lead elsewhere.
    """
    read = _exactly(read)
    base, root_nid = _start(read)
    pending, directories = [("", root_nid)], {root_nid}
    while pending:
        where, nid = pending.pop()
        for name, child in _names(read, _inode(read, base, nid)):
            path = where + name.decode("utf-8", "surrogateescape")
            if not name or b"/" in name:
                raise DataError(f"the file system has a file of the name {path!r}")
            inode = _inode(read, base, child)
            _normal(inode.mode, private=False)  # refuses links and special files
            yield Entry(path=path, inode=inode)
            if stat.S_ISDIR(inode.mode):
                if child in directories:
                    raise DataError(f"the file system has two directories {path!r}")
                directories.add(child)
                pending.append((path + "/", child))


def normalised_modes(read: Read) -> Iterator[Patch]:
    """Yield what sets every mode: files 0444, directories 0555, `tls/` 0600 and 0700.

    Raises: DataError for a layout that mkfs.erofs does not write without compression, for
    anything but files and directories, and for a file that `tls/` shares with the rest.
    """
    read = _exactly(read)
    base, root_nid = _start(read)
    pending: list[tuple[int, bool, bool]] = [(root_nid, False, True)]
    seen: dict[int, bool] = {}
    while pending:
        nid, private, is_root = pending.pop()
        if nid in seen:
            if seen[nid] != private:
                raise DataError(
                    "a hard link joins a file below tls/ with one outside",
                    hint="copy the file: below tls/ it is private, outside it is not",
                )
            continue
        seen[nid] = private
        inode = _inode(read, base, nid)
        mode = _normal(inode.mode, private=private)
        yield inode.offset + _MODE_OFFSET, mode.to_bytes(2, "little")
        if stat.S_ISDIR(mode):
            for name, child in _names(read, inode):
                inside = private or (is_root and name == _PRIVATE)
                pending.append((child, inside, False))


def _start(read: Read) -> tuple[int, int]:
    """Return where inodes are counted from, and the number of the root's."""
    magic, _sum, _compat, block_bits, _slots, root_nid, meta, _xattr = _SUPER.unpack(
        read(_SUPER_OFFSET, _SUPER.size)
    )
    if magic != _SUPER_MAGIC or block_bits != _BLOCK.bit_length() - 1:
        raise DataError("the file system is not erofs with 4096-byte blocks")
    return meta * _BLOCK, root_nid


def _exactly(read: Read) -> Read:
    """Refuse to read outside the image."""

    def checked(offset: int, size: int) -> bytes:
        data = read(offset, size)
        if len(data) != size:
            raise DataError(f"the file system ends before byte {offset + size}")
        return data

    return checked


def _normal(mode: int, *, private: bool) -> int:
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        return kind | (0o700 if private else 0o555)
    if kind == stat.S_IFREG:
        return kind | (0o600 if private else 0o444)
    raise DataError(f"the file system holds a link or special file, mode {mode:o}")


def _inode(read: Read, base: int, nid: int) -> Inode:
    """Read one inode; the tail of its content may stand right behind it."""
    offset = base + nid * _SLOT_BYTES
    head = read(offset, _COMPACT.size)
    layout, xattrs, mode, links, size, first = _COMPACT.unpack(head)
    inode_bytes = _COMPACT.size
    if layout & 1:
        inode_bytes = _EXTENDED.size
        head = read(offset, inode_bytes)
        layout, xattrs, mode, size, first, links = _EXTENDED.unpack(head)
    kind = layout >> 1
    if kind not in (_FLAT_PLAIN, _FLAT_INLINE) or xattrs:
        raise DataError(f"the file system has an inode of layout {kind}")
    whole = size if kind == _FLAT_PLAIN else size - size % _BLOCK
    extents = ((first * _BLOCK, whole), (offset + inode_bytes, size - whole))
    return Inode(
        nid=nid,
        offset=offset,
        mode=mode,
        links=links,
        size_bytes=size,
        extents=tuple(one for one in extents if one[1]),
    )


def _names(read: Read, directory: Inode) -> Iterator[tuple[bytes, int]]:
    """Yield (name, nid) of a directory, without `.` and `..`."""
    for block in _blocks(read, directory):
        count = int.from_bytes(block[8:10], "little") // _DIRENT.size
        if not 0 < count <= len(block) // _DIRENT.size:
            raise DataError(f"the file system has a directory with {count} entries")
        found = [
            _DIRENT.unpack_from(block, index * _DIRENT.size) for index in range(count)
        ]
        ends = [entry[1] for entry in found[1:]] + [len(block)]
        for (nid, start, _kind, _reserved), end in zip(found, ends, strict=True):
            name = block[start:end].split(b"\0")[0]
            if name not in (b".", b".."):
                yield name, nid


def _blocks(read: Read, inode: Inode) -> Iterator[bytes]:
    """Yield the content of a directory block by block."""
    for start, size in inode.extents:
        for done in range(0, size, _BLOCK):
            yield read(start + done, min(_BLOCK, size - done))


def superblock_checksum(first_block: bytes) -> Patch | None:
    """Return what makes the superblock's checksum right; `None` if it has none.

    `first_block` are the 4096 bytes of block 0, with all other patches applied.
    """
    area = bytearray(first_block[_SUPER_OFFSET:_BLOCK])
    compat = _SUPER.unpack_from(area)[2]
    if not compat & _COMPAT_CHECKSUM:
        return None
    area[4:8] = bytes(4)
    return _CHECKSUM_OFFSET, _crc32c(bytes(area)).to_bytes(4, "little")


def _crc32c(data: bytes) -> int:
    """CRC-32C from all ones, without the final inversion: as the kernel's crc32c(~0, …)."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (_CRC32C_POLYNOMIAL if value & 1 else 0)
    return value
