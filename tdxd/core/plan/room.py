"""Whether there is memory for a second model server beside the first one."""

from __future__ import annotations

from tdxd.errors import NoRoomError

__all__ = ["check_room"]

_SHARE = 1.1
"""Another generation may be a little larger, and loading takes more than running."""
_MIB = 2**20


def check_room(*, running_bytes: int, available_bytes: int) -> None:
    """Check that a server as large as the one that runs fits beside it, with a tenth more.

    Raises: NoRoomError, naming both figures.
    """
    wanted_bytes = round(running_bytes * _SHARE)
    if wanted_bytes > available_bytes:
        raise NoRoomError(
            "not enough memory for a second model server beside the one that runs: "
            f"{wanted_bytes // _MIB} MiB wanted, {available_bytes // _MIB} MiB available",
            hint='give the machine more, or set serving.strategy = "replace-in-place", '
            "which interrupts serving",
        )
