"""JSON values, one a line, over a Unix socket of QEMU, with a deadline on everything."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

__all__ = ["JsonLines", "connect"]

_SENTINEL = b"\xff"
"""Sent before an answer of the guest agent's `guest-sync-delimited`."""


class JsonLines:
    """One connection."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._received = b""

    def send(self, value: object, *, prefix: bytes = b"") -> None:
        self._socket.settimeout(10)
        self._socket.sendall(prefix + json.dumps(value).encode() + b"\n")

    def receive(self, deadline: float) -> dict[str, Any]:
        """Return the next value.

        Raises: TimeoutError; ConnectionError, if the other side is gone.
        """
        while b"\n" not in self._received:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._socket.recv(1 << 20)
            if not data:
                raise ConnectionResetError("QEMU closed the socket")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        value: dict[str, Any] = json.loads(line.rpartition(_SENTINEL)[2])
        return value

    def close(self) -> None:
        self._socket.close()


def connect(path: Path, deadline: float) -> JsonLines:
    """Connect to a socket that QEMU makes when it starts.

    Raises: TimeoutError.
    """
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path}: nobody listens") from None
            time.sleep(0.02)
        else:
            return JsonLines(sock)
