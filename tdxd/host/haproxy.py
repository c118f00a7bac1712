"""The front's runtime API, and the memory files that carry its certificate.

A certificate with its key is a memfd: it has no name on a disk.
Source: HAProxy 2.6 management guide §9.3.
"""

from __future__ import annotations

import contextlib
import os
import socket

import trio

from tdxd.errors import DataError, HostError, NotReadyError
from tdxd.host.haproxy_config import BACKENDS

__all__ = ["PAYLOAD_MAX_BYTES", "RuntimeApi", "secret_memfd"]

PAYLOAD_MAX_BYTES = 15_000
"""A command with its payload must fit into one buffer of 16 KiB, less what HAProxy needs of it."""
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

    async def command(self, line: str, payload: bytes = b"") -> str:
        """Send one command and return its answer; a payload has no empty line.

        Raises: NotReadyError if the front does not answer.
        """
        sent = line.encode() + (b" <<\n" + payload if payload else b"") + b"\n"
        try:
            with trio.fail_after(5):
                async with await trio.open_unix_socket(self.path) as stream:
                    await stream.send_all(sent)
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

    async def set_certificates(
        self, certificate: bytes, client_ca: bytes | None
    ) -> None:
        """Show another certificate on new connections, and ask clients for another authority's.

        Both are PEM without empty lines, the certificate with its key. All or nothing: if one is
        refused the old ones stay in use.

        Raises: DataError in the front's words if it refuses one, NotReadyError.
        """
        changes = [("cert", await self._name_of("cert"), certificate)]
        if client_ca is not None:
            changes.insert(0, ("ca-file", await self._name_of("ca-file"), client_ca))
        try:
            for kind, name, pem in changes:
                await self._change(f"set ssl {kind} {name}", "ransaction ", pem)
            for kind, name, _pem in changes:
                await self._change(f"commit ssl {kind} {name}", "Success!")
        except BaseException:
            with trio.CancelScope(shield=True):
                for kind, name, _pem in changes:
                    with contextlib.suppress(NotReadyError):
                        await self.command(f"abort ssl {kind} {name}")
            raise

    async def _name_of(self, kind: str) -> str:
        """Return the name under which its configuration has its only certificate or authority."""
        lines = (await self.command(f"show ssl {kind}")).splitlines()
        # "*" stands before a change that is not committed.
        names = {one.lstrip("*").split(" ")[0] for one in lines if one}
        ours = [one for one in names if one.startswith("/")]
        if len(ours) != 1:
            raise NotReadyError(f"the front shows {len(ours)} names of a {kind}, not 1")
        return ours[0]

    async def _change(self, command: str, success: str, payload: bytes = b"") -> None:
        answer = await self.command(command, payload)
        if success not in answer:
            said = " ".join(answer.split())[:300] or "nothing"
            raise DataError(f"the front refuses to {command}: it said {said}")

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
