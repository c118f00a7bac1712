"""Opening what the host put at an image's path, for reading or writing."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tdxd.errors import BadHeaderError, HostError, MissingError
from tdxd.host import image_file

pytestmark = pytest.mark.parametrize("writable", [False, True])


def opened(path: Path, *, writable: bool) -> None:
    with image_file.open_file(str(path), writable=writable):
        pass


def test_a_file_is_read_in_pieces_each_once(tmp_path, writable):
    (tmp_path / "file").write_bytes(b"0123456789")
    path = str(tmp_path / "file")
    with image_file.open_file(path, writable=writable) as fd:
        assert image_file.size_bytes(path, fd) == 10
        assert image_file.read_range(path, fd, 0, 4) == b"0123"
        assert image_file.read_range(path, fd, 4, 100) == b"456789"
        assert image_file.read_range(path, fd, 10, 4) == b""
        assert os.get_inheritable(fd) is False


def test_what_is_no_file_is_refused(tmp_path, writable):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(tmp_path / "socket"))
        for name in ("link", "dangling", "fifo", "directory", "socket"):
            with pytest.raises(BadHeaderError, match=f"{name}: is "):
                opened(tmp_path / name, writable=writable)
        with pytest.raises(BadHeaderError, match="/dev/null: is no regular file"):
            opened(Path("/dev/null"), writable=writable)


def test_a_terminal_does_not_become_ours(writable):
    """Else whoever is at its other end could interrupt the daemon."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv[1])\n"
        "from tdxd.host import image_file\n"
        "try:\n"
        "    image_file.open_file(sys.argv[2], writable=sys.argv[3] == 'True').__enter__()\n"
        "except image_file.BadHeaderError:\n"
        "    os.open('/dev/tty', os.O_RDONLY)\n"
    )
    ours, theirs = os.openpty()
    try:
        name, root = os.ttyname(theirs), str(Path(__file__).parents[2])
        argv = [sys.executable, "-I", "-c", program, root, name, str(writable)]
        done = subprocess.run(
            argv, start_new_session=True, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert "No such device or address: '/dev/tty'" in done.stderr


def test_a_missing_file_is_waited_for(tmp_path, writable):
    with pytest.raises(MissingError, match="nothing: no such file"):
        opened(tmp_path / "nothing", writable=writable)


def test_another_trouble_names_the_file(tmp_path, writable):
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=f"open {tmp_path}/file/x: Not a") as caught:
        opened(tmp_path / "file/x", writable=writable)
    assert caught.value.errno == errno.ENOTDIR
    assert ("drop-in for tdxd.service" in caught.value.hint) is writable
    assert ("where the image is a disk" in caught.value.hint) is writable
