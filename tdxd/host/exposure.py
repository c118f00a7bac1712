"""Looks at what protects this machine; judged elsewhere.

All of it can be seen from inside the daemon's sandbox, and takes some milliseconds. `root` lets a
test show another machine.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tdxd.core.protection import Observed, RootFact
from tdxd.host import machine, measured_root

__all__ = ["observe"]

AGENTS = {
    "qemu-guest-agent": ("usr/sbin/qemu-ga", "usr/bin/qemu-ga"),
    "cloud-init": ("usr/bin/cloud-init",),
    "google-guest-agent": ("usr/bin/google_guest_agent",),
    "google-osconfig-agent": ("usr/bin/google_osconfig_agent",),
    "aliyun-assist": ("usr/sbin/aliyun-service", "usr/local/share/aliyun-assist"),
    "walinuxagent": ("usr/sbin/waagent", "usr/bin/waagent"),
    "amazon-ssm-agent": ("usr/bin/amazon-ssm-agent",),
    "open-vm-tools": ("usr/bin/vmtoolsd",),
    "spice-vdagent": ("usr/sbin/spice-vdagentd",),
}
"""Programs by which a host commands a guest, with their places."""
_LOGIN_UNIT = re.compile(
    r"(?:(?:serial-|container-)?getty@.*|console-getty|sshd?(?:@.*)?|dropbear"
    r"|debug-shell|rescue|emergency)\.service|session-.*\.scope"
)
_LOGIN_SOCKETS = (
    "run/systemd/generator/sshd-vsock.socket",
    "etc/systemd/system/sockets.target.wants/ssh.socket",
    "etc/systemd/system/sockets.target.wants/sshd.socket",
)
"""By which systemd starts sshd only once somebody knocks.

The first it makes by itself from version 256 on, in every virtual machine with sshd: for the host.
Source: systemd-ssh-generator(8).
"""
_UNIT_LINKS = ("etc/systemd/system", "run/systemd/system")
_LOGIN_PROGRAMS = {"agetty", "getty", "login", "sshd", "dropbear", "telnetd"}
_UNITS = (
    "system.slice/*.service",
    "system.slice/*.slice/*.service",
    "user.slice/user-*.slice/session-*.scope",
)
_LISTEN = "0A"
_LOOPBACK = re.compile(
    r"[0-9A-F]{6}7F|0{24}01000000|0{16}FFFF0000[0-9A-F]{6}7F", re.ASCII
)
"""127.0.0.0/8, ::1 and ::ffff:127.0.0.0/104 as /proc/net/tcp writes them: 32-bit words, swapped."""


def observe(root: str = "/") -> Observed:
    """Look at the machine."""
    place = Path(root)
    command_line = place / "proc/cmdline"
    return Observed(
        tdx_cpu=machine.is_tdx_guest(str(place / "proc/cpuinfo")),
        root=_root(place, command_line),
        command_line=_text(command_line).strip(),
        swap=machine.swap_areas(str(place / "proc/swaps")),
        logins=(*_login_sockets(place), *_running_logins(place)),
        ports=_ports(place),
        agents=_agents(place),
        lockdown=_lockdown(place),
    )


def _text(path: Path) -> str:
    """Return the text of a file; empty without one."""
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _root(place: Path, command_line: Path) -> RootFact:
    """Find what is mounted on /; the file system's own options, not those of our mount of it."""
    kind, writable = "unknown", True
    for line in _text(place / "proc/self/mountinfo").splitlines():
        mount, _, source = line.partition(" - ")
        fields = source.split()
        if mount.split()[4:5] == ["/"] and len(fields) >= 3:
            kind, writable = fields[0], "ro" not in fields[2].split(",")
    measured = measured_root.lie_on_measured_root(
        [],
        root=str(place),
        command_line=str(command_line),
        devices=str(place / "sys/dev/block"),
    )
    return RootFact(kind, writable, measured)


def _login_sockets(place: Path) -> tuple[str, ...]:
    """Return the sockets that are enabled and start sshd; masked ones do not listen."""
    there = [Path(path).name for path in _LOGIN_SOCKETS if (place / path).exists()]
    return tuple(
        name
        for name in there
        if not any(_is_masked(place / link / name) for link in _UNIT_LINKS)
    )


def _is_masked(unit: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.readlink(unit) == os.devnull
    return False


def _running_logins(place: Path) -> tuple[str, ...]:
    return _login_units(place) or _login_programs(place)


def _login_units(place: Path) -> tuple[str, ...]:
    """Return the running units that let a person in, by their control groups."""
    found = set()
    for top in ("sys/fs/cgroup", "sys/fs/cgroup/systemd"):
        for pattern in _UNITS:
            for group in (place / top).glob(pattern):
                if _LOGIN_UNIT.fullmatch(group.name) and _text(group / "cgroup.procs"):
                    found.add(group.name)
    return tuple(sorted(found))


def _login_programs(place: Path) -> tuple[str, ...]:
    """Return the running programs that let a person in, where no systemd tells of units."""
    names = {_text(path / "comm").strip() for path in (place / "proc").glob("[0-9]*")}
    return tuple(sorted(names & _LOGIN_PROGRAMS))


def _ports(place: Path) -> tuple[int, ...]:
    found: set[int] = set()
    for name in ("tcp", "tcp6"):
        with (
            contextlib.suppress(OSError),
            (place / "proc/net" / name).open(encoding="ascii") as lines,
        ):
            next(lines, None)
            found.update(_listening(lines))
    return tuple(sorted(found))


def _listening(lines: Iterable[str]) -> Iterable[int]:
    """Yield the ports; the kernel lists who listens before all connections. Source: proc(5)."""
    for line in lines:
        words = line.split()
        if words[3] != _LISTEN:
            return
        address, _, port = words[1].partition(":")
        if not _LOOPBACK.fullmatch(address):
            yield int(port, 16)


def _agents(place: Path) -> tuple[str, ...]:
    return tuple(
        name
        for name, paths in AGENTS.items()
        if any((place / path).exists() for path in paths)
    )


def _lockdown(place: Path) -> str | None:
    """Return the word in brackets. Source: kernel_lockdown(7)."""
    found = re.search(r"\[(\w+)\]", _text(place / "sys/kernel/security/lockdown"))
    return found[1] if found else None
