"""Mounts of mapped volumes on the real kernel."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.errors import BusyError, HostError
from tdxd.host.dm_map import DmMapper
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import MappedVolume, Mapper
from tdxd.host.workers import never
from tests import luks2_genuine, reference_image
from tests.contract.test_mapper import MAPPERS, needs_dm
from tests.foreign_image import Foreign, foreign

pytestmark = pytest.mark.root


@pytest.fixture
def mapped(tmp_path) -> Iterator[MappedVolume]:
    source = tmp_path / "source"
    (source / "models").mkdir(parents=True)
    (source / "models/file").write_bytes(b"content")
    (source / "models/run").write_bytes(b"#!/bin/sh\n")
    (source / "models/run").chmod(0o755)
    (source / "models/link").symlink_to("file")
    data = reference_image.file_system(source, tmp_path / "fs")
    image = reference_image.seal(data, tmp_path / "m.img", volume_id="contract")
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)
    volume = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
    yield volume
    mapper.unmap(volume)


@pytest.fixture
def target(mapped, tmp_path) -> Iterator[Path]:
    """Mount the volume for one test."""
    point, mounts = tmp_path / "run/volumes/m", KernelMounts()
    mounts.mount_volume(mapped, str(point))
    yield point
    mounts.unmount(str(point))
    assert not point.exists()


def test_the_content_is_there_read_only(target):
    assert (target / "models/file").read_bytes() == b"content"
    with pytest.raises(OSError) as caught:
        (target / "models/new").write_bytes(b"")
    assert caught.value.errno == errno.EROFS


def test_programs_do_not_run(target):
    with pytest.raises(PermissionError):
        subprocess.run([target / "models/run"], check=True)


def test_links_are_not_followed(target):
    assert stat.S_ISLNK((target / "models/link").lstat().st_mode)
    with pytest.raises(OSError) as caught:
        (target / "models/link").read_bytes()
    assert caught.value.errno == errno.ELOOP


def test_the_flags_stand_in_mountinfo(target):
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (flags,) = [line.split()[5] for line in lines if line.split()[4] == str(target)]
    assert {"ro", "nosuid", "nodev", "noexec", "nosymfollow"} <= set(flags.split(","))


def test_a_mount_is_found_under_its_directory(target):
    mounts = KernelMounts()
    assert mounts.under(str(target.parent)) == (str(target),)
    assert mounts.under(str(target)) == ()


def test_a_busy_mount_is_kept(target):
    with (target / "models/file").open("rb"):
        with pytest.raises(BusyError, match=f"{target}"):
            KernelMounts().unmount(str(target))
        assert (target / "models/file").exists()


def test_what_is_no_file_system_is_refused_and_leaves_no_directory(tmp_path):
    made = reference_image.seal(bytes(8192), tmp_path / "x", volume_id="contract")
    mapper = MemoryMapper(limit_bytes=2**30, workers=1)
    volume = mapper.map_volume(str(made.path), made.bundle, cancelled=never)
    try:
        with pytest.raises(HostError) as caught:
            KernelMounts().mount_volume(volume, str(tmp_path / "point"))
        assert caught.value.errno == errno.EINVAL
        assert not (tmp_path / "point").exists()
    finally:
        mapper.unmap(volume)


def test_a_directory_that_cannot_be_made_is_named(mapped, tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", tmp_path / "file/point"):
        with pytest.raises(HostError, match=f"make {target}: "):
            KernelMounts().mount_volume(mapped, str(target))


# --- foreign volumes ---


DIRTY = "feature needs_recovery"
"""What ext4 says of itself while it is mounted: its journal must be replayed."""


def super_options(target: Path) -> tuple[set[str], set[str]]:
    """The options of a mount, and those of its file system."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    (words,) = [line.split() for line in lines if line.split()[4] == str(target)]
    return set(words[5].split(",")), set(words[-1].split(","))


@contextlib.contextmanager
def mounted(mapper: Mapper, made: Foreign, target: Path, **how: bool) -> Iterator[None]:
    mounts = KernelMounts()
    volume = mapper.map_volume(
        str(made.path),
        made.bundle(),
        cancelled=never,
        writable=how.get("writable", False),
    )
    try:
        mounts.mount_volume(volume, str(target))
        try:
            yield
        finally:
            mounts.unmount(str(target))
    finally:
        mapper.unmap(volume)


@pytest.fixture(params=["memory", pytest.param("dm", marks=needs_dm)])
def mapper(request) -> Mapper:
    return MAPPERS[request.param]()


