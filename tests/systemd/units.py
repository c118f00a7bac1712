"""Reads unit files and the other files of systemd/, and lays them out as a package does."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

__all__ = ["SYSTEMD", "UNITS", "command", "install", "seconds", "setting", "settings"]

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNITS = sorted(path.name for path in SYSTEMD.iterdir() if path.is_file())
PLACES = {
    "sysusers.d": "usr/lib/sysusers.d",
    "tmpfiles.d": "usr/lib/tmpfiles.d",
    "system-preset": "usr/lib/systemd/system-preset",
}
_SECONDS = {"min": 60.0, "s": 1.0}


def settings(unit: str, name: str) -> list[str]:
    """Return the values of all lines that set `name`, in order."""
    lines = (SYSTEMD / unit).read_text(encoding="ascii").splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def setting(unit: str, name: str) -> str:
    """Return the value of the one line that sets `name`."""
    (value,) = settings(unit, name)
    return value


def command(unit: str, name: str) -> list[str]:
    """Return a command line's words."""
    return shlex.split(setting(unit, name))


def seconds(text: str) -> float:
    """Return a time span of one number and one unit, such as 6min, in seconds."""
    for unit, factor in _SECONDS.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor
    raise ValueError(text)


def install(root: Path) -> None:
    """Put our files below `root`, with the system's own units and programs that do nothing."""
    units = root / "usr/lib/systemd/system"
    shutil.copytree("/usr/lib/systemd/system", units, symlinks=True)
    for unit in UNITS:
        shutil.copy(SYSTEMD / unit, units)
    for folder, place in PLACES.items():
        (root / place).mkdir(parents=True)
        for path in (SYSTEMD / folder).iterdir():
            shutil.copy(path, root / place)
    (root / "usr/bin").mkdir()
    (root / "etc").mkdir()
    for program in {Path(one).name for unit in UNITS for one in _programs(unit)}:
        path = root / "usr/bin" / program
        path.write_text("#!/bin/sh\n")
        os.chmod(path, 0o755)


def _programs(unit: str) -> list[str]:
    names = ("ExecStart", "ExecReload", "ExecStopPost")
    return [line.split()[0] for name in names for line in settings(unit, name)]
