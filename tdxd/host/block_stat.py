"""What the kernel counts of a block device.

Source: Linux, Documentation/block/stat.rst; Documentation/ABI/stable/sysfs-block.
"""

from __future__ import annotations

import os
import stat

__all__ = ["bytes_read"]

_SECTOR_BYTES = 512
"""The unit of the counts, whatever the device's own sectors are."""
_SECTORS_READ = 2
"""The third field."""


def bytes_read(device: str) -> int | None:
    """Return how much was ever read from the device at this path; `None` if there is none."""
    try:
        seen = os.stat(device)
        if not stat.S_ISBLK(seen.st_mode):
            return None
        number = f"{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}"
        with open(f"/sys/dev/block/{number}/stat", encoding="ascii") as file:
            return int(file.read().split()[_SECTORS_READ]) * _SECTOR_BYTES
    except OSError:
        return None
