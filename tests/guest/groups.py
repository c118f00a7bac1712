"""Which files of tests share a guest, and in which order they run."""

from __future__ import annotations

from pathlib import PurePath

__all__ = ["SERVED", "guest_of"]

BARE = ("contracts", "harness", "doctor")
SERVED = ("boot", "isolation", "faults", "secrets", "upgrade", "unserved", "owner")
"""In an order in which few tests wait for a model server to start: a minute here."""

MEASURED = ("measured_image", "measured_image_attacks")


def guest_of(file: str) -> str:
    """Return the name of the guest that the tests of a file share; a file of others is alone."""
    name = PurePath(file).stem.removeprefix("test_")
    for guest, files in (("bare", BARE), ("served", SERVED), ("measured", MEASURED)):
        if name in files:
            return guest
    return name
