"""The hash tree of an image: opened as far as it must stay in memory, the rest with the data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import pytest

from tdxd.core import verity
from tdxd.core.bundle import volume_key
from tdxd.errors import IntegrityError
from tdxd.host.image_file import Leaves, open_image, open_tree
from tdxd.host.range_worker import Task
from tdxd.host.workers import Workers
from tests import reference_image
from tests.reference_image import Reference

DEEP_BLOCKS = 128 * 128 + 1
"""The fewest that need three levels."""


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("tree")
    yield fd
    os.close(fd)


def sealed(tmp_path, blocks: int) -> Reference:
    # Different in every block, and quick to make.
    content = b"".join(number.to_bytes(4096, "big") for number in range(blocks))
    return reference_image.seal(content, tmp_path / "m.img", volume_id="m")


def verify(image: Reference, memory: int) -> Leaves:
    manifest, path = image.bundle.manifest, str(image.path)
    with open_image(path, manifest) as fd, volume_key(image.bundle) as key:
        leaves = open_tree(path, fd, manifest, key.reveal(), memory)
        task = Task(
            op="open",
            in_fd=fd,
            in_base=manifest.payload_offset_bytes,
            out_fd=-1,
            out_base=0,
            digests_fd=memory,
            digests_base=leaves.digests_base,
            leaf_block=leaves.first_block,
            key=key.reveal(),
            salt=manifest.salt,
        )
        with Workers(2, fds=(fd, memory), what=path) as workers:
            workers.run(task, blocks=manifest.data_blocks)
    return leaves


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 1025, DEEP_BLOCKS])
def test_a_tree_of_any_height_takes_next_to_no_memory(tmp_path, memory, blocks):
    image = sealed(tmp_path, blocks)
    leaves = verify(image, memory)
    manifest = image.bundle.manifest
    levels = verity.geometry(blocks).levels
    kept = sum(level.blocks for level in levels[:-1]) or 1
    assert os.fstat(memory).st_blocks * 512 == kept * 4096
    assert leaves.first_block == (levels[-1].first_block if levels else -1)
    first = image.data[:4096]
    if levels:
        digests = [
            hashlib.sha256(manifest.salt + image.data[start : start + 4096]).digest()
            for start in range(0, min(blocks, 128) * 4096, 4096)
        ]
        first = b"".join(digests).ljust(4096, b"\0")
    found = os.pread(memory, 32, leaves.digests_base)
    assert found == hashlib.sha256(manifest.salt + first).digest()


@pytest.mark.parametrize("blocks", [129, DEEP_BLOCKS])
def test_each_level_of_the_tree_is_verified(tmp_path, memory, blocks):
    image = sealed(tmp_path, blocks)
    offset = image.bundle.manifest.payload_offset_bytes
    top, *lower = verity.geometry(blocks).levels
    for level in lower:
        for block in (level.first_block, level.first_block + level.blocks - 1):
            flip(image, offset + block * 4096 + 5)
            with pytest.raises(IntegrityError, match=f"block {block} is not"):
                verify(image, memory)
            flip(image, offset + block * 4096 + 5)
    flip(image, offset + top.first_block * 4096)
    with pytest.raises(IntegrityError, match="does not open with the key"):
        verify(image, memory)


def flip(image: Reference, at: int) -> None:
    with image.path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
