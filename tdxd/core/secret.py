"""Key material that does not show itself.

Python cannot promise erasure: the interpreter and libraries may copy bytes. What this type
promises is that no `repr`, log line, traceback, comparison or pickle shows the content, and
that the one copy held here is overwritten by `wipe`.
"""

from __future__ import annotations

import hmac
from typing import NoReturn, Self

__all__ = ["Secret"]


class Secret:
    """Some secret bytes, held in one mutable buffer.

    Use `reveal` for the moment of use, `wipe` in a `finally`. Also a context manager that
    wipes at its end. A wiped secret raises `ValueError` when revealed.
    """

    __slots__ = ("_buffer", "_wiped")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._buffer = bytearray(data)
        self._wiped = False

    def __len__(self) -> int:
        return len(self._buffer)

    def reveal(self) -> bytes:
        """Return the secret bytes.

        Raises: ValueError after `wipe`.
        """
        if self._wiped:
            msg = "secret was wiped"
            raise ValueError(msg)
        return bytes(self._buffer)

    def wipe(self) -> None:
        """Overwrite the buffer with zeros; harmless when repeated."""
        self._buffer[:] = bytes(len(self._buffer))
        self._wiped = True

    @property
    def wiped(self) -> bool:
        """Whether `wipe` was called."""
        return self._wiped

    def matches(self, other: Secret) -> bool:
        """Compare in constant time."""
        return hmac.compare_digest(self._buffer, other._buffer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.wipe()

    def __repr__(self) -> str:
        return f"Secret({len(self._buffer)} bytes)"

    __str__ = __repr__

    def __eq__(self, other: object) -> NoReturn:
        msg = "compare secrets with Secret.matches"
        raise TypeError(msg)

    __hash__ = None  # type: ignore[assignment]  # unhashable on purpose: hashes leak equality

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        msg = "a secret cannot be pickled or copied"
        raise TypeError(msg)
