"""The contract of every mapper with foreign volumes: cryptsetup's images, and nothing left."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core import dm_table
from tdxd.core.foreign import ForeignManifest
from tdxd.errors import (
    BadHeaderError,
    BusyError,
    HostError,
    IntegrityError,
    MissingError,
    WrongPassphraseError,
)
from tdxd.host import dm, loop, machine
from tdxd.host.dm_map import DmMapper
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.ports import MappedVolume, Mapper
from tdxd.host.workers import never
from tests import luks2_genuine, reference_image
from tests.contract.test_mapper import MAPPERS, needs_dm
from tests.foreign_image import Foreign, foreign
from tests.leftovers import nothing_left

pytestmark = pytest.mark.root

SIZE_BYTES = 5 * 2**20  # two ranges of work


@pytest.fixture(params=["memory", pytest.param("dm", marks=needs_dm)])
def mapper(request) -> Mapper:
    return MAPPERS[request.param]()


@pytest.fixture(scope="module", params=[512, 4096])
def image(request, tmp_path_factory) -> Foreign:
    """One for all tests that do not change it."""
    path = tmp_path_factory.mktemp("image") / "m.img"
    data = os.urandom(SIZE_BYTES)
    return foreign(data, path, sector_bytes=request.param)


@pytest.fixture
def small(tmp_path) -> Foreign:
    return foreign(os.urandom(65536), tmp_path / "small.img")


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path) -> Iterator[None]:
    with nothing_left(str(tmp_path)):
        yield


def read_device(mapped: MappedVolume) -> bytes:
    return Path(mapped.device).read_bytes()


def test_the_device_holds_the_payload(mapper, image):
    mapped = mapper.map_volume(str(image.path), image.bundle(), cancelled=never)
    try:
        assert read_device(mapped) == image.data
        assert mapped.mapper == mapper.name
        assert mapped.manifest == image.bundle().manifest
        assert (mapped.payload_bytes, mapped.writable) == (SIZE_BYTES, False)
        assert mapper.intact(mapped)
    finally:
        mapper.unmap(mapped)


def test_the_device_has_the_sectors_of_the_image(mapper, image):
    """A file system with smaller blocks would not mount on larger ones."""
    mapped = mapper.map_volume(str(image.path), image.bundle(), cancelled=never)
    try:
        name = Path(mapped.device).name
        sectors = Path(f"/sys/block/{name}/queue/logical_block_size").read_text()
        wanted = (
            4096 if b'"sector_size":4096' in image.path.read_bytes()[:32768] else 512
        )
        assert int(sectors) == wanted
    finally:
        mapper.unmap(mapped)


def test_the_device_cannot_be_written(mapper, small):
    mapped = mapper.map_volume(str(small.path), small.bundle(), cancelled=never)
    try:
        with (
            pytest.raises(PermissionError),
            Path(mapped.device).open("r+b", buffering=0) as device,
        ):
            device.write(bytes(4096))
        assert read_device(mapped) == small.data
    finally:
        mapper.unmap(mapped)


def test_sectors_that_do_not_fill_a_block_are_there(mapper, tmp_path):
    data = os.urandom(4096 * 5 + 512 * 3)
    made = foreign(data, tmp_path / "x", sector_bytes=512)
    mapped = mapper.map_volume(str(made.path), made.bundle(), cancelled=never)
    try:
        assert read_device(mapped) == data
    finally:
        mapper.unmap(mapped)


def test_a_payload_of_less_than_a_block_opens(mapper, tmp_path):
    data = os.urandom(1024)
    made = foreign(data, tmp_path / "x", sector_bytes=512)
    mapped = mapper.map_volume(str(made.path), made.bundle(), cancelled=never)
    try:
        assert read_device(mapped) == data
    finally:
        mapper.unmap(mapped)


def test_argon2id_opens(mapper, tmp_path):
    data = os.urandom(4096)
    made = foreign(data, tmp_path / "x", kdf=luks2_genuine.ARGON2ID)
    mapped = mapper.map_volume(str(made.path), made.bundle(), cancelled=never)
    try:
        assert read_device(mapped) == data
    finally:
        mapper.unmap(mapped)


def test_argon2id_is_refused_where_memory_is_short(mapper, tmp_path, monkeypatch):
    made = foreign(bytes(4096), tmp_path / "x", kdf=luks2_genuine.ARGON2ID)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 65536)
    with pytest.raises(HostError, match="Cannot allocate memory") as caught:
        mapper.map_volume(str(made.path), made.bundle(), cancelled=never)
    assert "57344 can be had" in caught.value.hint


@pytest.mark.parametrize(
    "passphrase",
    [luks2_genuine.PASSPHRASE[:-1], luks2_genuine.PASSPHRASE + b"\n", bytes(512)],
)
def test_a_wrong_passphrase_opens_nothing(mapper, small, passphrase):
    with pytest.raises(WrongPassphraseError, match=f"{small.path}: the passphrase"):
        mapper.map_volume(str(small.path), small.bundle(passphrase), cancelled=never)


def test_a_pinned_header_opens(mapper, small):
    mapped = mapper.map_volume(str(small.path), small.pinned(), cancelled=never)
    mapper.unmap(mapped)


@pytest.mark.parametrize(
    "offset", [32768, 300000, luks2_genuine.PAYLOAD_OFFSET_BYTES - 1]
)
def test_a_pinned_header_may_not_change_by_a_byte(mapper, small, offset):
    bundle = small.pinned()
    with small.path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(IntegrityError, match="not the one that belongs to contract"):
        mapper.map_volume(str(small.path), bundle, cancelled=never)


def test_a_block_device_opens(mapper, small):
    with small.path.open("rb") as file:
        device, fd = loop.attach(file.fileno(), name="contract-block-device")
    try:
        mapped = mapper.map_volume(device, small.bundle(), cancelled=never)
        assert read_device(mapped) == small.data
        mapper.unmap(mapped)
    finally:
        os.close(fd)


def test_a_missing_image_says_so(mapper, small, tmp_path):
    with pytest.raises(MissingError, match=r"nowhere\.img: no such file"):
        mapper.map_volume(
            str(tmp_path / "nowhere.img"), small.bundle(), cancelled=never
        )


def test_what_is_no_file_is_refused(mapper, small, tmp_path):
    (tmp_path / "link").symlink_to(small.path)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "link", tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadHeaderError, match=f"{path}: is "):
            mapper.map_volume(str(path), small.bundle(), cancelled=never)


def test_cancelling_before_the_passphrase_is_tried_leaves_nothing(mapper, small):
    with pytest.raises(HostError) as caught:
        mapper.map_volume(str(small.path), small.bundle(b"x"), cancelled=lambda: True)
    assert caught.value.errno == errno.ECANCELED


def test_cancelling_after_the_passphrase_leaves_nothing(mapper, small):
    calls = iter([False])
    with pytest.raises(HostError) as caught:
        mapper.map_volume(
            str(small.path), small.bundle(), cancelled=lambda: next(calls, True)
        )
    assert caught.value.errno == errno.ECANCELED


def test_a_foreign_image_does_not_open_as_a_sealed_one(mapper, small, tmp_path):
    made = reference_image.seal(bytes(8192), tmp_path / "s", volume_id="contract")
    with pytest.raises(IntegrityError, match="does not open with the key"):
        mapper.map_volume(str(small.path), made.bundle, cancelled=never)
    with pytest.raises(BadHeaderError):
        mapper.map_volume(str(made.path), small.bundle(), cancelled=never)


def test_a_sealed_image_is_never_writable(mapper, tmp_path):
    made = reference_image.seal(bytes(4096), tmp_path / "s", volume_id="contract")
    with pytest.raises(HostError, match="Read-only file system"):
        mapper.map_volume(str(made.path), made.bundle, cancelled=never, writable=True)


def test_the_memory_mapper_does_not_write(small):
    with pytest.raises(HostError, match="Read-only file system") as caught:
        MAPPERS["memory"]().map_volume(
            str(small.path), small.bundle(), cancelled=never, writable=True
        )
    assert 'only mapper = "dm" can write' in caught.value.hint


def test_the_memory_limit_is_checked_before_the_passphrase(small):
    mapper = MemoryMapper(limit_bytes=4096)
    with pytest.raises(HostError, match="Cannot allocate memory") as caught:
        mapper.map_volume(str(small.path), small.bundle(b"wrong"), cancelled=never)
    assert "memory_limit_bytes is 4096" in caught.value.hint


def test_a_payload_that_memory_cannot_hold_is_refused_before_that(image, monkeypatch):
    """Its size is the host's to say, and others need memory, too."""
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: SIZE_BYTES + 1)
    with pytest.raises(HostError, match="Cannot allocate memory") as caught:
        MAPPERS["memory"]().map_volume(
            str(image.path), image.bundle(b"wrong"), cancelled=never
        )
    spare_bytes = SIZE_BYTES + 1 - SIZE_BYTES // 8
    assert (
        f"{SIZE_BYTES} bytes of memory, to be had is {spare_bytes}" in caught.value.hint
    )


