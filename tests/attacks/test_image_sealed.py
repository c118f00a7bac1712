"""A hostile host changes, swaps or shortens a sealed image: no mapper ever shows a wrong byte.

The memory mapper reads all before there is a device, and refuses; dm-verity gives EIO for each
block that is not what was sealed, and for no other. Either way nothing stays mapped.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.core.secret import Secret
from tdxd.errors import EX_DATAERR, BadHeaderError, MissingError, Retry, TdxdError
from tdxd.host import loop, mount
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import Mapper
from tdxd.host.workers import never
from tests import reference_image
from tests.attacks.images import (
    HARMFUL,
    HARMLESS,
    Outcome,
    assert_found,
    assert_refused,
    at_block,
    flip,
    opened,
)
from tests.contract.test_mapper import MAPPERS, needs_dm
from tests.leftovers import nothing_left
from tests.reference_image import PAYLOAD_OFFSET, Reference

pytestmark = pytest.mark.root

DATA_BLOCKS = 140  # a top hash block and two leaves
TOP = DATA_BLOCKS
LEAVES = (range(128), range(128, DATA_BLOCKS))
"""The data blocks that each leaf covers."""
WRONG_KEY = "does not open with the key of contract"
DATA = os.urandom(DATA_BLOCKS * 4096)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    with nothing_left(str(tmp_path)):
        yield


@pytest.fixture(params=["memory", pytest.param("dm", marks=needs_dm)])
def mapper(request) -> Mapper:
    return MAPPERS[request.param]()


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Reference:
    place = tmp_path_factory.mktemp("sealed") / "m.img"
    return reference_image.seal(DATA, place, volume_id="contract")


@pytest.fixture
def image(sealed, tmp_path) -> Reference:
    path = tmp_path / "m.img"
    path.write_bytes(sealed.path.read_bytes())
    bundle = KeyBundle(manifest=sealed.bundle.manifest, secret=sealed.fresh_secret())
    return Reference(path=path, bundle=bundle, data=DATA)


# --- every region flipped -----------------------------------------------------


@pytest.mark.parametrize("offset", [0, 100, PAYLOAD_OFFSET - 1])
def test_a_flipped_header_byte_changes_nothing(mapper, image, offset):
    flip(image.path, offset)
    assert opened(mapper, image.path, image).harmless


def test_a_header_of_other_bytes_changes_nothing(mapper, image):
    with image.path.open("r+b") as file:
        file.write(os.urandom(PAYLOAD_OFFSET))
    assert opened(mapper, image.path, image).harmless


@pytest.mark.parametrize("block", [0, 128, DATA_BLOCKS - 1])
def test_a_flipped_data_byte_is_found(mapper, image, block):
    flip(image.path, at_block(block) + 4095)
    assert_found(opened(mapper, image.path, image), mapper, {block})


def test_a_flipped_byte_of_the_top_hash_block_is_a_wrong_key(mapper, image):
    flip(image.path, at_block(TOP))
    assert_refused(opened(mapper, image.path, image), WRONG_KEY)


@pytest.mark.parametrize("leaf", [0, 1])
def test_a_flipped_byte_of_a_leaf_hash_block_is_found(mapper, image, leaf):
    flip(image.path, at_block(TOP + 1 + leaf))
    assert_found(opened(mapper, image.path, image), mapper, LEAVES[leaf])


def test_the_last_byte_of_the_file_counts(mapper, image):
    """It is a zero that fills up the last leaf."""
    flip(image.path, image.path.stat().st_size - 1)
    assert_found(opened(mapper, image.path, image), mapper, LEAVES[1])


def test_two_swapped_blocks_are_found(mapper, image):
    data = bytearray(image.path.read_bytes())
    one, other = (slice(at_block(n), at_block(n + 1)) for n in (5, 6))
    data[one], data[other] = data[other], data[one]
    image.path.write_bytes(data)
    assert_found(opened(mapper, image.path, image), mapper, {5, 6})


def test_a_hole_in_place_of_blocks_is_found(mapper, image):
    data = image.path.read_bytes()
    with image.path.open("wb") as file:
        file.write(data[: at_block(10)])
        file.seek(at_block(30))
        file.write(data[at_block(30) :])
    assert_found(opened(mapper, image.path, image), mapper, range(10, 30))


# --- longer, shorter, another one ---------------------------------------------


@pytest.mark.parametrize("missing", [1, 4096, 3 * 4096, DATA_BLOCKS * 4096])
def test_a_truncated_file_is_refused(mapper, image, missing):
    os.truncate(image.path, image.path.stat().st_size - missing)
    outcome = opened(mapper, image.path, image)
    assert_refused(outcome, f"needs {image.bundle.manifest.image_bytes}")


def test_an_empty_file_is_refused(mapper, image):
    os.truncate(image.path, 0)
    text = "0 bytes, contract generation 1 needs"
    assert_refused(opened(mapper, image.path, image), text)


@pytest.mark.parametrize("more", [1, 4096, 5000])
def test_an_extended_file_shows_nothing_more(mapper, image, more):
    with image.path.open("ab") as file:
        file.write(os.urandom(more))
    assert opened(mapper, image.path, image).harmless


def test_another_volumes_image_is_refused(mapper, image, tmp_path):
    other = reference_image.seal(image.data, tmp_path / "o.img", volume_id="other")
    assert_refused(opened(mapper, other.path, image), WRONG_KEY)


def test_an_older_generation_is_refused(mapper, image, tmp_path):
    newer = reference_image.seal(
        image.data, tmp_path / "n.img", volume_id="contract", generation=2
    )
    outcome = opened(mapper, image.path, newer)
    assert_refused(outcome, f"{WRONG_KEY} generation 2")
    assert outcome.refused is not None
    assert "another generation" in outcome.refused.hint


def test_blocks_of_an_older_generation_in_the_newer_image_are_found(
    mapper, image, tmp_path
):
    """The same content under the same secret, and yet no block fits."""
    newer = reference_image.seal(
        image.data, tmp_path / "n.img", volume_id="contract", generation=2
    )
    old = slice(at_block(40), at_block(50))
    data = bytearray(newer.path.read_bytes())
    data[old] = image.path.read_bytes()[old]
    newer.path.write_bytes(data)
    assert_found(opened(mapper, newer.path, newer), mapper, range(40, 50))


def test_a_bundle_with_another_secret_is_refused(mapper, image):
    bundle = KeyBundle(manifest=image.bundle.manifest, secret=Secret(bytes(64)))
    assert_refused(opened(mapper, image.path, image, bundle=bundle), WRONG_KEY)


# --- what is no image ---------------------------------------------------------


def refusal(mapper: Mapper, path: Path | str, image: Reference) -> TdxdError:
    error = opened(mapper, Path(path), image).refused
    assert error is not None
    return error


def test_a_symbolic_link_is_not_followed(mapper, image, tmp_path):
    (tmp_path / "link").symlink_to(image.path)
    error = refusal(mapper, tmp_path / "link", image)
    assert isinstance(error, BadHeaderError)
    assert error.message == f"{tmp_path}/link: is a symbolic link"


def test_a_fifo_does_not_hang(mapper, image, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    error = refusal(mapper, tmp_path / "fifo", image)
    assert isinstance(error, BadHeaderError)
    assert "is no regular file" in error.message


def test_a_socket_is_refused(mapper, image, tmp_path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        error = refusal(mapper, tmp_path / "socket", image)
    assert isinstance(error, BadHeaderError)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/dev/tty", "/dev/random"])
def test_a_character_device_is_refused(mapper, image, path):
    error = refusal(mapper, path, image)
    assert isinstance(error, BadHeaderError), error


def test_a_device_node_made_beside_the_images_is_refused(mapper, image, tmp_path):
    """Major and minor of /dev/mem, under a name that a pattern matches."""
    os.mknod(tmp_path / "x.img", stat.S_IFCHR | 0o600, os.makedev(1, 1))
    error = refusal(mapper, tmp_path / "x.img", image)
    assert error.exit_code in (EX_DATAERR, 71)


def test_a_block_device_of_other_bytes_is_refused(mapper, image, tmp_path):
    (tmp_path / "other").write_bytes(bytes(image.path.stat().st_size))
    with (tmp_path / "other").open("rb") as file:
        device, fd = loop.attach(file.fileno(), name="contract-other")
    try:
        assert_refused(opened(mapper, Path(device), image), WRONG_KEY)
    finally:
        os.close(fd)


def test_a_directory_is_refused(mapper, image, tmp_path):
    error = refusal(mapper, tmp_path, image)
    assert isinstance(error, BadHeaderError)
    assert error.message == f"{tmp_path}: is a directory"
    assert error.exit_code == EX_DATAERR


@pytest.mark.parametrize(
    "path", ["/proc/self/mem", "/proc/self/exe", "/proc/self/pagemap"]
)
def test_a_file_of_the_kernel_is_refused(mapper, image, path):
    assert refusal(mapper, path, image).exit_code in (EX_DATAERR, 71)


def test_a_missing_file_is_waited_for(mapper, image, tmp_path):
    error = refusal(mapper, tmp_path / "none", image)
    assert isinstance(error, MissingError)
    assert error.retry is Retry.BACKOFF


# --- the manifest -------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def changes_of(image: Reference) -> dict[str, dict[str, object]]:
    """Each field off by one, both ways where there are two."""
    manifest = image.bundle.manifest
    hash_blocks, offset = manifest.hash_blocks, manifest.payload_offset_bytes
    return {
        "volume_id": {"volume_id": "contracu"},
        "generation": {"generation": 2},
        "payload_offset_bytes+": {"payload_offset_bytes": offset + 4096},
        "payload_offset_bytes-": {"payload_offset_bytes": offset - 4096},
        "data_blocks+": {"data_blocks": DATA_BLOCKS + 1},
        "data_blocks-": {"data_blocks": DATA_BLOCKS - 1},
        "hash_blocks+": {"hash_blocks": hash_blocks + 1},
        "hash_blocks-": {"hash_blocks": hash_blocks - 1},
        "root_hash": {"root_hash": flipped(manifest.root_hash)},
        "salt": {"salt": flipped(manifest.salt)},
    }


FIELDS = (
    *("volume_id", "generation", "payload_offset_bytes+", "payload_offset_bytes-"),
    *("data_blocks+", "data_blocks-", "hash_blocks+", "hash_blocks-"),
    *("root_hash", "salt"),
)


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_manifest_field_gives_a_useless_key(mapper, image, field):
    """The file is made longer, so that its size does not decide."""
    with image.path.open("ab") as file:
        file.write(bytes(2 * 4096))
    bundle = image.with_manifest(**changes_of(image)[field])
    text = "has" if field.startswith("hash_blocks") else "does not open with the key"
    assert_refused(opened(mapper, image.path, image, bundle=bundle), text)


def test_a_manifest_that_claims_more_than_the_file_is_refused(mapper, image):
    bundle = image.with_manifest(payload_offset_bytes=PAYLOAD_OFFSET + 4096)
    outcome = opened(mapper, image.path, image, bundle=bundle)
    assert_refused(outcome, "generation 1 needs")


# --- changed while it is opened, and later ------------------------------------


@pytest.mark.parametrize("attack", HARMFUL)
def test_a_file_changed_between_check_and_map_shows_no_wrong_byte(
    mapper, image, attack
):
    during = HARMFUL[attack]
    outcome = opened(mapper, image.path, image, during=lambda: during(image.path))
    if mapper.name == "dm" and outcome.refused is None:
        assert outcome.unreadable
    elif attack != "without its last block":
        assert outcome.refused is not None


@pytest.mark.parametrize("attack", HARMLESS)
def test_a_name_that_changes_hands_between_check_and_map_changes_nothing(
    mapper, image, attack
):
    during = HARMLESS[attack]
    outcome = opened(mapper, image.path, image, during=lambda: during(image.path))
    assert outcome.harmless


@pytest.mark.parametrize("attack", [*HARMFUL, *HARMLESS])
def test_a_file_changed_after_mapping_shows_no_wrong_byte(mapper, image, attack):
    """Memory holds what was sealed; under dm-verity the file may shrink below the loop device."""
    done = {**HARMFUL, **HARMLESS}[attack]
    outcome = opened(mapper, image.path, image, after=lambda: done(image.path))
    if mapper.name == "memory" or attack in HARMLESS:
        assert outcome.harmless
    else:
        assert outcome.unreadable
        # Past its end a loop device gives a disk error, or zeros: only those are a wrong block.
        assert not outcome.intact or attack != "overwritten"
    if attack == "without its last block":
        assert outcome.unreadable <= set(LEAVES[1])


@pytest.mark.parametrize("attack", ["overwritten", "emptied"])
def test_a_file_changed_after_mounting_shows_no_wrong_byte(mapper, tmp_path, attack):
    source, point = tmp_path / "source", tmp_path / "point"
    source.mkdir()
    content = os.urandom(2 * 2**20)
    (source / "big").write_bytes(content)
    data = reference_image.file_system(source, tmp_path / "fs")
    image = reference_image.seal(data, tmp_path / "m.img", volume_id="contract")
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    mounts = KernelMounts()
    try:
        mounts.mount_volume(mapped, str(point))
        with (point / "big").open("rb", buffering=0) as file:
            assert file.read(65536) == content[:65536]
            HARMFUL[attack](image.path)
            failed = 0
            for start in range(0, len(content), 65536):
                try:
                    got = os.pread(file.fileno(), 65536, start)
                except OSError:
                    failed += 1
                else:
                    assert got == content[start : start + len(got)]
        assert bool(failed) == (mapper.name == "dm")
        if attack == "overwritten":
            assert mapper.intact(mapped) == (mapper.name == "memory")
    finally:
        mounts.unmount(str(point))
        mapper.unmap(mapped)


def test_a_file_system_taken_away_under_the_image_changes_nothing(
    mapper, image, tmp_path
):
    """Detached, and another one mounted in its place: what was opened stays what it was."""
    place = tmp_path / "place"
    place.mkdir()
    mount.mount_tmpfs(str(place), size_bytes=8 * 2**20)
    (place / "m.img").write_bytes(image.path.read_bytes())

    def take_away() -> None:
        mount.detach(str(place))
        mount.mount_tmpfs(str(place), size_bytes=8 * 2**20)
        (place / "m.img").write_bytes(bytes(image.path.stat().st_size))

    try:
        outcome = opened(mapper, place / "m.img", image, after=take_away)
    finally:
        mount.detach(str(place))
    assert outcome == Outcome()
