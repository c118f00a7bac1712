"""What a volume may be called."""

from __future__ import annotations

import re

__all__ = ["GENERATIONS_MAX", "check_volume_id"]

GENERATIONS_MAX = 8
"""How many generations of a volume one release may hold, the newest included."""

_ID = re.compile(r"[a-z0-9._-]{1,64}")


def check_volume_id(volume_id: str) -> str:
    """Return the id if it is 1-64 of `[a-z0-9._-]` and no path component with a meaning.

    Raises: ValueError, naming the id.
    """
    if not _ID.fullmatch(volume_id) or volume_id in {".", ".."}:
        msg = f"volume id {volume_id!r} is not 1 to 64 of a-z 0-9 . _ -"
        raise ValueError(msg)
    return volume_id
