"""The hardening of a process that holds secrets, tried in processes of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tdxd.host import machine

PROGRAM = """
import subprocess, sys
sys.path[:0] = sys.argv[1:]
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
