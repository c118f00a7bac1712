"""Device mapper: make, read back and remove devices of one target, through /dev/mapper/control.

Devices are addressed by uuid, which only a caller of device mapper can set. Nothing of
libdevmapper is needed: no name below /dev/mapper is used, and no udev cookie is waited for.

Source: Linux, include/uapi/linux/dm-ioctl.h, interface version 4.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import struct
import time
from pathlib import Path

from tdxd.core.dm_table import Table
from tdxd.errors import BusyError, HostError

__all__ = [
    "Device",
    "LiveTable",
    "available",
    "create",
    "live_table",
    "mappings",
    "remove",
    "status",
]

_CONTROL = "/dev/mapper/control"
_HEADER = struct.Struct("<5I I i 3I Q 128s 129s 7x")
"""struct dm_ioctl: three of version, data_size, data_start, target_count, open_count, flags,
event_nr, padding, dev, name, uuid; 312 bytes."""
_TARGET = struct.Struct("<QQ i I 16s")
"""struct dm_target_spec: sector_start, length, status, next, target_type; 40 bytes."""
_IOC = 0xC138FD00
"""_IOWR(0xfd, 0, struct dm_ioctl), to which the command is added."""
_VERSION = 0
_DEV_CREATE = 3
_DEV_REMOVE = 4
_DEV_SUSPEND = 6
_TABLE_LOAD = 9
_TABLE_STATUS = 12
_READONLY_FLAG = 1 << 0
_STATUS_TABLE_FLAG = 1 << 4
_BUFFER_FULL_FLAG = 1 << 8
_NOFLUSH_FLAG = 1 << 11
_SECURE_DATA_FLAG = 1 << 15
_DEFERRED_REMOVE_FLAG = 1 << 17
_BUFFER_BYTES = 16384
_BUSY_TIMEOUT_S = 3.0
"""How long a probe of udev may hold a device that is being removed."""
_BUSY_POLL_S = 0.02
_HINT = "this needs root, and the kernel's device mapper (modprobe dm_mod dm_crypt dm_verity)"


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A live device: its uuid, and its number as MAJOR:MINOR."""

    uuid: str
    number: str

    @property
    def path(self) -> str:
        """The node that the kernel makes in devtmpfs."""
        return f"/dev/dm-{self.number.partition(':')[2]}"


@dataclasses.dataclass(frozen=True, slots=True)
class LiveTable:
    """What the kernel says of a device with one target; an empty `target` if it has several."""

    target: str
    parameters: str
    read_only: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Answer:
    """The header's fields that matter, and the one target's parameters."""

    flags: int
    dev: int
    target: str = ""
    sectors: int = 0
    parameters: str = ""


def available() -> bool:
    """Say whether this kernel has a device mapper that answers."""
    try:
        _call(_VERSION, uuid="")
    except HostError:
        return False
    return True


def create(name: str, uuid: str, table: Table, *, writable: bool = False) -> Device:
    """Make a device with one target, activate it and compare what the kernel made of it.

    Raises: BusyError if there already is one of this name or uuid; HostError. Nothing is left.
    """
    try:
        made = _call(_DEV_CREATE, uuid=uuid, name=name)
    except HostError as exc:
        if exc.errno != errno.EBUSY:
            raise
        hint = "the volume is open already; after a crash: tdxd --sweep"
        raise BusyError(f"device mapper {uuid}: exists", hint=hint) from exc
    device = Device(uuid, f"{os.major(made.dev)}:{os.minor(made.dev)}")
    try:
        flags = _SECURE_DATA_FLAG | (0 if writable else _READONLY_FLAG)
        _call(_TABLE_LOAD, uuid=uuid, table=table, flags=flags)
        _call(_DEV_SUSPEND, uuid=uuid)  # without the suspend flag: resume
        _check(uuid, table, writable=writable)
    except HostError:
        with contextlib.suppress(HostError):
            remove(uuid, deferred=True)  # a probe may hold it
        raise
    return device


def _check(uuid: str, table: Table, *, writable: bool) -> None:
    """Read the live table back.

    Raises: HostError if it is not what was loaded.
    """
    live = _call(_TABLE_STATUS, uuid=uuid, flags=_STATUS_TABLE_FLAG | _NOFLUSH_FLAG)
    found = (live.target, live.sectors, live.parameters)
    read_only = bool(live.flags & _READONLY_FLAG)
    wanted = (table.target, table.sectors, table.parameters)
    if found != wanted or read_only is writable:
        hint = "another program changed the device, or this kernel writes tables differently"
        raise HostError("read back the table of", uuid, errno.EBADMSG, hint=hint)