# --- dm alone ---


@needs_dm
@pytest.mark.parametrize("writable", [True, False])
def test_a_file_is_for_one_writer_or_for_readers(small, writable):
    mapper = DmMapper()
    other = dataclasses.replace(
        small.bundle(),
        manifest=ForeignManifest(volume_id="contract-other", generation=1),
    )
    mapped = mapper.map_volume(
        str(small.path), small.bundle(), cancelled=never, writable=writable
    )
    try:
        with pytest.raises(BusyError, match=str(small.path)):
            mapper.map_volume(
                str(small.path), other, cancelled=never, writable=not writable
            )
    finally:
        mapper.unmap(mapped)


@needs_dm
def test_what_is_written_is_there_again(small):
    mapper = DmMapper()
    wanted = os.urandom(8192)
    mapped = mapper.map_volume(
        str(small.path), small.bundle(), cancelled=never, writable=True
    )
    try:
        assert mapped.writable
        with Path(mapped.device).open("r+b", buffering=0) as device:
            device.seek(4096)
            device.write(wanted)
            os.fsync(device.fileno())
    finally:
        mapper.unmap(mapped)
    assert wanted not in small.path.read_bytes()
    mapped = mapper.map_volume(str(small.path), small.bundle(), cancelled=never)
    try:
        expected = small.data[:4096] + wanted + small.data[12288:]
        assert read_device(mapped) == expected
    finally:
        mapper.unmap(mapped)


