"""What the doctor looks at on this machine; gathered here, judged elsewhere.

Every gatherer takes the root of the file system, so that a test can show it another machine.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import grp
import os
import pwd
import time
from pathlib import Path
from typing import Literal

from tdxd.errors import TdxdError
from tdxd.host import dm

__all__ = ["MachineFacts", "Problem", "gather_machine"]

_UNIT_PLACES = ("etc/systemd/system", "usr/lib/systemd/system", "lib/systemd/system")
_UNIT = "tdxd.service"
_TIME_ERROR = 5
_TIMEX_BYTES = 512
"""More than struct timex has; zero modes only read. Source: adjtimex(2)."""

Unit = Literal["enabled", "disabled", "absent", "no-systemd"]


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """An error as text, and what to do about it."""

    message: str
    hint: str = ""

    @classmethod
    def of(cls, exc: TdxdError) -> Problem:
        """Keep the text of an error."""
        return cls(exc.message, exc.hint)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """This machine without its evidence and its network; sizes in bytes, times in seconds."""

    uid: int
    kernel: str
    """As uname(2) has it, for example `6.18.21-amd64`."""
    device_mapper: bool
    loop: bool
    file_systems: frozenset[str]
    """Those of interest that this kernel has or can load."""
    memory_bytes: int
    unit: Unit
    group: bool
    user: bool
    clock_s: float
    clock_set: bool | None
    """Whether a time service keeps the clock; None: the kernel does not tell."""
    built_s: float
    """When this program was installed."""


def gather_machine(
    *, group: str | None, user: str | None, root: str = "/"
) -> MachineFacts:
    """Look at the machine; `group` and `user` of None need not exist."""
    place = Path(root)
    return MachineFacts(
        uid=os.geteuid(),
        kernel=os.uname().release,
        device_mapper=dm.available(),
        loop=(place / "dev/loop-control").exists(),
        file_systems=_file_systems(place, ("erofs",)),
        memory_bytes=_memory_bytes(place),
        unit=_unit(place),
        group=group is None or _exists(grp.getgrnam, group),
        user=user is None or _exists(pwd.getpwnam, user),
        clock_s=time.time(),
        clock_set=_clock_set(),
        built_s=Path(__file__).stat().st_mtime,
    )


def _text(path: Path, max_bytes: int = 1 << 20) -> str:
    """Return the text of a file; empty without one."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(max_bytes).decode(errors="replace")
    return ""


def _file_systems(place: Path, names: tuple[str, ...]) -> frozenset[str]:
    known = {
        line.split()[-1] for line in _text(place / "proc/filesystems").splitlines()
    }
    modules = place / "lib/modules" / os.uname().release / "modules.dep"
    loadable = _text(modules, 1 << 24)
    return frozenset(one for one in names if one in known or f"/{one}.ko" in loadable)


def _memory_bytes(place: Path) -> int:
    for line in _text(place / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return 0


def _unit(place: Path) -> Unit:
    if not (place / "run/systemd/system").is_dir():
        return "no-systemd"
    wants = (place / "etc/systemd/system").glob("*.wants")
    if any((one / _UNIT).is_symlink() for one in wants):
        return "enabled"
    found = any((place / one / _UNIT).exists() for one in _UNIT_PLACES)
    return "disabled" if found else "absent"


def _exists(look_up: object, name: str) -> bool:
    assert callable(look_up)
    try:
        look_up(name)
    except KeyError:
        return False
    return True


def _clock_set() -> bool | None:
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    state = ctypes.CDLL(None).adjtimex(buffer)
    return None if state < 0 else state != _TIME_ERROR
