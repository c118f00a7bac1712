"""The memory of a process with all that it started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tdxd.host.tree_memory import tree_memory_bytes

MIB = 2**20
PARENT = """
import subprocess, sys
held = b"x" * (40 << 20)
if len(sys.argv) > 1:
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=sys.stdin)
    child.wait()
else:
    print("there", flush=True)
    sys.stdin.read()
"""


def test_children_count() -> None:
    """Two processes with 40 MiB each, and little that both have."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        taken = tree_memory_bytes(process.pid)
        process.stdin.close()
    assert 80 * MIB < taken < 140 * MIB
    assert tree_memory_bytes(process.pid) == 0


def test_without_the_right_to_look_closely_residents_count(tmp_path: Path) -> None:
    for pid, parent in ((7, 1), (8, 7), (9, 8), (10, 1)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) b) S {parent} 0 0")
        (tmp_path / str(pid) / "statm").write_text("100 3 2 1 0 1 0")
    (tmp_path / "9" / "smaps_rollup").write_text("x\nRss: 9 kB\nPss:   5 kB\n")
    assert tree_memory_bytes(7, str(tmp_path)) == 2 * 3 * 4096 + 5 * 1024
