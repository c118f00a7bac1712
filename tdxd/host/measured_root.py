"""Whether files lie on the root file system, and which dm-verity root hash that is checked by."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from tdxd.core.config_trust import command_line_root_hash, verity_root_hash
from tdxd.errors import HostError
from tdxd.host import dm

__all__ = ["lie_on_measured_root"]


def lie_on_measured_root(
    paths: Iterable[str],
    *,
    root: str = "/",
    command_line: str = "/proc/cmdline",
    devices: str = "/sys/dev/block",
) -> bool:
    """Say whether dm-verity checks all these files and the root by the command line's root hash.

    Each must be in the very file system of `root`: what is mounted or laid over it is another.
    """
    try:
        number = os.stat(root).st_dev
        if any(os.stat(path).st_dev != number for path in paths):
            return False
        wanted = command_line_root_hash(Path(command_line).read_text(encoding="utf-8"))
        name = f"{os.major(number)}:{os.minor(number)}"
        uuid = Path(devices, name, "dm/uuid").read_text(encoding="utf-8").strip()
        table = dm.live_table(uuid)
    except (OSError, UnicodeDecodeError, HostError):
        return False  # no device mapper below the root, or none that answers
    found = verity_root_hash(table.target, table.parameters)
    return table.read_only and wanted is not None and found == wanted
