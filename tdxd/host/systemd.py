"""systemd: readiness, status text, watchdog and socket activation.

Source: sd_notify(3), sd_listen_fds(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import os
import socket
import time

__all__ = ["Notifier", "adopt_environment"]

_LISTEN_FDS_START = 3


class Notifier:
    """Sends state to the service manager; does nothing where there is none."""

    def __init__(self, address: str | None, watchdog_s: float | None) -> None:
        self._address = address
        self.watchdog_s = watchdog_s
        """Seconds within which WATCHDOG=1 must come; `None`: no watchdog."""

    def send(self, **state: str) -> None:
        """Send assignments such as READY="1" in one datagram.

        A service manager that is gone is no error: nobody is left to be told.
        """
        if not self._address:
            return
        path = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        text = "\n".join(f"{key}={value}" for key, value in state.items())
        with socket.socket(
            socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        ) as sock:
            try:
                sock.sendto(text.encode(), path)
            except OSError:
                return

    def reloading(self) -> None:
        """Announce a reload; must carry the time in the same datagram (sd_notify(3))."""
        now_us = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.send(RELOADING="1", MONOTONIC_USEC=str(now_us))


def adopt_environment() -> tuple[Notifier, dict[str, socket.socket]]:
    """Take what systemd passed, out of the environment: children must not inherit it.

    Returns the notifier and the passed sockets by FileDescriptorName.
    """
    take = os.environ.pop
    address = take("NOTIFY_SOCKET", None)
    watchdog_us, watchdog_pid = take("WATCHDOG_USEC", ""), take("WATCHDOG_PID", "")
    count, pid = take("LISTEN_FDS", ""), take("LISTEN_PID", "")
    names = take("LISTEN_FDNAMES", "").split(":")
    mine = str(os.getpid())
    watchdog_s = None
    if watchdog_us.isdigit() and watchdog_pid in ("", mine):
        watchdog_s = int(watchdog_us) / 1e6
    sockets = {}
    if count.isdigit() and pid == mine:
        for index in range(int(count)):
            name = names[index] if index < len(names) else f"unknown{index}"
            fd = _LISTEN_FDS_START + index
            os.set_inheritable(fd, False)
            sockets[name] = socket.socket(fileno=fd)
            sockets[name].setblocking(False)
    return Notifier(address, watchdog_s), sockets
