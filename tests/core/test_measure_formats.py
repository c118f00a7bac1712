"""PE images, partition tables, FAT and TDX metadata: what is measured of them, and bad input."""

from __future__ import annotations

import functools
import hashlib
import shutil
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxd.core.measure.fat import FatVolume
from tdxd.core.measure.gpt import parse_gpt
from tdxd.core.measure.pe import authenticode_sha384, parse_pe
from tdxd.core.measure.tdvf import mrtd, parse_tdvf
from tdxd.errors import DataError
from tests.measured_parts import DISK, ESP, make_firmware, make_gpt, make_pe

CHECKSUM_AT = 64 + 24 + 64
SECTIONS = {".text": b"code" * 300, ".data": b"data" * 7}


def sha384(data):
    return hashlib.sha384(data).digest()


def digest(data):
    return authenticode_sha384(parse_pe(data))


# --- PE -------------------------------------------------------------------------


@pytest.mark.parametrize(("plus", "directories_at"), [(True, 112), (False, 96)])
def test_the_digest_leaves_out_checksum_and_certificate_entry(plus, directories_at):
    data = make_pe(SECTIONS, plus=plus)
    entry = 64 + 24 + directories_at + 4 * 8
    by_hand = data[:CHECKSUM_AT] + data[CHECKSUM_AT + 4 : entry] + data[entry + 8 :]
    assert digest(data) == sha384(by_hand)


def test_sections_that_take_all_memory_together():
    """Some kilobytes would become some 96 GiB."""
    data = bytearray(make_pe({f".s{n}": b"x" for n in range(3)}))
    table = 64 + 24 + 240
    for n in range(3):
        struct.pack_into("<I", data, table + 40 * n + 8, 600 << 20)
    with pytest.raises(DataError, match=f"take {3 * (600 << 20)} bytes of memory"):
        parse_pe(bytes(data))


def test_an_image_without_room_for_certificates():
    data = make_pe(SECTIONS, directories=4)
    assert digest(data) == sha384(data[:CHECKSUM_AT] + data[CHECKSUM_AT + 4 :])


@given(
    st.binary(max_size=700),
    st.binary(min_size=1, max_size=40),
    st.integers(0, 2**32 - 1),
    st.binary(max_size=30),
)
def test_a_signature_and_a_checksum_change_nothing(code, certificate, checksum, more):
    sections = {".text": code, ".data": b"data"}
    plain = make_pe(sections, trailing=more)
    signed = make_pe(
        sections, trailing=more, certificate=certificate, checksum=checksum
    )
    assert digest(plain) == digest(signed)


@given(st.data())
def test_any_other_byte_changes_it(data):
    image = bytearray(make_pe(SECTIONS, trailing=b"end"))
    covered = {*range(len(image))}
    covered -= {*range(CHECKSUM_AT, CHECKSUM_AT + 4)}
    covered -= {*range(64 + 24 + 112 + 32, 64 + 24 + 112 + 40)}
    covered -= {*range(64 + 24 + 112 + 4 * 8 + 8 + 11 * 8)}  # the layout itself
    place = data.draw(st.sampled_from(sorted(covered)))
    before = digest(bytes(image))
    table = 64 + 24 + 112 + 16 * 8
    if table <= place < table + 80:
        return  # a section's header: its name and sizes are parsed
    image[place] ^= 1
    assert digest(bytes(image)) != before


def test_sections_are_hashed_in_the_order_of_the_file():
    data = make_pe(SECTIONS)
    table = 64 + 24 + 112 + 16 * 8
    swapped = bytearray(data)
    swapped[table : table + 40] = data[table + 40 : table + 80]
    swapped[table + 40 : table + 80] = data[table : table + 40]
    entry = 64 + 24 + 112 + 4 * 8
    plain = bytes(swapped)
    by_hand = plain[:CHECKSUM_AT] + plain[CHECKSUM_AT + 4 : entry] + plain[entry + 8 :]
    assert digest(plain) == sha384(by_hand)


def test_memory_is_cut_and_filled():
    image = parse_pe(make_pe({".a": b"abc"}))
    (section,) = image.sections
    assert image.memory_of(section) == b"abc"
    raw = bytearray(image.data)
    struct.pack_into("<I", raw, 64 + 24 + 112 + 128 + 8, 1000)
    larger = parse_pe(bytes(raw))
    assert larger.memory_of(larger.sections[0]) == b"abc".ljust(1000, b"\0")


