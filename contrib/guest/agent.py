"""Commands and files in the guest, through qemu-guest-agent.

Source: QEMU, docs/interop/qemu-ga-ref (guest-sync-delimited, guest-exec, guest-file-*).
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

from contrib.guest.json_lines import connect

__all__ = ["Agent", "AgentError", "Result"]

_CHUNK_BYTES = 1 << 20
_POLL_MIN_S, _POLL_MAX_S = 0.02, 0.4
_GRACE_S = 20.0
"""What an answer may take beyond the command itself, on a machine that is busy."""


class AgentError(Exception):
    """The agent refused a command."""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """How a command ended; `code` is negative for a signal."""

    code: int
    stdout: str
    stderr: str


class Agent:
    """A connection to the agent of a running guest, over all boots of one QEMU."""

    def __init__(self, path: Path, deadline: float) -> None:
        self._lines = connect(path, deadline)
        self._ids = itertools.count(int(time.monotonic() * 1000))

    def sync(self, deadline: float) -> None:
        """Wait until the agent answers; what is left of earlier commands is dropped.

        Raises: TimeoutError; ConnectionError, if QEMU ended.
        """
        sent = set()
        while True:
            number = next(self._ids)
            sent.add(number)
            command = {"id": number}
            self._lines.send(
                {"execute": "guest-sync-delimited", "arguments": command},
                prefix=b"\xff",
            )
            try:
                until = min(deadline, time.monotonic() + 0.5)
                while self._lines.receive(until).get("return") not in sent:
                    pass
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
            else:
                break
        self._settle(deadline)

    def _settle(self, deadline: float) -> None:
        """Take the answers to the other synchronisations: they were all delivered, or none."""
        command = {"id": next(self._ids)}
        self._lines.send({"execute": "guest-sync", "arguments": command})
        while self._lines.receive(deadline).get("return") != command["id"]:
            pass

    def execute(self, command: str, *, timeout_s: float = _GRACE_S, **more: Any) -> Any:
        """Run one command of the agent and return its value.

        Raises: AgentError; TimeoutError.
        """
        deadline = time.monotonic() + timeout_s
        given = {name.replace("_", "-"): value for name, value in more.items()}
        self._lines.send({"execute": command, "arguments": given})
        try:
            message = self._lines.receive(deadline)
        except TimeoutError:
            raise TimeoutError(f"{command}: no answer in {timeout_s} s") from None
        if "error" in message:
            raise AgentError(f"{command}: {message['error']['desc']}")
        return message["return"]

    def run(self, shell_command: str, *, timeout_s: float) -> Result:
        """Run a command as root to its end, at most 16 MiB of output.

        Raises: TimeoutError, after the guest has killed it.
        """
        pid = self.execute(
            "guest-exec",
            path="timeout",
            arg=["-k", "5", str(timeout_s), "sh", "-c", shell_command],
            env=["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8"],
            capture_output=True,
        )["pid"]
        deadline, pause_s = time.monotonic() + timeout_s + _GRACE_S, _POLL_MIN_S
        while not (status := self.execute("guest-exec-status", pid=pid))["exited"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{shell_command}: not ended in {timeout_s} s")
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _POLL_MAX_S)
        result = Result(
            code=status["exitcode"] if "exitcode" in status else -status["signal"],
            stdout=_text(status, "out"),
            stderr=_text(status, "err"),
        )
        if result.code in {124, 137}:
            raise TimeoutError(f"{shell_command}: killed after {timeout_s} s: {result}")
        return result

    def read_file(self, path: str) -> bytes:
        handle = self.execute("guest-file-open", path=path, mode="r")
        data = bytearray()
        try:
            while True:
                part = self.execute(
                    "guest-file-read", handle=handle, count=_CHUNK_BYTES
                )
                data += base64.b64decode(part["buf-b64"])
                if part["eof"]:
                    return bytes(data)
        finally:
            self.execute("guest-file-close", handle=handle)

    def write_file(self, path: str, data: bytes) -> None:
        handle = self.execute("guest-file-open", path=path, mode="w")
        try:
            for start in range(0, len(data), _CHUNK_BYTES):
                part = base64.b64encode(data[start : start + _CHUNK_BYTES]).decode()
                self.execute("guest-file-write", handle=handle, buf_b64=part)
        finally:
            self.execute("guest-file-close", handle=handle)

    def close(self) -> None:
        self._lines.close()


def _text(status: dict[str, Any], name: str) -> str:
    if status.get(f"{name}-truncated"):
        raise AgentError(f"more output on {name} than the agent keeps: use a file")
    return base64.b64decode(status.get(f"{name}-data", "")).decode(errors="replace")
