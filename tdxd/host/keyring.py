"""The kernel's keyring: hand a volume key to dm-crypt without argv, a file or a table holding it.

A `logon` key can be used by the kernel and never be read back. It is linked to the calling
thread's keyring only, which no other thread sees: add, use and unlink in one call.

Source: add_key(2), keyctl(2), thread-keyring(7); numbers from linux/keyctl.h and each
architecture's system call table.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

from tdxd.core.secret import Secret
from tdxd.errors import HostError

__all__ = ["logon_key"]

_SYSTEM_CALLS = {"x86_64": (248, 250), "aarch64": (217, 219)}
"""Numbers of add_key and keyctl, which the C library does not wrap."""
_THREAD_KEYRING = -1
_KEYCTL_UNLINK = 9

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def logon_key(description: str, key: Secret) -> Iterator[None]:
    """Keep a key under `description` in this thread's keyring for the time of a with block.

    The kernel wipes its copy when the last link is gone; a table that was loaded meanwhile
    keeps the key inside the cipher.

    Raises: HostError.
    """
    numbers = _SYSTEM_CALLS.get(platform.machine())
    if numbers is None:
        hint = "device mapper volumes are supported on " + ", ".join(_SYSTEM_CALLS)
        raise HostError("add a key on", platform.machine(), 0, hint=hint)
    add_key, keyctl = numbers
    payload = (ctypes.c_char * len(key)).from_buffer_copy(key.reveal())
    try:
        serial = _libc.syscall(
            ctypes.c_long(add_key),
            b"logon",
            description.encode(),
            payload,
            ctypes.c_size_t(len(payload)),
            ctypes.c_long(_THREAD_KEYRING),
        )
        number = ctypes.get_errno()
    finally:
        ctypes.memset(payload, 0, len(payload))
    if serial < 0:
        hint = (
            "a sandbox must allow add_key and keyctl (@keyring), the kernel have keys"
        )
        raise HostError("add the key", description, number, hint=hint)
    try:
        yield
    finally:
        _libc.syscall(
            ctypes.c_long(keyctl),
            ctypes.c_long(_KEYCTL_UNLINK),
            ctypes.c_long(serial),
            ctypes.c_long(_THREAD_KEYRING),
        )
