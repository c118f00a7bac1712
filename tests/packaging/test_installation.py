"""Installing, upgrading, removing and purging with dpkg, in a throw-away copy of this system.

It has no running systemd, as a root file system that is being built has none.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packaging.unpacked import ROOT, build

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("systemd-sysusers"), reason="systemd is not installed"
    ),
]

HOLD = """
set -e
mount -t tmpfs none "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
mount -t tmpfs none "$1/root/run"
mount --rbind /proc "$1/root/proc"
mount --rbind /dev "$1/root/dev"
mount --bind "$2" "$1/root/mnt"
echo ready
exec sleep 600
"""


@dataclasses.dataclass(frozen=True)
class System:
    """A copy of this system in memory, in a mount namespace that a process holds."""

    holder: int
    root: str
    debs: Path

    def run(self, *argv: str) -> str:
        """Run a command in it; return its output, errors included."""
        enter = ["nsenter", f"--mount=/proc/{self.holder}/ns/mnt", "chroot", self.root]
        done = subprocess.run(
            [*enter, *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}"
        return done.stdout

    def dpkg(self, *argv: str) -> str:
        # Whether apt finds what is depended on shows where guests are built; this machine need
        # not have all of it.
        return self.run("dpkg", "--force-depends", "--force-unsafe-io", *argv)

    def exists(self, path: str) -> bool:
        """Say whether there is such a path, be it a link that leads nowhere."""
        return "yes" in self.run(
            "sh", "-c", f"[ ! -e {path} -a ! -L {path} ] || echo yes"
        )


@pytest.fixture
def system(tmp_path) -> Iterator[System]:
    directory, debs = tmp_path / "system", tmp_path / "debs"
    directory.mkdir()
    debs.mkdir()
    argv = ["unshare", "--mount", "sh", "-c", HOLD, "sh", str(directory), str(debs)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == b"ready\n"
            yield System(holder.pid, str(directory / "root"), debs)
        finally:
            holder.kill()


def take(system: System, name: str, *options: str) -> str:
    """Build a package; return its path as the system sees it."""
    deb = build(ROOT, system.debs, name, *options)
    return f"/mnt/{deb.name}"


WANTED = "/etc/systemd/system/multi-user.target.wants/tdxd.service"


def test_the_guest_package_is_installed_upgraded_removed_and_purged(system) -> None:
    said = system.dpkg("-i", take(system, "tdxd"))
    assert "tdxctl" not in said  # no daemon to talk to
    assert "install ok installed" in system.run("dpkg", "-s", "tdxd")
    assert system.run("readlink", WANTED).strip().endswith("/tdxd.service")
    assert system.exists("/etc/systemd/system/sockets.target.wants/tdxd.socket")
    check = "boot-complete.target.requires/tdxd-boot-check.service"
    assert system.exists(f"/etc/systemd/system/{check}")
    assert "tdxd:" in system.run("cat", "/etc/group")
    for user in ("tdxd-serve", "tdxd-front"):
        assert f"{user}:" in system.run("cat", "/etc/passwd")
    assert system.run("stat", "-c", "%U %a", "/etc/tdxd").split() == ["root", "755"]
    assert system.run("tdxd", "--version") == "tdxd 0.1.0\n"

    system.run("sh", "-c", "echo '# mine' >/etc/tdxd/tdxd.toml; mkdir -p /var/lib/tdxd")
    system.run("systemctl", "disable", "tdxd.service")
    system.dpkg("-i", take(system, "tdxd", "--version", "9.9"))
    assert system.run("tdxd", "--version") == "tdxd 9.9\n"
    assert not system.exists(WANTED), "an upgrade must not enable what was disabled"

    system.dpkg("-r", "tdxd")
    assert not system.exists("/usr/bin/tdxd")
    assert not system.exists("/usr/lib/tdxd")
    assert system.exists("/var/lib/tdxd")
    system.dpkg("-P", "tdxd")
    assert not system.exists("/var/lib/tdxd")
    assert not system.exists("/etc/systemd/system/sockets.target.wants/tdxd.socket")
    assert system.run("cat", "/etc/tdxd/tdxd.toml") == "# mine\n"


def test_the_owner_package_enables_nothing_and_keeps_the_store(system) -> None:
    system.dpkg("-i", take(system, "tdxd-owner"))
    wanted = "/etc/systemd/system/multi-user.target.wants/tdx-keyd.service"
    assert not system.exists(wanted)
    assert "tdx-keyd:" in system.run("cat", "/etc/passwd")
    system.run("systemctl", "enable", "tdx-keyd.service")
    system.run("tdx-keyd", "init", "/var/lib/tdx-keyd", "--name", "keys.example.com")
    system.dpkg("-i", take(system, "tdxd-owner", "--version", "9.9"))
    assert system.exists(wanted), "an upgrade must not disable what was enabled"
    system.dpkg("-P", "tdxd-owner")
    assert not system.exists(wanted)
    assert system.exists("/var/lib/tdx-keyd/keyd.toml")
