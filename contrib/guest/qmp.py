"""QEMU's own control socket.

Source: QEMU, docs/interop/qmp-spec.txt.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from contrib.guest.json_lines import connect

__all__ = ["Qmp", "QmpError"]


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """A connection past its greeting; `events` holds what QEMU reported meanwhile."""

    def __init__(self, path: Path, deadline: float) -> None:
        self.events: list[dict[str, Any]] = []
        self._lines = connect(path, deadline)
        self._lines.receive(deadline)
        self.execute("qmp_capabilities")

    def execute(self, command: str, *, timeout_s: float = 20, **arguments: Any) -> Any:
        """Run a command and return its value."""
        deadline = time.monotonic() + timeout_s
        self._lines.send({"execute": command, "arguments": arguments})
        while True:
            message = self._lines.receive(deadline)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(f"{command} {arguments}: {message['error']['desc']}")
            else:
                return message["return"]

    def close(self) -> None:
        self._lines.close()
