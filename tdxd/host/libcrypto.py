"""AES-256-XTS by the system's libcrypto: the fast way through many 4096-byte units.

`cryptography` makes a new context, with a new key schedule, for every unit: about 5 µs, where the
encryption itself takes 1. libcrypto keeps the schedule and only sets the tweak, which makes
opening an image half as fast again. `core.sealed` computes the same and is used where this
library cannot be loaded; a test compares them.

Source: OpenSSL 3, EVP_EncryptInit(3): EVP_CipherInit_ex with a NULL key keeps the old one.
"""

from __future__ import annotations

import ctypes

from tdxd.core.bundle import BLOCK_BYTES

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
    """One 64-byte key in one direction, from one buffer to another, as long or longer.

    All pointers are wrapped once: that is a third of the time of a call.

    Raises: RuntimeError if the library refuses, as it does for equal halves of the key.
    """

    def __init__(
        self, key: bytes, *, encrypt: bool, source: bytearray, target: bytearray
    ) -> None:
        assert _library is not None
        if len(key) != _KEY_BYTES or len(target) < len(source):
            msg = f"a key of {len(key)} bytes, or a target shorter than the source"
            raise ValueError(msg)
        self._init = _library.EVP_CipherInit_ex
        self._update = _library.EVP_CipherUpdate
        self._context = ctypes.c_void_p(_library.EVP_CIPHER_CTX_new())
        self._length = ctypes.c_int()
        self._units = list(zip(_blocks(target), _blocks(source), strict=False))
        cipher = ctypes.c_void_p(_library.EVP_aes_256_xts())
        tweak = bytes(16)
        if self._init(self._context, cipher, None, key, tweak, int(encrypt)) != 1:
            self.close()
            msg = "libcrypto refuses the AES-256-XTS key"
            raise RuntimeError(msg)

    def run(self, first_block: int, blocks: int) -> None:
        """Encrypt or decrypt the first `blocks` blocks of the source into the target.

        They count from `first_block` in the payload.

        Raises: ValueError for more blocks than there is room for.
        """
        if not 0 <= blocks <= len(self._units):
            msg = f"{blocks} blocks in buffers of {len(self._units)}"
            raise ValueError(msg)
        init, update, context = self._init, self._update, self._context
        length = ctypes.byref(self._length)
        sector, good = first_block * _SECTORS_PER_BLOCK, 1
        for target, source in self._units[:blocks]:
            tweak = sector.to_bytes(16, "little")
            good &= init(context, None, None, None, tweak, _KEEP_DIRECTION)
            good &= update(context, target, length, source, BLOCK_BYTES)
            sector += _SECTORS_PER_BLOCK
        if good != 1:
            msg = "libcrypto failed in AES-256-XTS"
            raise RuntimeError(msg)

    def close(self) -> None:
        """Free the context and wipe its key; harmless when repeated."""
        if self._context.value is not None and _library is not None:
            _library.EVP_CIPHER_CTX_free(self._context)
        self._context = ctypes.c_void_p()
        self._units = []


def _blocks(buffer: bytearray) -> list[ctypes.Array[ctypes.c_char]]:
    """Return each whole block of a buffer, as an argument that points to it.

    They keep the buffer alive and of its size.
    """
    block = ctypes.c_char * BLOCK_BYTES
    whole = len(buffer) // BLOCK_BYTES
    return [block.from_buffer(buffer, index * BLOCK_BYTES) for index in range(whole)]