@pytest.mark.parametrize("sector_bytes", [512, 4096])
def test_a_foreign_volume_is_mounted_read_only(mapper, tmp_path, sector_bytes):
    data = luks2_genuine.ext4()
    made = foreign(data, tmp_path / "f.img", sector_bytes=sector_bytes)
    before = made.path.read_bytes()
    with mounted(mapper, made, tmp_path / "point"):
        flags, options = super_options(tmp_path / "point")
        assert {"ro", "nosuid", "nodev", "noexec", "nosymfollow"} <= flags
        assert {"ro", "norecovery"} <= options
        content = (tmp_path / "point/model").read_bytes()
        assert content.startswith(luks2_genuine.OWNER_PLAINTEXT)
    assert made.path.read_bytes() == before


def test_small_blocks_mount_where_the_sectors_are_small(mapper, tmp_path):
    with (tmp_path / "fs").open("wb") as file:
        file.truncate(2**20)
    subprocess.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", tmp_path / "fs"], check=True
    )
    data = (tmp_path / "fs").read_bytes()
    made = foreign(data, tmp_path / "f.img", sector_bytes=512)
    with mounted(mapper, made, tmp_path / "point"):
        assert (tmp_path / "point/lost+found").is_dir()


def test_a_journal_is_not_replayed(mapper, tmp_path):
    """Else the mount would fail: the device cannot be written."""
    (tmp_path / "fs").write_bytes(luks2_genuine.ext4())
    command = ["debugfs", "-w", "-R", DIRTY, tmp_path / "fs"]
    subprocess.run(command, check=True, capture_output=True)
    made = foreign((tmp_path / "fs").read_bytes(), tmp_path / "f.img")
    with mounted(mapper, made, tmp_path / "point"):
        assert (tmp_path / "point/model").is_file()


def test_a_damaged_file_system_does_not_stop_the_machine(mapper, tmp_path):
    """Its superblock may ask for a panic, and any flipped bit would do."""
    (tmp_path / "fs").write_bytes(luks2_genuine.ext4())
    command = ["tune2fs", "-e", "panic", tmp_path / "fs"]
    subprocess.run(command, check=True, capture_output=True)
    made = foreign((tmp_path / "fs").read_bytes(), tmp_path / "f.img")
    with mounted(mapper, made, tmp_path / "point"):
        _, options = super_options(tmp_path / "point")
        assert "errors=remount-ro" in options


def test_a_file_system_of_noise_is_refused(mapper, tmp_path):
    made = foreign(bytes(65536), tmp_path / "f.img")
    with pytest.raises(HostError), mounted(mapper, made, tmp_path / "point"):
        pass
    assert not (tmp_path / "point").exists()


@needs_dm
def test_a_writable_volume_keeps_what_is_written(tmp_path):
    made = foreign(luks2_genuine.ext4(), tmp_path / "f.img")
    with mounted(DmMapper(), made, tmp_path / "point", writable=True):
        flags, options = super_options(tmp_path / "point")
        assert {"rw", "nosuid", "nodev", "noexec", "nosymfollow"} <= flags
        assert "rw" in options
        assert "norecovery" not in options
        (tmp_path / "point/note").write_bytes(b"written in the guest")
    with mounted(DmMapper(), made, tmp_path / "point"):
        assert (tmp_path / "point/note").read_bytes() == b"written in the guest"
    assert b"written in the guest" not in made.path.read_bytes()


def test_unmounting_nothing_is_harmless(tmp_path):
    KernelMounts().unmount(str(tmp_path / "nothing"))


def test_names_with_spaces_and_newlines_are_found(mapped, tmp_path):
    mounts, point = KernelMounts(), str(tmp_path / "a b/c\nd\\e")
    mounts.mount_volume(mapped, point)
    try:
        assert mounts.under(str(tmp_path)) == (point,)
    finally:
        mounts.unmount(point)


def test_an_isolated_process_mounts_for_itself_alone(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tdxd.host import mount\n"
        "mount.isolate(); mount.mount_tmpfs(sys.argv[2], size_bytes=4096)\n"
        "print(mount.mount_points().count(sys.argv[2]))\n"
    )
    root = Path(__file__).parents[2]
    argv = [sys.executable, "-I", "-c", program, str(root), str(tmp_path)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    assert done.stdout == "1\n"
    assert not os.path.ismount(tmp_path)