def status(uuid: str) -> str:
    """Return the status line of the device's target.

    Raises: HostError, with ENXIO if there is no such device.
    """
    return _call(_TABLE_STATUS, uuid=uuid, flags=_NOFLUSH_FLAG).parameters


def live_table(uuid: str) -> LiveTable:
    """Return the live table of any device, not only of ours.

    Raises: HostError, with ENXIO if there is no such device.
    """
    live = _call(_TABLE_STATUS, uuid=uuid, flags=_STATUS_TABLE_FLAG | _NOFLUSH_FLAG)
    read_only = bool(live.flags & _READONLY_FLAG)
    return LiveTable(live.target, live.parameters, read_only)


def remove(uuid: str, *, deferred: bool = False) -> None:
    """Remove a device; harmless when there is none.

    A device that is open is tried again for three seconds, since a probe may hold it; with
    `deferred` the kernel removes it when its last user is gone.

    Raises: BusyError, HostError.
    """
    flags = _DEFERRED_REMOVE_FLAG if deferred else 0
    deadline_s = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            _call(_DEV_REMOVE, uuid=uuid, flags=flags)
        except HostError as exc:
            if exc.errno == errno.ENXIO:
                return
            if exc.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline_s:
                hint = "a process still has it open or mounted"
                raise BusyError(f"remove {uuid}: in use", hint=hint) from exc
            time.sleep(_BUSY_POLL_S)
        else:
            return


def mappings(prefix: str) -> tuple[str, ...]:
    """Return the uuids that begin with `prefix`, newest device first: users before the used."""
    found = []
    for entry in Path("/sys/block").glob("dm-*"):
        with contextlib.suppress(OSError):  # removed between the listing and the look
            uuid = (entry / "dm/uuid").read_text().strip()
            if uuid.startswith(prefix):
                found.append((int(entry.name.removeprefix("dm-")), uuid))
    return tuple(uuid for _minor, uuid in sorted(found, reverse=True))


def _call(
    command: int,
    *,
    uuid: str,
    name: str = "",
    table: Table | None = None,
    flags: int = 0,
) -> _Answer:
    """Do one ioctl on one device.

    Raises: HostError.
    """
    what = uuid or _CONTROL
    buffer = _request(uuid, name, table, flags)
    try:
        with open(_CONTROL, "rb", buffering=0) as control:
            fcntl.ioctl(control, _IOC + command, buffer)
    except OSError as exc:
        raise HostError.of(_NAMES[command], what, exc, hint=_HINT) from exc
    return _parse(bytes(buffer), what)


_NAMES = {
    _VERSION: "ask the device mapper at",
    _DEV_CREATE: "create device mapper",
    _DEV_REMOVE: "remove device mapper",
    _DEV_SUSPEND: "activate device mapper",
    _TABLE_LOAD: "load the table of",
    _TABLE_STATUS: "read the table of",
}


def _request(uuid: str, name: str, table: Table | None, flags: int) -> bytearray:
    targets = b""
    if table is not None:
        parameters = table.parameters.encode() + b"\0"
        parameters += bytes(-len(parameters) % 8)
        size = _TARGET.size + len(parameters)
        target = _TARGET.pack(0, table.sectors, 0, size, table.target.encode())
        targets = target + parameters
    header = _HEADER.pack(
        *(4, 0, 0, _BUFFER_BYTES, _HEADER.size),
        1 if table else 0,
        *(0, flags, 0, 0, 0),
        # Only creating takes both; all other commands take one of them.
        name.encode(),
        uuid.encode(),
    )
    return bytearray((header + targets).ljust(_BUFFER_BYTES, b"\0"))


def _parse(data: bytes, what: str) -> _Answer:
    fields = _HEADER.unpack_from(data)
    start, count, flags, dev = fields[4], fields[5], fields[7], fields[10]
    if flags & _BUFFER_FULL_FLAG:
        raise HostError("read the answer about", what, errno.ENOSPC)
    if count != 1:
        return _Answer(flags, dev)
    _start, sectors, _status, _next, target = _TARGET.unpack_from(data, start)
    text = data[start + _TARGET.size :].split(b"\0", 1)[0]
    kind = target.split(b"\0", 1)[0].decode(errors="replace")
    return _Answer(flags, dev, kind, sectors, text.decode(errors="replace").strip())
