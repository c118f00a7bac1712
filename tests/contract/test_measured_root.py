"""A configuration on a dm-verity root: what the real kernel says of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.host import dm
from tdxd.host.dm_map import DmMapper
from tdxd.host.measured_root import lie_on_measured_root
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import Mapper
from tdxd.host.workers import never
from tests import reference_image

pytestmark = pytest.mark.root


class Root:
    """A mounted file system with a configuration, and a command line that names its hash."""

    def __init__(self, directory: Path, mapper: Mapper) -> None:
        source = directory / "source"
        (source / "etc").mkdir(parents=True)
        (source / "etc/tdxd.toml").write_text("")
        data = reference_image.file_system(source, directory / "fs")
        image = reference_image.seal(data, directory / "m.img", volume_id="root")
        self.mapped = mapper.map_volume(str(image.path), image.bundle, cancelled=never)
        self.point = directory / "run/root"
        KernelMounts().mount_volume(self.mapped, str(self.point))
        self.command_line = directory / "cmdline"
        self.says(image.bundle.manifest.root_hash.hex())

    def says(self, root_hash: str) -> None:
        self.command_line.write_text(f"ro roothash={root_hash} quiet\n")

    def is_measured(self, *more: Path) -> bool:
        paths = [self.point / "etc/tdxd.toml", *more]
        return lie_on_measured_root(
            map(str, paths), root=str(self.point), command_line=str(self.command_line)
        )


def made(directory: Path, mapper: Mapper) -> Iterator[Root]:
    root = Root(directory, mapper)
    try:
        yield root
    finally:
        KernelMounts().unmount(str(root.point))
        mapper.unmap(root.mapped)


@pytest.fixture
def verity(tmp_path: Path) -> Iterator[Root]:
    if not dm.available():
        pytest.skip("this kernel has no device mapper: runs in the guest")
    yield from made(tmp_path, DmMapper())


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Root]:
    yield from made(tmp_path, MemoryMapper(limit_bytes=2**30, workers=1))


def test_it_is_measured_by_the_hash_of_the_command_line(verity: Root) -> None:
    assert verity.is_measured()


def test_another_hash_measures_nothing(verity: Root) -> None:
    verity.says("ab" * 32)
    assert not verity.is_measured()


def test_each_file_must_lie_there(verity: Root, tmp_path: Path) -> None:
    elsewhere = tmp_path / "ca.pem"
    elsewhere.write_text("")
    assert not verity.is_measured(elsewhere)
    assert not verity.is_measured(tmp_path / "missing")


def test_a_root_without_verity_is_not_measured_whatever_is_said(plain: Root) -> None:
    assert not plain.is_measured()
