"""AES-256-XTS by the system's libcrypto: the fast way through many 4096-byte units.

`cryptography` makes a new context, with a new key schedule, for every unit: about 5 µs, where the
encryption itself takes 1. libcrypto keeps the schedule and only sets the tweak, which makes
opening an image half as fast again. `core.sealed` computes the same and is used where this
library cannot be loaded; a test compares them.

Source: OpenSSL 3, EVP_EncryptInit(3): EVP_CipherInit_ex with a NULL key keeps the old one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from operator import call
from struct import Struct

from tdxd.core.runs import BLOCK_BYTES

__all__ = ["Xts", "available"]

_NAME = "libcrypto.so.3"
_KEY_BYTES = 64
_SECTORS_PER_BLOCK = BLOCK_BYTES // 512
_KEEP_DIRECTION = -1


def _load() -> ctypes.PyDLL | None:
    try:
        # PyDLL keeps the interpreter lock, which costs less than letting it go for 1 µs.
        library = ctypes.PyDLL(_NAME)
    except OSError:
        return None
    library.EVP_aes_256_xts.restype = ctypes.c_void_p
    library.EVP_CIPHER_CTX_new.restype = ctypes.c_void_p
    return library


_library = _load()


def available() -> bool:
    """Say whether the library is there."""
    return _library is not None


class Xts:
    """One 64-byte key in one direction, from source blocks to as many target blocks.

    Both calls for each unit are made ready once, with all their arguments, so that a run is one
    loop in C. Finding out how to pass an argument takes ctypes as long as the cipher itself.

    Raises: RuntimeError if the library refuses, as it does for equal halves of the key.
    """

    def __init__(
        self,
        key: bytes,
        *,
        encrypt: bool,
        sources: Sequence[memoryview],
        targets: Sequence[memoryview],
        sector_bytes: int = BLOCK_BYTES,
    ) -> None:
        assert _library is not None
        sizes = {len(block) for block in (*sources, *targets)}
        if (
            len(key) != _KEY_BYTES
            or len(sources) != len(targets)
            or sizes - {BLOCK_BYTES}
        ):
            msg = (
                f"a key of {len(key)} bytes, {len(sources)} blocks into {len(targets)}"
            )
            raise ValueError(msg)
        self._context = ctypes.c_void_p(_library.EVP_CIPHER_CTX_new())
        cipher = ctypes.c_void_p(_library.EVP_aes_256_xts())
        tweak, start = bytes(16), _library.EVP_CipherInit_ex
        if start(self._context, cipher, None, key, tweak, int(encrypt)) != 1:
            self.close()
            msg = "libcrypto refuses the AES-256-XTS key"
            raise RuntimeError(msg)
        self._blocks = len(sources)
        self._step = sector_bytes // 512
        self._units = BLOCK_BYTES // sector_bytes
        self._pack = Struct("<" + "Q8x" * self._units * self._blocks).pack_into
        self._tweaks = bytearray(16 * self._units * self._blocks)
        self._calls = self._prepared(_library, sources, targets, sector_bytes)

    def _prepared(
        self,
        library: ctypes.PyDLL,
        sources: Sequence[memoryview],
        targets: Sequence[memoryview],
        size: int,
    ) -> list[Callable[[], int]]:
        """Return two calls for each unit: set the tweak, encrypt or decrypt."""
        assert self._context.value is not None
        context = ctypes.byref(ctypes.c_char.from_address(self._context.value))
        length = ctypes.byref(ctypes.c_int())
        init, update = library.EVP_CipherInit_ex, library.EVP_CipherUpdate
        calls: list[Callable[[], int]] = []
        for source, target in zip(sources, targets, strict=True):
            for at in range(0, BLOCK_BYTES, size):
                tweak = _at(self._tweaks, len(calls) // 2 * 16)
                into, out_of = _at(target, at), _at(source, at)
                calls.append(
                    partial(init, context, None, None, None, tweak, _KEEP_DIRECTION)
                )
                calls.append(partial(update, context, into, length, out_of, size))
        return calls

    def run(self, first_block: int, blocks: int) -> None:
        """Encrypt or decrypt the first `blocks` source blocks into the target blocks.

        They count from `first_block` in the payload.

        Raises: ValueError for more blocks than there are.
        """
        if not 0 <= blocks <= self._blocks:
            msg = f"{blocks} blocks where {self._blocks} have room"
            raise ValueError(msg)
        first, count = first_block * _SECTORS_PER_BLOCK, 2 * blocks * self._units
        every = self._blocks * _SECTORS_PER_BLOCK
        self._pack(self._tweaks, 0, *range(first, first + every, self._step))
        calls = self._calls if blocks == self._blocks else self._calls[:count]
        if sum(map(call, calls)) != count:
            msg = "libcrypto failed in AES-256-XTS"
            raise RuntimeError(msg)

    def close(self) -> None:
        """Free the context and wipe its key; harmless when repeated."""
        if self._context.value is not None and _library is not None:
            _library.EVP_CIPHER_CTX_free(self._context)
        self._context = ctypes.c_void_p()
        self._blocks, self._calls = 0, []


def _at(buffer: memoryview | bytearray, offset: int) -> object:
    """Return a pointer into a buffer, which it keeps alive and of its size.

    Of all kinds of pointers ctypes passes this one the fastest.
    """
    return ctypes.byref(ctypes.c_char.from_buffer(buffer, offset))
