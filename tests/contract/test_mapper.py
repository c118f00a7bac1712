"""The contract of every mapper: the right bytes or an error, and nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.errors import BusyError, HostError, IntegrityError, MissingError
from tdxd.host import dm, loop
from tdxd.host.dm_map import DmMapper
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import MappedVolume, Mapper
from tdxd.host.workers import never
from tests import reference_image
from tests.leftovers import loops_and_mappings, nothing_left

pytestmark = pytest.mark.root

# Every mapper is made by one of these; another one is added here and nowhere else.
MAPPERS: dict[str, Callable[[], Mapper]] = {
    "memory": lambda: MemoryMapper(limit_bytes=2**30, workers=2),
    "dm": DmMapper,
}
ID = "contract"
needs_dm = pytest.mark.skipif(
    not dm.available(), reason="this kernel has no device mapper: runs in the guest"
)


@pytest.fixture(params=["memory", pytest.param("dm", marks=needs_dm)])
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
    with nothing_left(str(tmp_path)):
        yield


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


def test_a_mounted_device_outlives_unmap(mapper, image, tmp_path):
    """Unmapping in the wrong order is refused, or takes effect with the last user."""
    mounts, target = KernelMounts(), str(tmp_path / "mnt")
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    try:
        mounts.mount_volume(mapped, target)
    finally:
        with contextlib.suppress(BusyError):
            mapper.unmap(mapped)
    try:
        assert (tmp_path / "mnt/models/small").read_bytes() == b"small"
    finally:
        mounts.unmount(target)
        mapper.unmap(mapped)


def test_unmap_twice_is_harmless(mapper, image):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    mapper.unmap(mapped)
    mapper.unmap(mapped)


def test_unmap_leaves_a_reused_descriptor_alone(image):
    mapper = MAPPERS["memory"]()  # the one that holds a descriptor
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


def test_a_replaced_file_never_shows_other_bytes(mapper, image, content):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    try:
        with image.path.open("r+b") as file:
            file.write(bytes(image.path.stat().st_size))
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # EIO is right; other bytes never are
            assert read_device(mapped) == content
    finally:
        mapper.unmap(mapped)


def test_another_generation_is_refused_before_there_is_a_device(mapper, image):
    manifest = dataclasses.replace(image.bundle.manifest, generation=2)
    bundle = KeyBundle(manifest=manifest, secret=image.fresh_secret())
    with pytest.raises(IntegrityError, match="does not open with the key of contract"):
        mapper.map_volume(str(image.path), bundle, cancelled=never)


def test_a_check_tells_the_image_of_a_key_and_opens_nothing(mapper, image, tmp_path):
    bundle = KeyBundle(manifest=image.bundle.manifest, secret=image.fresh_secret())
    mapper.check(str(image.path), bundle)
    manifest = dataclasses.replace(image.bundle.manifest, generation=2)
    other = KeyBundle(manifest=manifest, secret=image.fresh_secret())
    with pytest.raises(IntegrityError, match="does not open with the key of contract"):
        mapper.check(str(image.path), other)
    assert not loops_and_mappings(str(tmp_path))


MAP_AND_WAIT = """
import sys, time
from pathlib import Path
from tdxd.core.bundle import KeyBundle
from tdxd.host.workers import never
from tests.contract.test_mapper import MAPPERS
mapper, image, bundle = sys.argv[1:]
held = MAPPERS[mapper]().map_volume(
    image, KeyBundle.parse(Path(bundle).read_bytes()), cancelled=never
)
print(held.device, flush=True)
time.sleep(60)
"""


def test_a_killed_daemon_leaves_nothing_after_a_sweep(mapper, image, tmp_path):
    (tmp_path / "bundle").write_bytes(image.bundle.encode())
    argv = [sys.executable, "-c", MAP_AND_WAIT, mapper.name, image.path]
    child = subprocess.Popen(
        [*argv, tmp_path / "bundle"],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with child:
        assert child.stdout is not None
        device = child.stdout.readline().decode().strip()
        child.kill()
    assert Path(device).is_block_device()
    mapper.sweep()
    wait_until_gone(tmp_path)
    assert mapper.sweep() == ()


def test_a_sweep_takes_effect_with_the_last_user(mapper, image, tmp_path):
    mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    with Path(mapped.device).open("rb") as user:
        mapper.sweep()
        assert user.read(4096) == image.data[:4096]
    mapper.unmap(mapped)
    wait_until_gone(tmp_path)


def wait_until_gone(under: Path) -> None:
    deadline = time.monotonic() + 5
    while loops_and_mappings(str(under)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not loops_and_mappings(str(under))


def test_two_threads_can_map_at_once(mapper, content, tmp_path):
    images = [
        reference_image.seal(content, tmp_path / name, volume_id=f"{ID}-{name}")
        for name in ("a", "b")
    ]
    made: list[MappedVolume] = []

    def work(one: reference_image.Reference) -> None:
        made.append(mapper.map_volume(str(one.path), one.bundle, cancelled=never))

    threads = [threading.Thread(target=work, args=(one,)) for one in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({one.device for one in made}) == 2
    for one in made:
        assert read_device(one) == content
        mapper.unmap(one)


def test_the_memory_limit_is_kept(image):
    mapper = MemoryMapper(limit_bytes=2**20)
    with pytest.raises(HostError, match="Cannot allocate memory") as caught:
        mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    assert "memory_limit_bytes is 1048576" in caught.value.hint
