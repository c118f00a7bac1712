"""A hostile host forges or changes foreign images: no mapper ever shows what it wrote.

Every image of `luks2_images` is opened with the right passphrase by each mapper: by `memory`
everywhere, by `dm` on a kernel that has it, which is the guest's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core.foreign import PassphraseBundle
from tdxd.errors import (
    BadHeaderError,
    BusyError,
    HostError,
    IntegrityError,
    WrongPassphraseError,
)
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import MappedVolume, Mapper
from tdxd.host.workers import never
from tests import luks2_genuine
from tests.attacks.luks2_images import HOST_PLAINTEXT, IMAGES, changed_between_reads
from tests.contract.test_mapper import MAPPERS, needs_dm
from tests.foreign_image import Foreign, foreign
from tests.leftovers import nothing_left
from tests.luks2_genuine import OWNER_PLAINTEXT, PASSPHRASE, PAYLOAD_OFFSET_BYTES

pytestmark = pytest.mark.root

REFUSED = sorted(name for name, one in IMAGES.items() if one.verdict == "refused")
OPENS = sorted(name for name, one in IMAGES.items() if one.verdict == "opens")
PAYLOAD_ONLY = {name for name in OPENS if name.startswith(("35-cut-in-payload", "36-"))}
"""They change nothing before the payload, where alone a pin reaches."""

TAKEN_BY_CRYPTSETUP = (
    "02-segment-null",
    "03-segment-capi-null",
    "09-shifted",
    "15-third-copy-0x10000",
    "16-duplicate-last",
    "18-nul-in-cipher",
    "19-comment",
    "27-two-digests",
)


@pytest.fixture(params=["memory", pytest.param("dm", marks=needs_dm)])
def mapper(request) -> Mapper:
    return MAPPERS[request.param]()


@pytest.fixture(scope="module")
def genuine(tmp_path_factory) -> Foreign:
    path = tmp_path_factory.mktemp("foreign") / "genuine.img"
    return foreign(luks2_genuine.ext4(), path)


@pytest.fixture(autouse=True)
def _nothing_left(genuine) -> Iterator[None]:
    """No descriptor, worker, loop device, mapping or mount outlives a test."""
    with nothing_left(str(genuine.path.parent)):
        yield


@contextlib.contextmanager
def hostile(name: str, genuine: Foreign) -> Iterator[Path]:
    """Make one of the images for the time of a with block."""
    path = IMAGES[name](genuine.path, PASSPHRASE)
    try:
        yield path
    finally:
        path.rmdir() if path.is_dir() else path.unlink()


@contextlib.contextmanager
def mapped(
    mapper: Mapper, path: Path, bundle: PassphraseBundle
) -> Iterator[MappedVolume]:
    volume = mapper.map_volume(str(path), bundle, cancelled=never)
    try:
        yield volume
    finally:
        mapper.unmap(volume)


def readable(volume: MappedVolume) -> bytes:
    """All that can be read of a device: a block that gives an error is left out."""
    found = []
    with Path(volume.device).open("rb", buffering=0) as device:
        size = device.seek(0, os.SEEK_END)
        for start in range(0, size, 2**16):
            device.seek(start)
            with contextlib.suppress(OSError):
                found.append(device.read(2**16))
    return b"".join(found)


def assert_harmless(volume: MappedVolume, point: Path) -> None:
    """Neither the device nor a mount of it shows what the host wrote.

    If it mounts, it is what the owner once wrote.
    """
    assert HOST_PLAINTEXT not in readable(volume)
    mounts = KernelMounts()
    try:
        mounts.mount_volume(volume, str(point))
    except HostError:
        return  # noise
    try:
        with contextlib.suppress(OSError):
            content = (point / "model").read_bytes()
            assert HOST_PLAINTEXT not in content
            assert content.startswith(OWNER_PLAINTEXT)
    finally:
        mounts.unmount(str(point))


def test_the_genuine_image_opens(mapper, genuine, tmp_path):
    """Else that the others are refused would mean nothing."""
    with mapped(mapper, genuine.path, genuine.bundle()) as volume:
        assert Path(volume.device).read_bytes() == genuine.data
    with mapped(mapper, genuine.path, genuine.pinned()) as volume:
        assert_harmless(volume, tmp_path / "point")


def test_there_is_an_image_of_every_attack():
    assert {IMAGES[name].number for name in REFUSED + OPENS} == set(range(1, 37))


def test_cryptsetup_itself_takes_some_of_them(genuine):
    """They are no straw men: with the right passphrase the usual reader finds no fault."""
    for name in TAKEN_BY_CRYPTSETUP:
        with hostile(name, genuine) as path:
            luks2_genuine.cryptsetup(
                "open", "--test-passphrase", path, passphrase=PASSPHRASE
            )


@pytest.mark.parametrize("name", REFUSED)
def test_a_forged_image_is_refused_with_the_right_passphrase(mapper, genuine, name):
    with hostile(name, genuine) as path:
        with pytest.raises((BadHeaderError, WrongPassphraseError)) as caught:
            mapper.map_volume(str(path), genuine.bundle(), cancelled=never)
        assert str(path) in caught.value.message
        assert PASSPHRASE.decode() not in caught.value.message + caught.value.hint


@pytest.mark.parametrize("name", OPENS)
def test_a_forged_image_that_opens_shows_nothing_of_the_hosts(
    mapper, genuine, name, tmp_path
):
    with (
        hostile(name, genuine) as path,
        mapped(mapper, path, genuine.bundle()) as volume,
    ):
        assert_harmless(volume, tmp_path / "point")


@pytest.mark.parametrize("name", sorted(set(OPENS) - PAYLOAD_ONLY))
def test_a_pinned_header_refuses_the_rest(mapper, genuine, name):
    with (
        hostile(name, genuine) as path,
        pytest.raises(IntegrityError, match="its header is not the one"),
    ):
        mapper.map_volume(str(path), genuine.pinned(), cancelled=never)


def test_a_header_that_changes_between_reads_is_read_once(mapper, genuine, tmp_path):
    """Attack 35: what is validated is what is used."""
    image = tmp_path / "changing.img"
    shutil.copy(genuine.path, image)
    with (
        hostile("02-segment-null", genuine) as other,
        changed_between_reads(image, other),
    ):
        for _ in range(5):
            with (
                contextlib.suppress(BadHeaderError, WrongPassphraseError),
                mapped(mapper, image, genuine.bundle()) as volume,
            ):
                assert HOST_PLAINTEXT not in readable(volume)


def test_a_file_that_changes_after_mapping_shows_noise_at_worst(mapper, genuine):
    image = genuine.path.with_name("changed.img")
    shutil.copy(genuine.path, image)
    host = HOST_PLAINTEXT * (len(genuine.data) // len(HOST_PLAINTEXT))
    try:
        with mapped(mapper, image, genuine.bundle()) as volume:
            with image.open("r+b") as file:
                file.seek(PAYLOAD_OFFSET_BYTES)
                file.write(host)
                os.fsync(file.fileno())
            content = readable(volume)
            assert HOST_PLAINTEXT not in content
            if volume.mapper == "memory":
                assert content == genuine.data
    finally:
        image.unlink()


def test_a_file_that_shrinks_after_mapping_shows_noise_at_worst(mapper, genuine):
    image = genuine.path.with_name("shrunk.img")
    shutil.copy(genuine.path, image)
    try:
        with mapped(mapper, image, genuine.bundle()) as volume:
            os.truncate(image, PAYLOAD_OFFSET_BYTES + 8192)
            with (
                contextlib.suppress(OSError),
                Path(volume.device).open("rb", buffering=0) as device,
            ):
                assert device.read(8192) == genuine.data[:8192]
            content = readable(volume)
            if volume.mapper == "memory":
                assert content == genuine.data
    finally:
        image.unlink()


@needs_dm
def test_another_image_does_not_slip_under_an_open_mapping(genuine):
    """The uuid names volume and manifest: a second mapping of it is refused."""
    mapper = MAPPERS["dm"]()
    with (
        hostile("31-other-volume-same-passphrase", genuine) as other,
        mapped(mapper, genuine.path, genuine.bundle()) as volume,
    ):
        with pytest.raises(BusyError):
            mapper.map_volume(str(other), genuine.bundle(), cancelled=never)
        assert Path(volume.device).read_bytes() == genuine.data
