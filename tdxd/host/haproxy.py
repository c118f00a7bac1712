"""The front's runtime API, and the memory files that carry its certificate.

A certificate with its key is a memfd: it has no name on a disk.
Source: HAProxy 2.6 management guide §9.3.
"""

from __future__ import annotations

import os
import socket

import trio

from tdxd.errors import HostError, NotReadyError
from tdxd.host.haproxy_config import BACKENDS

__all__ = ["RuntimeApi", "secret_memfd"]

_REPLY_MAX_BYTES = 256 * 1024


def secret_memfd(name: str, content: bytes) -> int:
    """Return an inheritable memory file; it can be reopened by /dev/fd/N in a child.

    Raises: HostError.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        os.write(fd, content)
        # The front reads it under another uid; nobody else can reach the descriptor.
        os.fchmod(fd, 0o444)
    except OSError as exc:
        raise HostError.of("memfd_create", name, exc) from exc
    return fd


class RuntimeApi:
    """Commands to a running front through its admin socket, a path that only root may use."""

    def __init__(self, path: str) -> None:
        self.path = path

    def listen(self) -> socket.socket:
        """Make the admin socket, to be handed to the front.

        Raises: HostError.
        """
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if os.path.exists(self.path):
                os.unlink(self.path)
            made.bind(self.path)
            os.chmod(self.path, 0o600)
            made.listen(16)
        except OSError as exc:
            made.close()
            raise HostError.of("listen", self.path, exc) from exc
        return made

    async def command(self, line: str) -> str:
        """Send one command and return its answer.

        Raises: NotReadyError if the front does not answer, or says the command failed.
        """
        try:
            with trio.fail_after(5):
                async with await trio.open_unix_socket(self.path) as stream:
                    await stream.send_all(line.encode() + b"\n")
                    data = b""
                    while chunk := await stream.receive_some(65536):
                        data += chunk
                        if len(data) > _REPLY_MAX_BYTES:
                            break
        except (OSError, trio.TooSlowError, trio.BrokenResourceError) as exc:
            raise NotReadyError("the front's admin socket does not answer") from exc
        return data.decode(errors="replace").strip()

    async def activate(self, slot: str, *, others: tuple[str, ...]) -> None:
        """Route new streams to `slot`, then none to the others.

        Raises: NotReadyError.
        """
        await self._set_state(slot, "ready")
        for other in others:
            await self._set_state(other, "drain")

    async def disable(self, slot: str) -> None:
        """Take a slot whose server is gone out of rotation.

        Raises: NotReadyError.
        """
        await self._set_state(slot, "maint")

    async def _set_state(self, slot: str, state: str) -> None:
        for backend in BACKENDS:
            answer = await self.command(f"set server {backend}/{slot} state {state}")
            if answer and not _unknown(answer, backend):
                raise NotReadyError(
                    f"the front refuses server {slot} state {state}: {answer}"
                )

    async def streams(self, slot: str) -> int:
        """Return how many streams go to `slot` now.

        Raises: NotReadyError.
        """
        counts = [await self._streams(backend, slot) for backend in BACKENDS]
        return sum(counts)

    async def _streams(self, backend: str, slot: str) -> int:
        table = await self.command(f"show stat {backend} 4 -1")
        if _unknown(table, backend):
            return 0
        rows = [row.split(",") for row in table.splitlines() if row]
        if not rows:
            raise NotReadyError("the front shows no statistics")
        column = rows[0].index("scur")
        for row in rows[1:]:
            if row[1] == slot:
                return int(row[column] or 0)
        raise NotReadyError(f"the front knows no server {slot}")


def _unknown(answer: str, backend: str) -> bool:
    """Say whether a front that an older program started has no such backend."""
    return backend != BACKENDS[0] and answer.startswith(("No such", "Can't find"))