def edited(data, offset, value, form="<I"):
    raw = bytearray(data)
    struct.pack_into(form, raw, offset, value)
    return bytes(raw)


SIGNED = make_pe(SECTIONS, certificate=b"certificate")
TABLE = 64 + 24 + 112 + 128
CERTIFICATE_ENTRY = 64 + 24 + 112 + 4 * 8
BAD_PE = {
    "empty": (b"", "begin with MZ"),
    "not MZ": (b"ZM" * 100, "begin with MZ"),
    "short": (b"MZ", "needs 4 bytes at 60"),
    "no PE": (edited(SIGNED, 0x3C, 70), "no PE signature"),
    "far PE": (edited(SIGNED, 0x3C, 0xFFFFFFFF), "needs 4 bytes"),
    "machine of Java": (edited(SIGNED, 64 + 24, 0x107, "<H"), "neither PE32"),
    "many sections": (edited(SIGNED, 64 + 6, 97, "<H"), "97 sections"),
    "long headers": (edited(SIGNED, 64 + 24 + 60, 0x7FFFFFFF), "its headers are"),
    "short headers": (edited(SIGNED, 64 + 24 + 60, 100), "its headers are"),
    "section outside": (edited(SIGNED, TABLE + 20, 0x7FFFFFF0), "needs 1536 bytes"),
    "huge memory": (edited(SIGNED, TABLE + 8, 0xFFFFFFFF), "take 4294967323 bytes"),
    "overlap": (
        edited(SIGNED, TABLE + 16, len(SIGNED) - 2048),
        "overlap|not at the end",
    ),
    "certificate elsewhere": (edited(SIGNED, CERTIFICATE_ENTRY, 64), "not at the end"),
    "certificate too long": (
        edited(SIGNED, CERTIFICATE_ENTRY + 4, 99),
        "not at the end",
    ),
    "few directories": (
        edited(SIGNED, 64 + 24 - 4, 112 + 4 * 8, "<H"),
        "do not fit its headers",
    ),
    "sections twice": (
        edited(edited(make_pe(SECTIONS), TABLE + 40 + 20, 2048), TABLE + 40 + 16, 2048),
        "sections overlap",
    ),
}


@pytest.mark.parametrize("name", BAD_PE)
def test_a_bad_image_is_named(name):
    data, text = BAD_PE[name]
    with pytest.raises(DataError, match=text):
        parse_pe(data)


@given(st.data())
def test_hostile_images_are_data_errors(data):
    raw = bytearray(SIGNED)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, TABLE + 80))
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    for one in (bytes(raw), bytes(raw[:cut])):
        try:
            assert len(digest(one)) == 48
        except DataError as exc:
            assert exc.message  # noqa: PT017


# --- partition tables -------------------------------------------------------------


def test_a_table_is_measured_without_empty_entries():
    disk = make_gpt([(ESP, 2048, 4095), (DISK, 4096, 5000)])
    table = parse_gpt(disk)
    entries = disk[1024 : 1024 + 256]
    assert table.event_data == disk[512:604] + struct.pack("<Q", 2) + entries
    assert table.disk == DISK
    assert table.esp == (2048 * 512, 2048 * 512)
    assert parse_gpt(make_gpt([(DISK, 1, 2)])).esp is None


def broken(disk, offset, value, form="<I"):
    """Change a field and make the header's CRC right again."""
    raw = bytearray(edited(disk, offset, value, form))
    struct.pack_into("<I", raw, 512 + 16, 0)
    struct.pack_into("<I", raw, 512 + 16, zlib.crc32(raw[512:604]))
    return bytes(raw)


GPT = make_gpt([(ESP, 2048, 4095)])
BAD_GPT = {
    "short": (b"", "cut short"),
    "none": (bytes(4096), "no GUID partition table"),
    "header": (edited(GPT, 512 + 40, 7), "header .* wrong CRC"),
    "entries": (edited(GPT, 1024 + 40, 7), "entries .* wrong CRC"),
    "cut": (GPT[:-1], "cut short"),
    "form": (broken(GPT, 512 + 12, 93), "unknown form"),
    "many": (broken(GPT, 512 + 80, 1 << 30), "1073741824 entries"),
    "small": (broken(GPT, 512 + 84, 8), "entries of 8 bytes"),
    "far": (broken(GPT, 512 + 72, 1 << 60, "<Q"), "cut short"),
    "backwards": (make_gpt([(ESP, 20, 10)]), "ends before"),
}


