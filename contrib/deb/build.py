"""Build the Debian packages: tdxd, tdxd-owner, tdxd-model-server.

Usage: contrib/deb/build [--version VERSION] [--output DIRECTORY] [PACKAGE ...]

The sources are this checkout; the dependencies are the installed, pinned distributions of the
interpreter that runs this. The same commit gives the same bytes, wherever and whenever it is built.
A package whose inputs are those of its last build is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from contrib.deb.archive import architecture, write_deb
from contrib.deb.contents import ROOT, contents, fingerprint
from contrib.deb.packages import PACKAGES, Package
from tdxd import __version__

__all__ = ["build", "main", "source_epoch_s"]

_EPOCH_WITHOUT_GIT_S = 1767225600
"""2026-01-01: for a source tree without history."""
_VERSION = re.compile(r"[0-9][0-9A-Za-z.+~]*")


def main() -> None:
    """Build what the command line names, by default all packages."""
    parser = argparse.ArgumentParser(prog="contrib/deb/build")
    parser.add_argument(
        "--version", default=__version__, help=f"default: {__version__}"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "deb")
    parser.add_argument(
        "package", nargs="*", help=f"of {', '.join(PACKAGES)}; default: all"
    )
    given = parser.parse_args()
    if not _VERSION.fullmatch(given.version):
        parser.error(f"version {given.version!r} is not one of Debian's")
    for name in given.package:
        if name not in PACKAGES:
            parser.error(f"no package {name!r}")
    os.umask(0o022)
    given.output.mkdir(parents=True, exist_ok=True)
    for name in given.package or PACKAGES:
        build(PACKAGES[name], given.version, given.output.resolve())


def build(package: Package, version: str, output: Path) -> Path:
    """Build a package unless it is up to date; return its file."""
    started_s = time.monotonic()
    epoch_s = source_epoch_s(ROOT)
    files = contents(package, version, epoch_s)
    deb = output / f"{package.name}_{version}_{architecture()}.deb"
    stamp = output / f".{deb.name}.inputs"
    inputs = hashlib.sha256()
    for part in (sys.version, version, str(epoch_s), fingerprint(files)):
        inputs.update(part.encode() + b"\0")
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            inputs.update(path.read_bytes())
    wanted = inputs.hexdigest()
    if deb.exists() and stamp.exists() and stamp.read_text() == wanted:
        print(f"{deb.name}: up to date")
        return deb
    stamp.unlink(missing_ok=True)
    installed_bytes = write_deb(package, version, epoch_s, files, deb)
    stamp.write_text(wanted)
    print(
        f"{deb.name}: {deb.stat().st_size / 2**20:.1f} MiB, installed "
        f"{installed_bytes / 2**20:.1f} MiB, {time.monotonic() - started_s:.0f} s"
    )
    return deb


def source_epoch_s(root: Path) -> int:
    """Return the time all files get: SOURCE_DATE_EPOCH, else the commit's, else a fixed one."""
    given = os.environ.get("SOURCE_DATE_EPOCH")
    if given:
        return int(given)
    if not (root / ".git").exists():
        return _EPOCH_WITHOUT_GIT_S
    # The checkout may belong to another user than the one who builds.
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    done = subprocess.run(
        [*git, "log", "-1", "--format=%ct"], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


if __name__ == "__main__":
    main()
