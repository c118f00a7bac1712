"""What the kernel counts of a block device."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tdxd.host import loop
from tdxd.host.block_stat import bytes_read


@pytest.mark.root
def test_what_was_read_of_a_device(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(2**20))
    with path.open("rb") as file:
        device, fd = loop.attach(file.fileno(), name="tdxd-test-stat")
    try:
        before = bytes_read(device)
        assert before is not None
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        assert len(os.pread(fd, 2**19, 0)) == 2**19
        after = bytes_read(device)
        assert after is not None
        assert 2**19 <= after - before <= 2**20
    finally:
        os.close(fd)


def test_what_is_no_device_has_no_count(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert bytes_read(str(tmp_path / "file")) is None
    assert bytes_read("/dev/null") is None
    assert bytes_read("/dev/none") is None
