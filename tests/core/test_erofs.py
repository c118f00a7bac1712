"""The walk over an erofs image that sets its modes."""

from __future__ import annotations

import functools
import stat
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import erofs
from tdxd.errors import DataError
from tests import reference_image


@functools.cache
def image() -> bytes:
    """Return an image with a directory that needs several blocks, and one that is inline."""
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "source")
        (source / "models/many").mkdir(parents=True)
        for number in range(400):
            (source / f"models/many/{'n' * 30}{number}").write_bytes(b"x" * number)
        (source / "tls/inner").mkdir(parents=True)
        (source / "tls/inner/key").write_bytes(b"k")
        (source / "models/tls").mkdir()
        (source / "models/tls/public").write_bytes(b"p")
        return reference_image.file_system(source, Path(name, "fs"))


def patches(data: bytes) -> list[erofs.Patch]:
    return list(erofs.normalised_modes(lambda at, size: data[at : at + size]))


def modes(made: Iterable[erofs.Patch]) -> list[int]:
    return sorted(int.from_bytes(value, "little") for _, value in made)


def test_every_inode_is_found_once():
    made = patches(image())
    assert len({offset for offset, _ in made}) == len(made)
    kinds = [stat.S_IFMT(mode) for mode in modes(made)]
    assert kinds.count(stat.S_IFREG) == 402
    assert kinds.count(stat.S_IFDIR) == 6


def test_only_the_top_tls_directory_is_private():
    found = modes(patches(image()))
    assert found.count(stat.S_IFREG | 0o600) == 1
    assert found.count(stat.S_IFDIR | 0o700) == 2
    assert found.count(stat.S_IFREG | 0o444) == 401
    assert found.count(stat.S_IFDIR | 0o555) == 4


def test_normalising_twice_changes_nothing_more():
    data = bytearray(image())
    for _ in range(2):
        for offset, value in patches(bytes(data)):
            data[offset : offset + 2] = value
    once = bytearray(image())
    for offset, value in patches(image()):
        once[offset : offset + 2] = value
    assert data == once


def test_the_checksum_of_mkfs_is_computed_alike():
    patch = erofs.superblock_checksum(image()[:4096])
    assert patch is not None
    offset, value = patch
    assert image()[offset : offset + 4] == value


def test_without_the_feature_there_is_no_checksum():
    data = bytearray(image()[:4096])
    data[1032] &= ~1
    assert erofs.superblock_checksum(bytes(data)) is None


@pytest.mark.parametrize("size", [0, 1024, 1100, 1160])
def test_a_cut_image_is_refused(size):
    with pytest.raises(DataError, match="ends before byte"):
        patches(image()[:size])


def test_another_file_system_is_refused():
    with pytest.raises(DataError, match="is not erofs"):
        patches(bytes(8192))


@given(st.integers(1024, 8191), st.integers(1, 255))
def test_a_damaged_image_is_walked_or_refused_but_never_a_crash(offset, flip):
    data = bytearray(image())
    data[offset] ^= flip
    try:
        made = patches(bytes(data))
    except DataError:
        return
    assert all(0 <= at < len(data) for at, _ in made)


def test_entries_are_the_names_and_say_where_the_content_stands():
    data = image()
    found = {one.path: one.inode for one in erofs.entries(reader(data))}
    assert len(found) == 402 + 5
    assert "models/many" in found
    for number in (0, 1, 399):
        inode = found[f"models/many/{'n' * 30}{number}"]
        content = b"".join(data[at : at + size] for at, size in inode.extents)
        assert content == b"x" * number


def reader(data: bytes) -> erofs.Read:
    return lambda at, size: data[at : at + size]


@given(st.integers(1024, 65535), st.integers(1, 255))
def test_a_damaged_image_is_listed_or_refused_but_never_a_crash(offset, flip):
    data = bytearray(image())
    data[offset % len(data)] ^= flip
    try:
        found = list(erofs.entries(reader(bytes(data))))
    except DataError:
        return
    paths = [one.path for one in found]
    assert not any(
        part in ("", ".", "..") for path in paths for part in path.split("/")
    )
