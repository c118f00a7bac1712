"""The hardening of a process that holds secrets, tried in processes of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tdxd.errors import HostError
from tdxd.host import machine

PROGRAM = """
import subprocess, sys
sys.path[:0] = sys.argv[1:]
from tdxd.errors import HostError
from tdxd.host import machine
machine.harden()
print(open("/proc/self/coredump_filter").read().strip())
sys.stdout.flush()
subprocess.run(["cat", "/proc/self/coredump_filter"], check=True)
"""


def test_neither_it_nor_its_children_put_memory_into_cores():
    argv = [sys.executable, "-c", PROGRAM, *sys.path]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["00000000"] * 2


@pytest.mark.parametrize(
    ("text", "areas"),
    [
        ("Filename\tType\n", ()),
        (
            "Filename Type\n/dev/vdb partition 1 0 -2\n/swap file 1 0 -3\n",
            ("/dev/vdb", "/swap"),
        ),
    ],
)
def test_swap_areas(tmp_path, text, areas):
    path = tmp_path / "swaps"
    path.write_text(text)
    assert machine.swap_areas(str(path)) == areas


def test_a_kernel_without_swap_has_no_areas(tmp_path):
    assert machine.swap_areas(str(tmp_path / "nothing")) == ()


MEMINFO = "MemTotal: 2000 kB\nMemAvailable: 1000 kB\nHugePages_Total: 0\n"


def memory_left(tmp_path, groups: dict[str, tuple[str, int, int]], own: str) -> int:
    """What is left where control groups have a limit, a use and a cache."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    (tmp_path / "proc/self/cgroup").write_text(own)
    for name, (limit, used, cached) in groups.items():
        group = tmp_path / "cgroup" / name
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return machine.available_memory_bytes(
        str(tmp_path / "proc"), str(tmp_path / "cgroup")
    )


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({}, 1024000),
        ({"a/b": ("max", 5, 0)}, 1024000),
        ({"a/b": ("500000", 400000, 0)}, 100000),
        ({"a/b": ("500000", 400000, 300000)}, 400000),
        ({"a/b": ("max", 5, 0), "a": ("60000", 50000, 0)}, 10000),
        ({"a/b": ("50000", 60000, 0)}, 0),
        ({"a/b": ("9000000", 5, 0)}, 1024000),
    ],
)
def test_memory_left_is_the_least_that_any_group_allows(tmp_path, groups, left):
    assert memory_left(tmp_path, groups, "0::/a/b\n") == left


def test_groups_of_version_1_are_not_asked(tmp_path):
    groups = {"a": ("10", 5, 0)}
    assert memory_left(tmp_path, groups, "4:memory:/a\n0::/\n") == 1024000


def test_memory_left_of_this_machine_is_something():
    assert machine.available_memory_bytes() > 2**20


def test_memory_that_cannot_be_told_is_an_error(tmp_path):
    with pytest.raises(HostError, match="meminfo: No such file"):
        machine.available_memory_bytes(str(tmp_path))
