"""Mounts of mapped volumes on the real kernel."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.errors import BusyError, HostError
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import MappedVolume
from tdxd.host.workers import never
from tests import reference_image

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
