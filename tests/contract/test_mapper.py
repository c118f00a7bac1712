"""The contract of every mapper: the right bytes or an error, and nothing left behind."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxd.errors import HostError, MissingError
from tdxd.host import loop
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import MappedVolume, Mapper
from tdxd.host.workers import never
from tests import reference_image
from tests.leftovers import held

pytestmark = pytest.mark.root

# Every mapper is made by one of these; another one is added here and nowhere else.
MAPPERS: dict[str, Callable[[], Mapper]] = {
    "memory": lambda: MemoryMapper(limit_bytes=2**30, workers=2),
}
ID = "contract"


@pytest.fixture(params=sorted(MAPPERS))
def mapper(request) -> Mapper:
    return MAPPERS[request.param]()


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    directory = tmp_path_factory.mktemp("content")
    (directory / "models").mkdir()
    (directory / "models/big").write_bytes(os.urandom(9 * 2**20 + 5))
    (directory / "models/small").write_bytes(b"small")
    return reference_image.file_system(directory, directory.with_suffix(".erofs"))


@pytest.fixture
def image(tmp_path, content) -> reference_image.Reference:
    return reference_image.seal(content, tmp_path / "m.img", volume_id=ID)


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path) -> Iterator[None]:
    before = held(str(tmp_path))
    yield
    assert held(str(tmp_path)) == before


def read_device(mapped: MappedVolume) -> bytes:
    return Path(mapped.device).read_bytes()


def test_the_device_holds_the_file_system(mapper, image):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    try:
        assert read_device(mapped) == image.data
        assert mapped.mapper == mapper.name
        assert mapped.manifest == image.bundle.manifest
        assert mapper.intact(mapped)
    finally:
        mapper.unmap(mapped)


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 1024, 1025])
def test_every_shape_of_tree_opens(mapper, tmp_path, content, blocks):
    made = reference_image.seal(content[: blocks * 4096], tmp_path / "x", volume_id=ID)
    mapped = mapper.map_volume(str(made.path), made.bundle, cancelled=never)
    try:
        assert read_device(mapped) == made.data
    finally:
        mapper.unmap(mapped)


def test_the_device_cannot_be_written(mapper, image):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    try:
        with (
            pytest.raises(PermissionError),
            Path(mapped.device).open("r+b", buffering=0) as device,
        ):
            device.write(bytes(4096))
        assert read_device(mapped) == image.data
    finally:
        mapper.unmap(mapped)


def test_it_mounts_and_the_mount_outlives_the_descriptor(mapper, image, tmp_path):
    mounts, target = KernelMounts(), str(tmp_path / "mnt")
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    try:
        mounts.mount_volume(mapped, target)
    finally:
        mapper.unmap(mapped)
    try:
        assert (tmp_path / "mnt/models/small").read_bytes() == b"small"
    finally:
        mounts.unmount(target)


def test_unmap_twice_is_harmless(mapper, image):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    mapper.unmap(mapped)
    mapper.unmap(mapped)


def test_unmap_leaves_a_reused_descriptor_alone(mapper, image):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    mapper.unmap(mapped)
    with open(os.devnull, "rb") as other:
        os.dup2(other.fileno(), mapped.fd)
    mapper.unmap(mapped)
    os.close(mapped.fd)  # fails if unmap closed it


def test_a_block_device_opens(mapper, image):
    with image.path.open("rb") as file:
        device, fd = loop.attach(file.fileno(), name="contract-block-device")
    try:
        mapped = mapper.map_volume(device, image.bundle, cancelled=never)
        mapper.unmap(mapped)
    finally:
        os.close(fd)


def test_later_bytes_are_never_read(mapper, image):
    with image.path.open("ab") as file:
        file.write(b"x" * 5000)
    mapper.unmap(mapper.map_volume(str(image.path), image.bundle, cancelled=never))


def test_a_missing_image_says_so(mapper, image, tmp_path):
    with pytest.raises(MissingError, match=r"nowhere\.img: no such file"):
        mapper.map_volume(str(tmp_path / "nowhere.img"), image.bundle, cancelled=never)


def test_cancelling_before_the_data_leaves_nothing(mapper, image):
    with pytest.raises(HostError) as caught:
        mapper.map_volume(str(image.path), image.bundle, cancelled=lambda: True)
    assert caught.value.errno == errno.ECANCELED


def test_a_replaced_file_does_not_change_what_is_mapped(mapper, image, content):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    try:
        image.path.write_bytes(bytes(image.path.stat().st_size))
        assert read_device(mapped) == content
    finally:
        mapper.unmap(mapped)


def test_sweep_finds_what_a_killed_daemon_left(mapper, image, tmp_path):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    holder = subprocess.Popen(["sleep", "60"], pass_fds=(mapped.fd,))
    mapper.unmap(mapped)
    assert mapped.device in mapper.sweep()
    holder.kill()
    holder.wait()
    deadline = time.monotonic() + 5
    while loop.attached("/memfd:tdxd:contract") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert mapped.device not in mapper.sweep()


def test_two_threads_can_map_at_once(mapper, image):
    made: list[MappedVolume] = []

    def work() -> None:
        made.append(mapper.map_volume(str(image.path), image.bundle, cancelled=never))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.device for one in made}) == 2
    for one in made:
        mapper.unmap(one)


def test_the_memory_limit_is_kept(image):
    mapper = MemoryMapper(limit_bytes=2**20)
    with pytest.raises(HostError, match="Cannot allocate memory") as caught:
        mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    assert "memory_limit_bytes is 1048576" in caught.value.hint
