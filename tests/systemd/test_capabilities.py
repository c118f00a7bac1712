"""The daemon can do its work with the capabilities of its unit, and with none of them less."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.systemd.units import settings

ROOT = Path(__file__).parents[2]
CAPABILITIES = " ".join(settings("tdxd.service", "CapabilityBoundingSet")).split()
PRIVILEGED_PORTS = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
REFUSED = re.compile(
    "operation not permitted|permission denied|the child says: CapBnd", re.IGNORECASE
)

pytestmark = pytest.mark.root


def free_privileged_port() -> int:
    for port in range(1023, 511, -1):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    pytest.skip("no port below 1024 is free")


def probe(directory: Path, capabilities: list[str]) -> subprocess.CompletedProcess[str]:
    names = [name.removeprefix("CAP_").lower() for name in capabilities]
    bounding = ",".join(["-all", *(f"+{name}" for name in names)])
    directory.chmod(0o755)
    argv = [
        "setpriv",
        f"--bounding-set={bounding}",
        "--inh-caps=-all",
        "--no-new-privs",
    ]
    argv += [sys.executable, "-m", "tests.systemd.probe"]
    return subprocess.run(
        [*argv, str(directory), str(free_privileged_port())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_they_are_enough(tmp_path):
    done = probe(tmp_path, CAPABILITIES)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("name", CAPABILITIES)
def test_each_is_needed(tmp_path, name):
    if name == "CAP_NET_BIND_SERVICE" and int(PRIVILEGED_PORTS.read_text()) <= 512:
        pytest.skip("this machine lets everybody listen on all ports")
    done = probe(tmp_path, [one for one in CAPABILITIES if one != name])
    assert done.returncode != 0
    assert done.stdout == ""
    assert REFUSED.search(done.stderr), done.stderr
