"""The memory mapper names the block that is wrong, wherever in its work it meets it.

What holds for every mapper is in test_image_sealed.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.errors import IntegrityError
from tdxd.host.memory_map import MemoryMapper
from tests import reference_image
from tests.attacks.images import assert_refused, at_block, flip, opened
from tests.leftovers import nothing_left
from tests.reference_image import Reference

pytestmark = pytest.mark.root

DATA_BLOCKS = 1200  # ten leaf hash blocks and a top block; two ranges of work
WRONG_BLOCK = "is not what was sealed"


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    with nothing_left(str(tmp_path)):
        yield


@pytest.fixture
def mapper() -> MemoryMapper:
    return MemoryMapper(limit_bytes=2**30, workers=2)


@pytest.fixture
def image(tmp_path: Path) -> Reference:
    data = os.urandom(DATA_BLOCKS * 4096)
    return reference_image.seal(data, tmp_path / "m.img", volume_id="contract")


@pytest.mark.parametrize("block", [0, 1, 1023, 1024, DATA_BLOCKS - 1])
def test_a_flipped_data_byte_names_its_block(mapper, image, block):
    flip(image.path, at_block(block) + 4095)
    outcome = opened(mapper, image.path, image)
    assert_refused(outcome, f"block {block} {WRONG_BLOCK}")


@pytest.mark.parametrize("block", [DATA_BLOCKS + 1, DATA_BLOCKS + 10])
def test_a_flipped_byte_of_a_leaf_hash_block_names_that(mapper, image, block):
    flip(image.path, at_block(block))
    outcome = opened(mapper, image.path, image)
    assert_refused(outcome, f"block {block} {WRONG_BLOCK}")


def test_a_file_that_shrinks_while_it_is_read_is_refused(image):
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)

    def shrink() -> bool:
        # Called once the size was checked, the tree verified and the first range handed out.
        os.truncate(image.path, at_block(1100))
        return False

    with pytest.raises(IntegrityError, match="ends inside block"):
        mapper.map_volume(str(image.path), image.bundle, cancelled=shrink)
