"""PE images, UKIs, partition tables and firmware files, made for the tests that read them."""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Mapping, Sequence

CC = uuid.UUID("96751a3d-72f4-41a6-a794-ed5d0e67ae6b").bytes_le
ESP = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
DISK = uuid.UUID("11111111-2222-3333-4444-555555555555")
_ALIGNMENT = 512
_HEADER_BYTES = 2048


def make_pe(
    sections: Mapping[str, bytes],
    *,
    plus: bool = True,
    directories: int = 16,
    checksum: int = 0,
    certificate: bytes = b"",
    trailing: bytes = b"",
) -> bytes:
    """A PE32 or PE32+ image; the certificate table is its end."""
    directories_at = 112 if plus else 96
    optional = bytearray(directories_at + 8 * directories)
    struct.pack_into("<H", optional, 0, 0x20B if plus else 0x10B)
    struct.pack_into("<II", optional, 60, _HEADER_BYTES, checksum)
    struct.pack_into("<I", optional, directories_at - 4, directories)
    table, body = b"", bytearray()
    for index, (name, content) in enumerate(sections.items()):
        raw = content + bytes(-len(content) % _ALIGNMENT)
        place = _HEADER_BYTES + len(body)
        fields = (len(content), 0x1000 * (index + 1), len(raw), place)
        table += struct.pack("<8sIIIIIIHHI", name.encode(), *fields, 0, 0, 0, 0, 0)
        body += raw
    end = _HEADER_BYTES + len(body) + len(trailing)
    if certificate:
        struct.pack_into("<II", optional, directories_at + 4 * 8, end, len(certificate))
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 64) + b"PE\0\0"
    head += struct.pack("<HHIIIHH", 0x8664, len(sections), 0, 0, 0, len(optional), 0)
    whole = (head + bytes(optional) + table).ljust(_HEADER_BYTES, b"\0")
    return whole + bytes(body) + trailing + certificate


def make_kernel(*, cc: bool = False, tags: bool = True) -> bytes:
    """A PE image with what the EFI stub of Linux is known by."""
    text = b"LOADED_IMAGE::LoadOptions\0Linux initrd\0" if tags else b"an old kernel"
    # As a compiler writes it: two numbers, with instructions in between.
    return make_pe({".text": text + (CC[:8] + b"\x48\xb8" + CC[8:] if cc else b"")})


def make_uki(
    *,
    version: str = "252.39-1",
    cc: bool = False,
    kernel: bytes | None = None,
    command_line: bytes = b"quiet root=verity",
    **more: bytes,
) -> bytes:
    """A UKI with the usual sections, and `more` of them by their names without the dot."""
    return make_pe(
        {
            ".text": b"code" + (CC if cc else b""),
            ".sdmagic": f"#### LoaderInfo: systemd-stub {version} ####".encode(),
            ".osrel": b"ID=tdxd\n",
            ".cmdline": command_line,
            ".linux": make_kernel() if kernel is None else kernel,
            ".initrd": b"070701" * 100,
            **{f".{name}": content for name, content in more.items()},
        }
    )


def make_gpt(
    partitions: Sequence[tuple[uuid.UUID, int, int]], *, disk: uuid.UUID = DISK
) -> bytes:
    """The start of a disk: partitions by type, first and last sector."""
    entries = b"".join(
        kind.bytes_le
        + uuid.uuid5(disk, str(number)).bytes_le
        + struct.pack("<QQQ72s", first, last, 0, "part".encode("utf-16-le"))
        for number, (kind, first, last) in enumerate(partitions)
    ).ljust(128 * 128, b"\0")
    fields = [b"EFI PART", 0x10000, 92, 0, 0, 1, 9999, 34, 9966, disk.bytes_le]
    fields += [2, 128, 128, zlib.crc32(entries)]
    layout = struct.Struct("<8sIIIIQQQQ16sQIII")
    fields[3] = zlib.crc32(layout.pack(*fields))
    return bytes(512) + layout.pack(*fields).ljust(512, b"\0") + entries


def make_firmware(
    sections: Sequence[tuple[int, int, int, int, int, int]], *, body: bytes
) -> bytes:
    """A firmware file with TDX metadata: the descriptor, then the table of GUIDs at its end."""
    descriptor = struct.pack("<4sIII", b"TDVF", 0, 1, len(sections))
    descriptor += b"".join(struct.pack("<IIQQII", *one) for one in sections)
    metadata = uuid.UUID("e47a6535-984a-4798-865e-4685a7bf8ec2").bytes_le
    footer = uuid.UUID("96b582de-1fb2-45f7-baea-a366c55a082d").bytes_le
    back = len(descriptor) + 22 + 18 + 32
    table = struct.pack("<IH", back, 22) + metadata + struct.pack("<H", 40) + footer
    return body + descriptor + table + bytes(32)
