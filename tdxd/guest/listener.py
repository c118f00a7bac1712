"""Listening sockets: made once, and kept when a front is restarted or the program is replaced."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial

from tdxd.core.config import Address, Config, parse_address
from tdxd.errors import HostError
from tdxd.guest.handover import HandedListener, State

__all__ = ["Listener", "Listeners", "listen_tcp", "listen_unix"]

_BACKLOG = 1024


def listen_tcp(address: Address) -> socket.socket:
    """Return a listening TCP socket; `[::]` takes IPv4 as well.

    Raises: HostError, naming the address, with a hint if it is in use.
    """
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((address.host, address.port))
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        used = exc.errno == errno.EADDRINUSE
        hint = f"another program uses port {address.port}: ss -ltnp" if used else ""
        raise HostError.of("listen on", str(address), exc, hint=hint) from exc
    sock.setblocking(False)
    return sock


def listen_unix(path: str, group: str | None) -> socket.socket:
    """Return a listening Unix socket, mode 0660, for a group if it exists.

    Raises: HostError, with a hint if another daemon answers there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(mask)
        with contextlib.suppress(KeyError):
            os.chown(path, 0, grp.getgrnam(group or "").gr_gid)
            os.chmod(path, 0o660)
        sock.listen(16)
    except OSError as exc:
        sock.close()
        raise HostError.of("listen on", path, exc) from exc
    sock.setblocking(False)
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket nobody listens on.

    Raises: HostError if a daemon answers there.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
    hint = "another tdxd runs: tdxctl --socket " + path + " status"
    raise HostError("listen on", path, 98, hint=hint)


class Listener:
    """A listening socket that outlives those who serve on it, and the program itself.

    Its address is `HOST:PORT`, or the path of a Unix socket.
    """

    def __init__(self, handed: HandedListener | None = None) -> None:
        self._address = ""
        self._socket: socket.socket | None = None
        if handed is not None:
            self._adopt(handed)

    def _adopt(self, handed: HandedListener) -> None:
        """Take the socket of the program before this one; go without if it is none."""
        try:
            self._socket = socket.socket(fileno=handed.fd)
        except OSError:
            return
        self._address = handed.address
        self._socket.setblocking(False)
        if not self.sound:
            self.close()

    @property
    def sound(self) -> bool:
        """Whether it still listens, or there is none.

        It is one socket for all who inherited it: any of them can shut it down or disconnect it.
        """
        if self._socket is None:
            return True
        return bool(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))

    def at(
        self, address: str, make: Callable[[str], socket.socket] | None = None
    ) -> socket.socket:
        """Return the socket for an address: the one there is, or a new one, TCP by default.

        Raises: HostError.
        """
        if self._socket is None or self._address != address or not self.sound:
            self.close()
            self._socket = (make or _listen)(address)
            self._address = address
        return self._socket

    def hand_over(self) -> HandedListener | None:
        """Return what the program after this one needs, if there is a socket."""
        if self._socket is None:
            return None
        return HandedListener(address=self._address, fd=self._socket.fileno())

    def close(self) -> None:
        """Close the socket; harmless when repeated."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _listen(address: str) -> socket.socket:
    return listen_tcp(parse_address(address))


class Listeners:
    """The control and the health socket: of systemd, of the program before this one, or new.

    `passed` are systemd's by name, `control` among them if there is a socket unit.
    """

    def __init__(
        self, config: Config, passed: Mapping[str, socket.socket], handed: State | None
    ) -> None:
        """Listen where the configuration says.

        Raises: HostError.
        """
        if (
            handed
            and handed.control
            and handed.control.address != config.control.socket
        ):
            _unlink(handed.control.address)
        self._passed = passed
        self._control = Listener(handed.control if handed else None)
        self._health = Listener(handed.health if handed else None)
        self.evidence = Listener(handed.evidence if handed else None)
        """Of clients who ask through the front; made when the configuration wants it."""
        self.control = passed.get("control") or self._control.at(
            config.control.socket, partial(listen_unix, group=config.control.group)
        )
        self._path = config.control.socket
        self.health: socket.socket | None = None
        if config.health.listen is not None:
            self.health = self._health.at(config.health.listen)
        else:
            self._health.close()

    def hand_over(self) -> tuple[HandedListener | None, ...]:
        """Return the sockets for control, health and evidence, as far as they are ours."""
        listeners = (self._control, self._health, self.evidence)
        return tuple(one.hand_over() for one in listeners)

    def passed_fds(self) -> list[int]:
        """Return the descriptors of systemd's sockets."""
        return [one.fileno() for one in self._passed.values()]

    def close(self) -> None:
        """Remove the path of the control socket if it is ours."""
        if "control" not in self._passed:
            _unlink(self._path)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
