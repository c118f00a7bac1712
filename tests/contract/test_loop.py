"""Loop devices on the real kernel."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tdxd.host import loop

pytestmark = pytest.mark.root

AT_ONCE = 24


def test_many_find_a_device_at_the_same_moment(tmp_path: Path) -> None:
    """The kernel tells all of them of the same free one."""
    (tmp_path / "file").write_bytes(bytes(65536))
    start = threading.Barrier(AT_ONCE)
    made: list[loop.LoopDevice] = []

    def attach() -> None:
        start.wait()
        made.append(loop.attach(file.fileno(), name="contract-many"))

    with (tmp_path / "file").open("rb") as file:
        threads = [threading.Thread(target=attach) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for _path, fd in made:
        os.close(fd)
    assert len({path for path, _fd in made}) == AT_ONCE


@pytest.mark.parametrize("block_bytes", [512, 4096])
def test_what_is_written_to_a_writable_one_is_in_the_file(
    tmp_path: Path, block_bytes: int
) -> None:
    file, wanted = tmp_path / "file", os.urandom(block_bytes)
    file.write_bytes(bytes(65536))
    with file.open("r+b") as backing:
        path, fd = loop.attach(
            backing.fileno(),
            name="contract-writable",
            offset_bytes=8192,
            block_bytes=block_bytes,
            writable=True,
        )
    try:
        with Path(path).open("r+b", buffering=0) as device:
            device.seek(block_bytes)
            device.write(wanted)
            os.fsync(device.fileno())
    finally:
        os.close(fd)
    assert file.read_bytes()[8192 + block_bytes :][:block_bytes] == wanted
