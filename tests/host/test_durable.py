"""A file that is replaced whole, or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tdxd.errors import HostError
from tdxd.host.durable import replace_file


def test_it_is_made_with_its_directory_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    replace_file(str(path), b"one")
    replace_file(str(path), b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["file"]


def test_a_failure_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(HostError, match="file"):
        replace_file(str(tmp_path / "file"), b"data")
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Nobody but root can write there; but a link left by mistake must not lead elsewhere."""
    (tmp_path / "victim").write_bytes(b"safe")
    (tmp_path / "file.new").symlink_to("victim")
    with pytest.raises(HostError):
        replace_file(str(tmp_path / "file"), b"data")
    assert (tmp_path / "victim").read_bytes() == b"safe"
