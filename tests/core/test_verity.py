"""The hash tree, against the definition in the kernel and against veritysetup."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import verity


def kernel_levels(data_blocks: int) -> list[tuple[int, int]]:
    """Position and size of each level, top first: a transcription of verity_ctr."""
    bits = 7
    levels = 0
    while (data_blocks - 1) >> (bits * levels):
        levels += 1
    position = data_blocks
    made = []
    for i in range(levels - 1, -1, -1):
        size = (data_blocks + (1 << ((i + 1) * bits)) - 1) >> ((i + 1) * bits)
        made.append((position, size))
        position += size
    return made


def build(data: bytes, salt: bytes) -> tuple[bytes, bytes]:
    """Return (tree, root hash) by the module's own pieces."""
    tree = verity.geometry(len(data) // 4096)
    payload = bytearray(data + bytes(tree.hash_blocks * 4096))
    for level in reversed(tree.levels):
        start = level.covered_first_block * 4096
        covered = memoryview(payload)[start : start + level.covered_blocks * 4096]
        made = verity.padded(verity.run_digests(salt, covered))
        del covered
        payload[level.first_block * 4096 : level.first_block * 4096 + len(made)] = made
    top = tree.levels[0].first_block * 4096 if tree.levels else 0
    return bytes(payload[len(data) :]), verity.block_digest(
        salt, bytes(payload[top : top + 4096])
    )


@given(st.integers(1, 2**40))
def test_levels_lie_where_the_kernel_looks(data_blocks):
    tree = verity.geometry(data_blocks)
    got = [(level.first_block, level.blocks) for level in tree.levels]
    assert got == kernel_levels(data_blocks)
    assert tree.hash_blocks == sum(size for _, size in got)


@given(st.integers(2, 2**40))
def test_each_level_covers_the_one_below(data_blocks):
    levels = verity.geometry(data_blocks).levels
    assert levels[0].blocks == 1
    for upper, lower in itertools.pairwise(levels):
        assert (upper.covered_first_block, upper.covered_blocks) == (
            lower.first_block,
            lower.blocks,
        )
    assert (levels[-1].covered_first_block, levels[-1].covered_blocks) == (
        0,
        data_blocks,
    )


def test_one_data_block_has_no_tree():
    assert verity.geometry(1).levels == ()


def test_no_data_is_refused():
    with pytest.raises(ValueError, match="0 data blocks"):
        verity.geometry(0)


def test_the_salt_goes_before_the_data():
    block = bytes(range(256)) * 16
    assert (
        verity.block_digest(b"s" * 32, block)
        == hashlib.sha256(b"s" * 32 + block).digest()
    )


@pytest.mark.skipif(not shutil.which("veritysetup"), reason="no veritysetup")
@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 128 * 128, 128 * 128 + 1])
def test_veritysetup_makes_the_same_tree(tmp_path, blocks):
    salt = bytes(range(32))
    data = b"".join(
        hashlib.sha256(n.to_bytes(4, "big")).digest() * 128 for n in range(blocks)
    )
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "tree").write_bytes(b"")
    made = subprocess.run(
        [
            "veritysetup",
            "format",
            "--no-superblock",
            "--salt",
            salt.hex(),
            "data",
            "tree",
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    tree, root = build(data, salt)
    assert (tmp_path / "tree").read_bytes() == tree
    assert f"Root hash:      \t{root.hex()}" in made.stdout