@pytest.mark.parametrize("name", BAD_GPT)
def test_a_bad_table_is_named(name):
    data, text = BAD_GPT[name]
    with pytest.raises(DataError, match=text):
        parse_gpt(data)


@given(st.integers(0, len(GPT) - 513), st.integers(0, 255))
def test_hostile_tables_are_data_errors(place, value):
    raw = bytearray(GPT)
    raw[512 + place] = value
    if bytes(raw) == GPT or 512 + 92 <= 512 + place < 1024:
        return
    with pytest.raises(DataError):
        parse_gpt(bytes(raw))


# --- FAT --------------------------------------------------------------------------

needs_mtools = pytest.mark.skipif(
    not (shutil.which("mkfs.fat") and shutil.which("mcopy")),
    reason="dosfstools and mtools make the file systems",
)


def volume(data, source="esp"):
    return FatVolume(lambda offset, size: data[offset : offset + size], source=source)


@needs_mtools
@pytest.mark.parametrize(("bits", "mib"), [(12, 4), (16, 20), (32, 40)])
def test_a_file_of_a_genuine_file_system(tmp_path, bits, mib):
    content = bytes(range(256)) * 3000 + b"end"
    (tmp_path / "EFI/BOOT").mkdir(parents=True)
    (tmp_path / "EFI/BOOT/BOOTX64.EFI").write_bytes(content)
    (tmp_path / "EFI/BOOT/a long name before it.txt").write_bytes(b"x" * 5000)
    image = tmp_path / "esp.img"
    image.write_bytes(bytes(mib << 20))
    commands = (
        ["mkfs.fat", "-F", str(bits), "-n", "EFI", str(image)],
        ["mcopy", "-s", "-i", str(image), str(tmp_path / "EFI"), "::"],
    )
    for command in commands:
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    data = image.read_bytes()
    found = volume(data)
    assert found.file("EFI", "BOOT", "BOOTX64.EFI") == content
    for names, text in (
        (("EFI", "BOOT", "GRUBX64.EFI"), "no GRUBX64.EFI"),
        (("EFI", "BOOT"), "is a directory"),
        (("EFI", "BOOT", "BOOTX64.EFI", "X"), "has no file"),
    ):
        with pytest.raises(DataError, match=text):
            found.file(*names)
    with pytest.raises(DataError, match="cut short"):
        volume(data[: len(data) // 50]).file("EFI", "BOOT", "BOOTX64.EFI")


@needs_mtools
def test_a_file_of_absurd_size_and_a_chain_in_a_circle():
    raw = bytearray(_small())
    entry = raw.index(b"A       BIN")
    struct.pack_into("<I", raw, entry + 28, 0xFFFFFFFF)
    with pytest.raises(DataError, match="has 4294967295 bytes"):
        volume(bytes(raw)).file("EFI", "A.BIN")
    struct.pack_into("<I", raw, entry + 28, 1 << 29)
    (cluster,) = struct.unpack_from("<H", raw, entry + 26)
    (reserved,) = struct.unpack_from("<H", raw, 14)
    place = reserved * 512 + cluster + cluster // 2
    pair = int.from_bytes(raw[place : place + 2], "little")
    circle = cluster << 4 | pair & 0xF if cluster % 2 else cluster | pair & 0xF000
    struct.pack_into("<H", raw, place, circle)
    with pytest.raises(DataError, match="cut short"):
        volume(bytes(raw)).file("EFI", "A.BIN")


def test_a_file_system_without_room():
    raw = bytearray(_boot_sector_of(sectors=1))
    with pytest.raises(DataError, match="without room"):
        volume(bytes(raw))


def _boot_sector_of(*, sectors):
    fields = (b"\xeb\x3c\x90mkfs.fat", 512, 1, 1, 1, 16, sectors, 0xF8, 1, 0, 0, 0, 0)
    return struct.pack("<11sHBHBHHBHHHII", *fields).ljust(510, b"\0") + b"\x55\xaa"


@pytest.mark.parametrize("data", [b"", bytes(512), bytes(510) + b"\x55\xaa"])
def test_what_is_no_fat(data):
    with pytest.raises(DataError, match="no FAT"):
        volume(data)


@needs_mtools
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hostile_file_systems_are_data_errors(data):
    raw = bytearray(_small())
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.one_of(st.integers(11, 64), st.integers(512, 8192)))
        raw[at] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(volume(bytes(raw)).file("EFI", "A.BIN"), bytes)
    except DataError as exc:
        assert exc.message  # noqa: PT017


@functools.cache
def _small():
    """A genuine file system with /EFI/A.BIN."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "EFI").mkdir()
        (place / "EFI/A.BIN").write_bytes(b"a" * 9000)
        image = place / "img"
        image.write_bytes(bytes(1 << 20))
        commands = (
            ["mkfs.fat", "-F", "12", str(image)],
            ["mcopy", "-s", "-i", str(image), str(place / "EFI"), "::"],
        )
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
        return image.read_bytes()


# --- TDX metadata -----------------------------------------------------------------

BODY = bytes(range(256)) * 16 + b"\x5a" * 4096
PARTS = [
    (4096, 4096, 0xFFFFF000, 4096, 0, 1),  # code: added and measured
    (0, 4096, 0xFFFFE000, 4096, 1, 0),  # variables: added alone
    (0, 0, 0x810000, 8192, 3, 0),  # memory
    (0, 0, 0x900000, 4096, 4, 2),  # accepted later by the guest
]


def test_mrtd_by_the_calls_that_build_the_td():
    calls = b""
    for address, chunks in (
        (0xFFFFF000, 16),
        (0xFFFFE000, 0),
        (0x810000, 0),
        (0x811000, 0),
    ):
        calls += (
            b"MEM.PAGE.ADD".ljust(16, b"\0") + struct.pack("<Q", address) + bytes(104)
        )
        for one in range(chunks):
            place = struct.pack("<Q", address + 256 * one)
            calls += b"MR.EXTEND".ljust(16, b"\0") + place + bytes(104) + b"\x5a" * 256
    firmware = make_firmware(PARTS, body=BODY)
    assert mrtd(firmware, parse_tdvf(firmware)) == sha384(calls)


def test_only_what_is_measured_and_where_it_lies_counts():
    plain = make_firmware(PARTS, body=BODY)
    before = mrtd(plain, parse_tdvf(plain))
    other = make_firmware(PARTS, body=b"\xff" * 4096 + BODY[4096:])
    assert mrtd(other, parse_tdvf(other)) == before
    changed = make_firmware(PARTS, body=BODY[:-1] + b"!")
    assert mrtd(changed, parse_tdvf(changed)) != before
    moved = make_firmware([PARTS[0], (0, 0, 0x820000, 8192, 3, 0)], body=BODY)
    assert mrtd(moved, parse_tdvf(moved)) != before


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ((0, 4096, 1, 4096, 0, 1), "whole pages"),
        ((0, 4096, 4096, 8192, 0, 1), "partly in the file"),
        ((8192, 4096, 4096, 4096, 0, 1), "outside of the file"),
        ((0, 4096, 4096, 4096, 0, 8), "unknown attributes"),
        ((0, 0, 1 << 60, 4096, 0, 0), "outside of what"),
        ((0, 0, 0, 1 << 40, 0, 0), "too much memory"),
    ],
)
def test_bad_sections_are_named(part, text):
    with pytest.raises(DataError, match=text):
        parse_tdvf(make_firmware([part], body=bytes(8000)))


GOOD = make_firmware(PARTS, body=BODY)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no OVMF firmware"),
        (bytes(4096), "no OVMF firmware"),
        (edited(GOOD, len(GOOD) - 32 - 18, 18, "<H"), "no TDX metadata"),
        (edited(GOOD, len(GOOD) - 32 - 36, 5, "<H"), "is broken"),
        (edited(GOOD, len(GOOD) - 32 - 40, 1 << 30), "outside of the file"),
        (edited(GOOD, len(GOOD) - 32 - 40, 100), "unknown form"),
        (edited(GOOD, len(BODY) + 12, 60), "cut short"),
        (
            edited(
                edited(GOOD, len(GOOD) - 32 - 36, 23, "<H"), len(GOOD) - 50, 41, "<H"
            ),
            "is broken",
        ),
    ],
)
def test_bad_firmware_is_named(data, text):
    with pytest.raises(DataError, match=text):
        parse_tdvf(data)


@given(st.data())
def test_hostile_firmware_is_a_data_error(data):
    raw = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(len(BODY), len(raw) - 1))] = data.draw(
            st.integers(0, 255)
        )
    try:
        sections = parse_tdvf(bytes(raw))
    except DataError as exc:
        assert exc.message  # noqa: PT017
        return
    if sum(one.memory_bytes for one in sections) < 1 << 20:
        assert len(mrtd(bytes(raw), sections)) == 48
