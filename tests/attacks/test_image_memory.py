"""A hostile host changes, swaps or shortens the image: the memory mapper never maps it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.core.secret import Secret
from tdxd.errors import (
    EX_DATAERR,
    BadHeaderError,
    IntegrityError,
    MissingError,
    Retry,
    VolumeError,
)
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.workers import never
from tests import reference_image
from tests.leftovers import held
from tests.reference_image import PAYLOAD_OFFSET, Reference

pytestmark = pytest.mark.root

DATA_BLOCKS = 1200  # ten leaf hash blocks and a top block; two ranges of work
WRONG_KEY = "does not open with the key of contract"
WRONG_BLOCK = "is not what was sealed"


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    before = held(str(tmp_path))
    yield
    assert held(str(tmp_path)) == before


@pytest.fixture
def image(tmp_path: Path) -> Reference:
    data = os.urandom(DATA_BLOCKS * 4096)
    return reference_image.seal(data, tmp_path / "m.img", volume_id="contract")


def attempt(path: Path, image: Reference, **changes: object) -> VolumeError:
    """Map with the image's bundle, its manifest changed; return the refusal."""
    mapper = MemoryMapper(limit_bytes=2**30, workers=2)
    bundle = image.with_manifest(**changes)
    with pytest.raises(VolumeError) as caught:
        mapper.unmap(mapper.map_volume(str(path), bundle, cancelled=never))
    return caught.value


def assert_integrity(error: VolumeError, text: str) -> None:
    assert isinstance(error, IntegrityError)
    assert text in error.message
    assert error.hint
    assert error.exit_code == EX_DATAERR
    assert error.retry is Retry.OPERATOR


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def at_block(block: int) -> int:
    return PAYLOAD_OFFSET + block * 4096


def test_a_flipped_header_byte_changes_nothing(image):
    flip(image.path, 100)
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    assert Path(mapped.device).read_bytes() == image.data
    mapper.unmap(mapped)


@pytest.mark.parametrize("block", [0, 1, 1023, 1024, DATA_BLOCKS - 1])
def test_a_flipped_data_byte_names_its_block(image, block):
    flip(image.path, at_block(block) + 4095)
    assert_integrity(attempt(image.path, image), f"block {block} {WRONG_BLOCK}")


def test_a_flipped_byte_of_the_top_hash_block_is_a_wrong_key(image):
    flip(image.path, at_block(DATA_BLOCKS))
    assert_integrity(attempt(image.path, image), WRONG_KEY)


@pytest.mark.parametrize("block", [DATA_BLOCKS + 1, DATA_BLOCKS + 10])
def test_a_flipped_byte_of_a_leaf_hash_block_is_found(image, block):
    flip(image.path, at_block(block))
    assert_integrity(attempt(image.path, image), f"block {block} {WRONG_BLOCK}")


def test_the_last_byte_of_the_file_counts(image):
    flip(image.path, image.path.stat().st_size - 1)
    assert_integrity(attempt(image.path, image), WRONG_BLOCK)


def test_two_swapped_blocks_are_found(image):
    data = bytearray(image.path.read_bytes())
    one, other = (slice(at_block(n), at_block(n + 1)) for n in (5, 6))
    data[one], data[other] = data[other], data[one]
    image.path.write_bytes(data)
    assert_integrity(attempt(image.path, image), f"block 5 {WRONG_BLOCK}")


@pytest.mark.parametrize("missing", [1, 4096, 11 * 4096, DATA_BLOCKS * 4096])
def test_a_truncated_file_is_refused(image, missing):
    os.truncate(image.path, image.path.stat().st_size - missing)
    error = attempt(image.path, image)
    assert_integrity(error, f"needs {image.bundle.manifest.image_bytes}")
    assert "truncated" in error.hint


def test_an_empty_file_is_refused(image):
    os.truncate(image.path, 0)
    assert_integrity(attempt(image.path, image), "0 bytes, contract generation 1 needs")


def test_a_file_that_shrinks_while_it_is_read_is_refused(image):
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)

    def shrink() -> bool:
        # Called once the size was checked, the tree verified and the first range handed out.
        os.truncate(image.path, at_block(1100))
        return False

    with pytest.raises(IntegrityError, match="ends inside block 1100"):
        mapper.map_volume(str(image.path), image.bundle, cancelled=shrink)


def test_another_volumes_image_is_refused(image, tmp_path):
    other = reference_image.seal(image.data, tmp_path / "o.img", volume_id="other")
    assert_integrity(attempt(other.path, image), WRONG_KEY)


def test_an_older_generation_is_refused(image, tmp_path):
    newer = reference_image.seal(
        image.data, tmp_path / "n.img", volume_id="contract", generation=2
    )
    error = attempt(image.path, newer)
    assert_integrity(error, f"{WRONG_KEY} generation 2")
    assert "another generation" in error.hint


def test_a_bundle_with_another_secret_is_refused(image):
    bundle = KeyBundle(manifest=image.bundle.manifest, secret=Secret(bytes(64)))
    other = dataclasses.replace(image, bundle=bundle)
    assert_integrity(attempt(image.path, other), WRONG_KEY)


@pytest.mark.parametrize(
    "changes",
    [
        {"volume_id": "contracu"},
        {"generation": 2},
        {"payload_offset_bytes": PAYLOAD_OFFSET - 4096},
        {"root_hash": bytes(32)},
        {"salt": bytes(32)},
        {"data_blocks": DATA_BLOCKS - 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_manifest_field_gives_a_useless_key(image, changes):
    assert_integrity(
        attempt(image.path, image, **changes), "does not open with the key"
    )


def test_a_manifest_whose_tree_does_not_fit_is_refused(image):
    hash_blocks = image.bundle.manifest.hash_blocks - 1
    error = attempt(image.path, image, hash_blocks=hash_blocks)
    assert_integrity(error, f"has {hash_blocks} hash blocks, its {DATA_BLOCKS} data")


def test_a_manifest_that_claims_more_than_the_file_is_refused(image):
    offset = PAYLOAD_OFFSET + 4096
    assert_integrity(
        attempt(image.path, image, payload_offset_bytes=offset), "generation 1 needs"
    )


def test_a_symbolic_link_is_not_followed(image, tmp_path):
    (tmp_path / "link").symlink_to(image.path)
    error = attempt(tmp_path / "link", image)
    assert isinstance(error, BadHeaderError)
    assert error.message == f"{tmp_path}/link: is a symbolic link"


def test_a_fifo_does_not_hang(image, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    error = attempt(tmp_path / "fifo", image)
    assert isinstance(error, BadHeaderError)
    assert "is no regular file" in error.message


def test_a_character_device_is_refused(image):
    assert isinstance(attempt(Path("/dev/zero"), image), BadHeaderError)


def test_a_directory_is_refused(image, tmp_path):
    error = attempt(tmp_path, image)
    assert isinstance(error, BadHeaderError)
    assert error.message == f"{tmp_path}: is a directory"
    assert error.exit_code == EX_DATAERR


def test_a_missing_file_is_waited_for(image, tmp_path):
    error = attempt(tmp_path / "none", image)
    assert isinstance(error, MissingError)
    assert error.retry is Retry.BACKOFF
