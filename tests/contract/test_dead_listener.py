"""A listening socket is one for all who inherited it: who shuts it down does so for the daemon."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tdxd.guest.listener import Listener

TURN_ROUND = """
import ctypes, socket, sys
sock = socket.socket(fileno=int(sys.argv[1]))
if sys.argv[2] == "shutdown":
    sock.shutdown(socket.SHUT_RDWR)
else:
    ctypes.CDLL(None).connect(sock.fileno(), bytes(16), 16)  # AF_UNSPEC
"""


def sound(listener: Listener) -> bool:
    """Ask anew each time."""
    return listener.sound


@pytest.mark.parametrize("how", ["shutdown", "connect"])
def test_one_that_a_child_ended_is_seen_and_made_anew(how: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    listener = Listener()
    fd = listener.at(address).fileno()
    assert sound(listener)
    argv = [sys.executable, "-I", "-c", TURN_ROUND, str(fd), how]
    subprocess.run(argv, pass_fds=[fd], check=True, timeout=60)
    assert not sound(listener)
    host, port = listener.at(address).getsockname()
    assert f"{host}:{port}" == address
    assert sound(listener)
    socket.create_connection((host, port), timeout=5).close()
    listener.close()
