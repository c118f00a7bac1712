"""Many small files, and large ones: what time and memory tdx-seal takes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench.measure import peak_memory

ROOT = Path(__file__).parents[2]
FILES = 100_000
BUDGET_BYTES = 150 * 2**20
"""Program and workers together, mkfs.erofs apart: that one grows with the number of files."""
BUDGET_S = 300
SIZE_BYTES = 2**30


def seal(cwd: Path, *argv: str) -> tuple[float, int, str]:
    """Run the program; return seconds, the peak of its memory and what it said."""
    command = [sys.executable, "-m", "tdxd.cli.tdx_seal", *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start_s = time.monotonic()
    with (
        subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE) as process,
        peak_memory(process.pid) as peak,
    ):
        said = process.communicate()[0].decode()
    assert process.returncode == 0
    spent_s = time.monotonic() - start_s
    print(f"{argv[0]}: {spent_s:.1f} s, {peak[0] / 2**20:.0f} MiB")
    return spent_s, peak[0], said


CREATE = ("create", "model", "--id", "m", "--generation", "1", "-o", "m.img")
OPEN = ("open", "m.img", "--bundle", "m.bundle")
REKEY = ("rekey", "m.img", "--bundle", "m.bundle", "-o", "n.img")


@pytest.mark.slow
def test_a_hundred_thousand_small_files(tmp_path):
    version = tmp_path / "model/models/m/1"
    for number in range(FILES):
        directory = version / f"{number % 97:02}" if number % 2 else version / "flat"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file-{number}").write_bytes(b"%d" % number * (number % 50))
    for argv in (
        (*CREATE, "--bundle", "m.bundle"),
        ("verify", "m.img", "--bundle", "m.bundle"),
        (*REKEY, "--new-bundle", "n.bundle"),
        (*OPEN, "--extract", "back"),
    ):
        spent_s, peak_bytes, _ = seal(tmp_path, *argv)
        assert spent_s < BUDGET_S
        assert peak_bytes < BUDGET_BYTES
    differ = ["diff", "-r", "model", "back"]
    assert subprocess.run(differ, cwd=tmp_path, check=False).returncode == 0
    listed = json.loads(seal(tmp_path, *OPEN, "--json")[2])
    assert sum(one["kind"] == "file" for one in listed) == FILES


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    peaks = []
    for size in (2**20, SIZE_BYTES):
        out = tmp_path / str(size)
        version = out / "model/models/m/1"
        version.mkdir(parents=True)
        with (version / "weights").open("wb") as file:
            file.truncate(size)
        peaks.append(
            [
                seal(out, *CREATE, "--bundle", "m.bundle")[1],
                seal(out, "verify", "m.img", "--bundle", "m.bundle")[1],
                seal(out, *REKEY, "--new-bundle", "n.bundle")[1],
                seal(out, *OPEN, "--extract", "back")[1],
            ]
        )
    for small, large in zip(*peaks, strict=True):
        assert large < BUDGET_BYTES
        assert large < small + 16 * 2**20
