"""Runs inside the guest: looks for canaries where no secret may be. Prints what it finds.

Usage: search.py WHAT < canaries, one in hex a line. WHAT is `processes` (command lines and
environments), `journal`, or `files` (all that the caller can read on any file system).
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 22


def processes() -> Iterator[tuple[str, bytes]]:
    for entry in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                yield f"{entry}/{name}", (entry / name).read_bytes()
            except OSError:
                continue


def journal() -> Iterator[tuple[str, bytes]]:
    argv = ["journalctl", "--quiet", "--no-pager", "--all", "--output=export"]
    yield "journal", subprocess.run(argv, check=True, capture_output=True).stdout


def files() -> Iterator[tuple[str, bytes]]:
    """Every byte of every file and device that opens, also shared memory and open descriptors."""
    for directory, _names, names in os.walk("/", onerror=None):
        if directory.startswith(("/sys", "/opt/tools", "/usr/lib/tdxd")):
            continue  # the kernel's, the tests' own, packages
        if directory.startswith("/proc") and not directory.endswith("/fd"):
            continue
        for name in names:
            path = os.path.join(directory, name)
            for part in chunks(path):
                yield path, part


def chunks(path: str) -> Iterator[bytes]:
    """Yield a file's bytes, in pieces that overlap by the length of a canary."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            return
        with open(path, "rb", buffering=0) as file:
            tail = b""
            while data := file.read(CHUNK_BYTES):
                yield tail + data
                tail = data[-256:]
    except OSError:
        return


def main() -> None:
    canaries = [bytes.fromhex(line) for line in sys.stdin.read().split()]
    places = {"processes": processes, "journal": journal, "files": files}[sys.argv[1]]
    searched = 0
    for place, data in places():
        searched += len(data)
        for number, canary in enumerate(canaries):
            if canary in data:
                print(f"FOUND canary {number} in {place}")
    print(f"searched {searched} bytes as uid {os.geteuid()}")


if __name__ == "__main__":
    main()
