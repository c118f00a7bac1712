"""The key server tells the service manager when it listens and when it ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tdxd.core.config import parse_address
from tdxd.owner.server.init import InitOptions, init_store

ROOT = Path(__file__).parents[2]


def test_ready_means_that_it_listens(tmp_path):
    store = tmp_path / "store"
    options = InitOptions(names=("127.0.0.1",), listen="127.0.0.1:0")
    init_store(store, options, os.urandom)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        child = subprocess.Popen(
            [sys.executable, "-m", "tdxd.cli.tdx_keyd", "serve", str(store)],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            ready = manager.recv(4096).decode().splitlines()
            assert ready[0] == "READY=1"
            address = parse_address(ready[1].removeprefix("STATUS=listening on "))
            socket.create_connection((address.host, address.port), 10).close()
            child.send_signal(signal.SIGTERM)
            assert manager.recv(4096) == b"STOPPING=1"
            _out, err = child.communicate(timeout=30)
        finally:
            child.kill()
            child.communicate()
    assert child.returncode == 0, err
