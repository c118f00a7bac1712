"""seccomp: a filter that refuses system calls which no model server and no front needs.

A list of what is refused, not of what is allowed: TensorFlow, its compilers and the C library use
many calls, and more with each version. Refused ones fail with EPERM, as for anybody without rights.

Source: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, linux/filter.h; the numbers are
those of arch/x86/entry/syscalls/syscall_64.tbl. TDX is x86-64 only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from typing import Final

from tdxd.errors import HostError

__all__ = ["REFUSED", "install", "program", "supported"]

REFUSED: Final = {
    # Looking into other processes.
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "kcmp": 312,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    # File systems and namespaces.
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "unshare": 272,
    "setns": 308,
    "name_to_handle_at": 303,
    "open_by_handle_at": 304,
    "quotactl": 179,
    "acct": 163,
    "swapon": 167,
    "swapoff": 168,
    "fanotify_init": 300,
    # The kernel itself, and parts of it with a history of holes.
    "bpf": 321,
    "perf_event_open": 298,
    "userfaultfd": 323,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "init_module": 175,
    "finit_module": 313,
    "delete_module": 176,
    "kexec_load": 246,
    "kexec_file_load": 320,
    "reboot": 169,
    "syslog": 103,
    "iopl": 172,
    "ioperm": 173,
    "modify_ldt": 154,
    "settimeofday": 164,
    "clock_settime": 227,
    "clock_adjtime": 305,
    "adjtimex": 159,
    "sethostname": 170,
    "setdomainname": 171,
}
_SOCKET, _CONNECT, _CLONE, _CLONE3 = 41, 42, 56, 435

_AUDIT_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_FAMILIES = (1, 2, 10)
"""AF_UNIX, AF_INET, AF_INET6. Not AF_VSOCK, which no network namespace closes."""
_SOCK_STREAM, _SOCK_TYPE_MASK = 1, 0xF
_NAMESPACE_FLAGS = 0x7E020080
"""CLONE_NEWNS, -CGROUP, -UTS, -IPC, -USER, -PID, -NET, -TIME; linux/sched.h."""

# Classic BPF: struct seccomp_data is nr, arch, instruction pointer, six 64-bit arguments.
_LOAD, _AND, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARGUMENT_0, _ARGUMENT_1 = 0, 4, 16, 24
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_PR_GET_SECCOMP = 21
_Instruction = tuple[int, int, int, int]

_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Say whether there is a filter for this machine, and a kernel that takes it."""
    known = os.uname().machine == "x86_64" and struct.calcsize("P") == 8
    mode: int = _libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0)
    return known and mode >= 0


def program(*, may_connect: bool) -> bytes:
    """Return the filter: instructions of `struct sock_filter`, 8 bytes each.

    Without `may_connect` a process can neither connect a socket nor make one for datagrams: it
    only answers those who connect to it.
    """
    refuse = _ERRNO | errno.EPERM
    made: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NR),
        (_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    refused = [*REFUSED.values(), *(() if may_connect else (_CONNECT,))]
    for number in refused:
        made += _when(number, [(_RETURN, 0, 0, refuse)])
    # Its flags are in memory, which a filter cannot read; the C library then takes clone().
    made += _when(_CLONE3, [(_RETURN, 0, 0, _ERRNO | errno.ENOSYS)])
    made += _when(
        _CLONE,
        [
            (_LOAD, 0, 0, _ARGUMENT_0),
            (_ANY_BIT, 0, 1, _NAMESPACE_FLAGS),
            (_RETURN, 0, 0, refuse),
            (_RETURN, 0, 0, _ALLOW),
        ],
    )
    made += _when(_SOCKET, _socket_rules(refuse, streams_only=not may_connect))
    made.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *one) for one in made)


def _when(number: int, then: Sequence[_Instruction]) -> list[_Instruction]:
    """Return instructions for one system call; `then` must end with a return."""
    return [(_EQUAL, 0, len(then), number), *then]


def _socket_rules(refuse: int, *, streams_only: bool) -> list[_Instruction]:
    count = len(_FAMILIES)
    made: list[_Instruction] = [(_LOAD, 0, 0, _ARGUMENT_0)]
    made += [(_EQUAL, count - at, 0, family) for at, family in enumerate(_FAMILIES)]
    made.append((_RETURN, 0, 0, refuse))
    if streams_only:
        made += [
            (_LOAD, 0, 0, _ARGUMENT_1),
            (_AND, 0, 0, _SOCK_TYPE_MASK),
            (_EQUAL, 1, 0, _SOCK_STREAM),
            (_RETURN, 0, 0, refuse),
        ]
    made.append((_RETURN, 0, 0, _ALLOW))
    return made


class _Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(*, may_connect: bool) -> None:
    """Filter this thread and all that it will execute; there is no way back.

    The thread must have given up new privileges. Where there is no filter nothing happens.

    Raises: HostError.
    """
    if not supported():
        return
    code = program(may_connect=may_connect)
    prog = _Program(len(code) // 8, code)
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(prog), 0, 0) != 0:
        raise HostError("prctl", "seccomp filter", ctypes.get_errno())
