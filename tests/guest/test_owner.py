"""The key server as the owner runs it: from its package, as a sandboxed unit."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guest.observed import Observed

pytestmark = [pytest.mark.guest]

STORE = "/var/lib/tdx-keyd"
LISTEN = "127.0.0.1:50052"
HANDSHAKE = f"""
import socket, ssl
context = ssl.create_default_context(cafile="{STORE}/ca.pem")
with socket.create_connection(("127.0.0.1", 50052)) as plain:
    with context.wrap_socket(plain, server_hostname="keys.example") as sock:
        print(sock.version())
"""


@pytest.fixture(scope="module")
def installed() -> set[str]:
    """Which guests have the package already, by their directory."""
    return set()


@pytest.fixture
def owner(opened: Observed, installed: set[str]) -> Observed:
    """The guest with a key server of its own; the one that releases its key is elsewhere."""
    machine = opened.machine
    if str(machine.directory) not in installed:
        machine.run("dpkg --install /srv/more/tdxd-owner_*.deb", timeout_s=300)
        machine.run(f"tdx-keyd init {STORE} --name keys.example --listen {LISTEN}")
        installed.add(str(machine.directory))
    return opened


def test_it_runs_sandboxed(owner: Observed) -> None:
    machine = owner.machine
    machine.run("systemctl start tdx-keyd.service", timeout_s=120)
    try:
        assert machine.output("systemctl is-active tdx-keyd.service") == "active"
        shown = machine.output("systemctl show -P StatusText tdx-keyd.service")
        assert shown == f"listening on {LISTEN}"
        machine.write_file("/run/handshake.py", HANDSHAKE.encode())
        assert machine.output("/opt/tools/bin/python3 /run/handshake.py") == "TLSv1.3"
        assert machine.output(f"tdx-keyd list {STORE} --json") == "[]"
        user = machine.output("ps -o user= -p $(systemctl show -P MainPID tdx-keyd)")
        assert user == "tdx-keyd"
    finally:
        machine.run("systemctl stop tdx-keyd.service", timeout_s=60)


def test_its_exposure(owner: Observed, tell: Callable[[str], None]) -> None:
    command = "systemd-analyze security --no-pager --threshold=13 tdx-keyd.service"
    done = owner.machine.run(command, check=False)
    tell(done.stdout.splitlines()[-1].strip("→ "))
    assert done.code == 0, done.stdout
