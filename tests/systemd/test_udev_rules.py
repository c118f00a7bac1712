"""With Debian's own rules and ours, udev looks into no loop device of the daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tdxd.host import loop
from tests.systemd.units import SYSTEMD

RULES = Path("/usr/lib/udev/rules.d")
# What `udevadm test` finds it also writes: links below /dev, a database below /run.
TEST = """\
set -e
mount -t tmpfs tmpfs /run
mkdir /run/dev
cp -a "$2" /dev/null /run/dev
mount --bind "$1" /usr/lib/udev/rules.d
mount --bind /run/dev /dev
exec udevadm test --action=change "/sys/block/${2##*/}"
"""

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        shutil.which("udevadm") is None
        or not (RULES / "60-persistent-storage.rules").exists(),
        reason="udev is not installed",
    ),
]


@pytest.fixture
def rules(tmp_path):
    """Return a directory with the rules of this system and ours."""
    directory = tmp_path / "rules.d"
    shutil.copytree(RULES, directory)
    for path in (SYSTEMD / "udev").iterdir():
        shutil.copy(path, directory)
    return directory


@pytest.fixture
def image(tmp_path):
    """Return a file system with a label, as a hostile image could be one."""
    (tmp_path / "content").mkdir()
    path = tmp_path / "image"
    argv = ["mkfs.erofs", "--quiet", path, tmp_path / "content"]
    subprocess.run(argv, check=True, timeout=60)
    size = -(-path.stat().st_size // 4096) * 4096
    os.truncate(path, size)
    return path


def properties(rules: Path, device: str) -> dict[str, str]:
    """Return what udev knows of a device after an event of it."""
    argv = ["unshare", "--mount", "--propagation=private"]
    argv += ["sh", "-c", TEST, "sh", str(rules), device]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "56-tdxd.rules:" not in done.stderr, done.stderr  # where it has a fault
    pairs = [line.partition("=") for line in done.stdout.splitlines() if "=" in line]
    return {key: value for key, _, value in pairs}


def test_udev_does_not_look_into_ours(rules, image):
    fd = os.open(image, os.O_RDONLY)
    path, device = loop.attach(fd, name="tdxd:contract:1")
    os.close(fd)
    try:
        seen = properties(rules, path)
    finally:
        os.close(device)
    assert seen["DEVNAME"] == path
    assert [name for name in seen if name.startswith("ID_")] == []
    assert "DEVLINKS" not in seen
    assert (seen["SYSTEMD_READY"], seen["UDISKS_IGNORE"]) == ("0", "1")


def test_udev_looks_into_others(rules, image):
    """The image is one that it would recognise."""
    argv = ["losetup", "--find", "--show", "--read-only", str(image)]
    path = subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
    try:
        seen = properties(rules, path)
    finally:
        subprocess.run(["losetup", "--detach", path], check=True, timeout=60)
    assert seen["ID_FS_TYPE"] == "erofs"
    assert "/dev/disk/by-uuid/" in seen["DEVLINKS"]