@needs_dm
def test_a_read_only_file_system_does_not_become_writable(small, tmp_path):
    point = tmp_path / "mount"
    point.mkdir()
    subprocess.run(["mount", "--bind", "-o", "ro", tmp_path, point], check=True)
    try:
        with pytest.raises(HostError, match="Read-only file system"):
            DmMapper().map_volume(
                str(point / small.path.name),
                small.bundle(),
                cancelled=never,
                writable=True,
            )
    finally:
        subprocess.run(["umount", point], check=True)


@needs_dm
def test_cryptsetup_opens_the_same_image_to_the_same_table(image, tmp_path):
    mapper = DmMapper()
    mapped = mapper.map_volume(str(image.path), image.bundle(), cancelled=never)
    try:
        uuid = dm_table.device_uuid(mapped.manifest, "crypt")
        ours = dm.live_table(uuid).parameters.split()
    finally:
        mapper.unmap(mapped)
    name = "contract-cryptsetup"
    command = ["cryptsetup", "open", "--readonly", "--key-file", "-", image.path, name]
    subprocess.run(command, input=luks2_genuine.PASSPHRASE, check=True)
    try:
        assert Path("/dev/mapper", name).read_bytes() == image.data
        done = subprocess.run(
            ["dmsetup", "table", name], capture_output=True, text=True, check=True
        )
        theirs = done.stdout.split()[3:]
    finally:
        subprocess.run(["cryptsetup", "close", name], check=True)
    # Cipher, tweak and options alike; key, device and offset are each one's own.
    assert (ours[0], ours[2], ours[5:]) == (theirs[0], theirs[2], theirs[5:])


@needs_dm
def test_a_foreign_volume_opens_once(small):
    mapper = DmMapper()
    mapped = mapper.map_volume(str(small.path), small.bundle(), cancelled=never)
    try:
        with pytest.raises(BusyError, match="exists"):
            mapper.map_volume(str(small.path), small.bundle(), cancelled=never)
    finally:
        mapper.unmap(mapped)
    assert not mapper.intact(mapped)
