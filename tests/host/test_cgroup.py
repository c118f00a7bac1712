"""Control groups: on the kernel where a group is delegated to us, else on files like its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tdxd.errors import HostError
from tdxd.host.cgroup import ControlGroups, Limits

LIMITS = Limits(memory_bytes=512 * 2**20, cpus=1.5)
ROOT = Path("/sys/fs/cgroup")


def delegated(root: Path, controllers: str = "cpu memory pids") -> Path:
    """Make files as the kernel has them in a group and two below; it makes those itself."""
    base = root / "system.slice" / "tdxd.service"
    for group in (base, base / "daemon", base / "model-server-a"):
        group.mkdir(parents=True)
        for name in ("cgroup.procs", "cgroup.subtree_control", *LIMITS.files()):
            (group / name).touch()
    (base / "cgroup.controllers").write_text(controllers + "\n")
    (base / "cgroup.procs").write_text("1234\n")
    return base


def test_a_child_is_put_into_a_group_with_its_limits(tmp_path: Path) -> None:
    base = delegated(tmp_path)
    groups = ControlGroups(str(tmp_path), "/system.slice/tdxd.service")
    assert groups.problem == ""
    assert (base / "daemon" / "cgroup.procs").read_text() == "1234"
    assert (base / "cgroup.subtree_control").read_text() == "+memory +cpu +pids"
    groups.confine("model-server-a", 77, LIMITS)
    group = base / "model-server-a"
    assert (group / "memory.max").read_text() == str(512 * 2**20)
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "cpu.max").read_text() == "150000 100000"
    assert (group / "cgroup.procs").read_text() == "77"


def test_why_there_are_no_limits_is_said(tmp_path: Path) -> None:
    delegated(tmp_path, controllers="pids")
    own = "/system.slice/tdxd.service"
    assert "has no memory, cpu" in ControlGroups(str(tmp_path), own).problem
    assert "No such file" in ControlGroups(str(tmp_path), "/other").problem
    assert "root control group" in ControlGroups(str(tmp_path), "/").problem


def test_a_limit_that_cannot_be_set_is_an_error(tmp_path: Path) -> None:
    delegated(tmp_path)
    groups = ControlGroups(str(tmp_path), "/system.slice/tdxd.service")
    with pytest.raises(HostError, match="model-server-b"):
        groups.confine("model-server-b", 77, LIMITS)


@pytest.mark.root
def test_the_kernel_enforces_them() -> None:
    there = ROOT / "cgroup.controllers"
    if not there.exists() or "memory" not in there.read_text().split():
        pytest.skip("no unified control groups with memory here")
    switch = ROOT / "cgroup.subtree_control"
    missing = {"cpu", "memory", "pids"} - set(switch.read_text().split())
    base = ROOT / f"tdxd-test-{os.getpid()}"
    base.mkdir()
    try:
        # As systemd does for a unit with Delegate=.
        switch.write_text(" ".join(f"+{one}" for one in missing))
        groups = ControlGroups(own=f"/{base.name}")
        assert groups.problem == ""
        child = subprocess.Popen(
            ["/usr/bin/python3", "-c", "input(); bytearray(600 << 20)"],
            stdin=subprocess.PIPE,
        )
        groups.confine("child", child.pid, LIMITS)
        child.communicate(b"\n", timeout=60)
        assert child.returncode == -9
    finally:
        for group in (base / "child", base / "daemon", base):
            if group.exists():
                group.rmdir()
        switch.write_text(" ".join(f"-{one}" for one in missing))
