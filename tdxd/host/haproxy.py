"""The TLS front: HAProxy's configuration and its runtime API.

The front listens on sockets that the daemon made and hands down, so a restarted front loses
no queued connection. The certificate with its key is a memfd: it has no name on a disk.
Source: HAProxy 2.6 configuration manual §3.1, §4.2, §5.1, §5.2 and management guide §9.3.
"""

from __future__ import annotations

import dataclasses
import os
import socket

import trio

from tdxd.errors import HostError, NotReadyError

__all__ = ["FrontSpec", "RuntimeApi", "configuration", "secret_memfd", "server_address"]

_REPLY_MAX_BYTES = 256 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrontSpec:
    """Descriptors and paths that the configuration names.

    `active` is the slot that gets the streams at start: "a" or "b".
    """

    grpc_fd: int
    certificate_fd: int
    admin_fd: int
    serve_dir: str
    active: str
    drain_timeout_s: float


def server_address(serve_dir: str, slot: str) -> str:
    """Return the path of the model server's socket in a slot."""
    return f"{serve_dir}/{slot}/model.sock"


def configuration(spec: FrontSpec) -> str:
    """Return the configuration file; it holds no secret.

    Only inference and read-only status methods pass: TensorFlow Serving itself lets any client
    unload all models. A refused method gets gRPC status 12 (UNIMPLEMENTED), as if it did not
    exist; without a model server the status is 14 (UNAVAILABLE).
    """
    servers = "\n".join(
        f"    server {slot} unix@{server_address(spec.serve_dir, slot)} proto h2"
        + ("" if slot == spec.active else " disabled")
        for slot in ("a", "b")
    )
    hard_stop_s = max(1, round(spec.drain_timeout_s))
    return f"""\
global
    log fd@2 format raw daemon notice
    stats socket fd@{spec.admin_fd} level admin
    maxconn 4096
    hard-stop-after {hard_stop_s}s
    ssl-default-bind-options ssl-min-ver TLSv1.3
    tune.h2.initial-window-size 1048576

defaults
    mode http
    log global
    option dontlog-normal
    timeout connect 5s
    timeout client 10m
    timeout server 10m
    timeout http-request 10s
    timeout tunnel 1h

frontend grpc
    bind fd@{spec.grpc_fd} ssl crt /dev/fd/{spec.certificate_fd} alpn h2
    acl inference path_beg /tensorflow.serving.PredictionService/
    acl status path /tensorflow.serving.ModelService/GetModelStatus
    {_grpc_error(12, "method not allowed here")} unless inference or status
    {_grpc_error(14, "no model server is ready")} if {{ nbsrv(models) eq 0 }}
    default_backend models

backend models
{servers}
"""


def _grpc_error(status: int, message: str) -> str:
    """Answer as a gRPC server does that has only trailers to send.

    HAProxy sends no content type without a body; clients read the status all the same.
    Source: "gRPC over HTTP2", section Responses, Trailers-Only.
    """
    return (
        "http-request return status 200 "
        f'hdr grpc-status {status} hdr grpc-message "{message}"'
    )


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
        answer = await self.command(f"set server models/{slot} state {state}")
        if answer:
            raise NotReadyError(
                f"the front refuses server {slot} state {state}: {answer}"
            )

    async def streams(self, slot: str) -> int:
        """Return how many streams go to `slot` now.

        Raises: NotReadyError.
        """
        table = await self.command("show stat models 4 -1")
        rows = [row.split(",") for row in table.splitlines() if row]
        if not rows:
            raise NotReadyError("the front shows no statistics")
        column = rows[0].index("scur")
        for row in rows[1:]:
            if row[1] == slot:
                return int(row[column] or 0)
        raise NotReadyError(f"the front knows no server {slot}")
