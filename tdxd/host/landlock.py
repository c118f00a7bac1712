"""Landlock: a process gives up files, TCP ports, and contact with processes outside.

The kernel is asked for its version (ABI) of Landlock; a right that it does not know is not
restricted, so what is in force depends on it: `ABI_TCP` for ports, `ABI_SCOPES` for signals and
abstract sockets. All that needs no privilege but "no new privileges". From the first version on a
process so confined can neither trace nor read the memory, the descriptors or the environment of
one that is not.

Source: Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h of 6.12.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import stat
import struct
from collections.abc import Sequence
from typing import Final

from tdxd.errors import HostError

__all__ = ["ABI_SCOPES", "ABI_TCP", "FileRules", "PortRules", "abi", "restrict"]

ABI_TCP: Final = 4
"""Linux 6.7: TCP connect and bind."""
ABI_SCOPES: Final = 6
"""Linux 6.12: signals, abstract Unix sockets."""

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION_FLAG = 1
_RULE_PATH, _RULE_PORT = 1, 2
_PR_SET_NO_NEW_PRIVS = 38

# Rights on files, LANDLOCK_ACCESS_FS_…
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
_MAKE_SOCK, _TRUNCATE, _IOCTL_DEV = 1 << 9, 1 << 14, 1 << 15
_FILE_RIGHTS = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
"""Those that a rule about something that is no directory may have."""
_KNOWN_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15}
"""How many rights on files an ABI knows; from 5 on it is 16."""
_ALL_KNOWN = 16

_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPES = 3
"""Abstract Unix sockets and signals."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FileRules:
    """Paths with all below them, by what may be done there; nothing else may be opened.

    Paths that do not exist are left out. `sockets`: directories for Unix sockets of its own.
    """

    execute: Sequence[str] = ()
    read: Sequence[str] = ()
    write: Sequence[str] = ()
    sockets: Sequence[str] = ()
    devices: Sequence[str] = ()

    def rights(self) -> list[tuple[str, int]]:
        """Return each path with its rights."""
        read = _READ_FILE | _READ_DIR
        files = _WRITE_FILE | _MAKE_REG | _REMOVE_FILE | _MAKE_DIR | _REMOVE_DIR
        sets = (
            (self.execute, read | _EXECUTE),
            (self.read, read),
            (self.write, read | files | _TRUNCATE),
            (self.sockets, _READ_DIR | _MAKE_SOCK | _REMOVE_FILE),
            (self.devices, _READ_FILE | _WRITE_FILE | _IOCTL_DEV),
        )
        return [(path, rights) for paths, rights in sets for path in paths]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PortRules:
    """TCP ports that may be connected to, and bound; no others."""

    connect: Sequence[int] = ()
    bind: Sequence[int] = ()


def abi() -> int:
    """Return the kernel's version of Landlock; 0 without it."""
    version: int = _libc.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    return max(version, 0)


def restrict(files: FileRules, ports: PortRules) -> None:
    """Confine this thread and all that it will execute; there is no way back.

    As far as this kernel can: see `abi`. Without Landlock nothing happens.

    Raises: HostError.
    """
    version = abi()
    if version == 0:
        return
    known = (1 << _KNOWN_BY_ABI.get(version, _ALL_KNOWN)) - 1
    ruleset = _create(version, known)
    try:
        for path, rights in files.rights():
            _allow_path(ruleset, path, rights & known)
        if version >= ABI_TCP:
            for allowed, right in (
                (ports.connect, _CONNECT_TCP),
                (ports.bind, _BIND_TCP),
            ):
                for port in allowed:
                    rule = ctypes.create_string_buffer(struct.pack("=QQ", right, port))
                    _call("add port rule", _ADD_RULE, ruleset, _RULE_PORT, rule, 0)
        if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise HostError("prctl", "no new privileges", ctypes.get_errno())
        _call("restrict", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _create(version: int, files: int) -> int:
    """Make a ruleset; its attribute grew from one 64-bit number to three."""
    ports = _BIND_TCP | _CONNECT_TCP
    numbers = [files]
    if version >= ABI_TCP:
        numbers.append(ports)
    if version >= ABI_SCOPES:
        numbers.append(_SCOPES)
    packed = struct.pack(f"={len(numbers)}Q", *numbers)
    attribute = ctypes.create_string_buffer(packed, len(packed))
    return _call("create ruleset", _CREATE_RULESET, attribute, len(packed), 0)


def _allow_path(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # nothing there, or not for us: then there is nothing to allow
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd), 12)
        _call(f"allow {path}", _ADD_RULE, ruleset, _RULE_PATH, rule, 0)
    finally:
        os.close(fd)


def _call(what: str, number: int, *arguments: object) -> int:
    result: int = _libc.syscall(number, *arguments)
    if result < 0:
        raise HostError("landlock", what, ctypes.get_errno())
    return result
