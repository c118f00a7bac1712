"""What a failed or finished operation must not leave behind."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tdxd.core.dm_table import OURS
from tdxd.host import dm, loop
from tdxd.host.mount import mount_points


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """What this process holds of the system now."""

    descriptors: frozenset[str]
    children: frozenset[str]
    devices: tuple[str, ...]
    mounts: tuple[str, ...]


def loops_and_mappings(under: str) -> tuple[str, ...]:
    """Loop devices on memory of tests or on files below a directory, and mappings of tests."""
    loops = (*loop.attached("/memfd:tdxd:contract"), *loop.attached(under))
    return (*loops, *dm.mappings(f"{OURS}contract"))


def held(under: str) -> Held:
    """Look at this process's descriptors and children, and at loops and mounts of ours."""
    gc.collect()  # what tests before left to it would go at any moment
    descriptors = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            descriptors.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:
            continue  # the descriptor of the listing itself
    children = set()
    for task in os.listdir("/proc/self/task"):
        children |= set(Path(f"/proc/self/task/{task}/children").read_text().split())
    return Held(
        descriptors=frozenset(descriptors),
        children=frozenset(children),
        devices=loops_and_mappings(under),
        mounts=tuple(point for point in mount_points() if point.startswith(under)),
    )


@contextmanager
def nothing_left(under: str) -> Iterator[None]:
    """Check that after a with block nothing is held but what was before.

    A loop device goes with its last user, which can be one that looks at every new device.
    """
    before = held(under)
    yield
    deadline = time.monotonic() + 5
    while (now := held(under)) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert now == before
