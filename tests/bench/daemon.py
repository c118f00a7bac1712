"""The daemon's start, tdxctl's whole run, and the daemon's memory."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdxd.core import wire
from tests.bench.measure import Paired, paired, rss_bytes, run_process
from tests.bench.served import serving_daemon

__all__ = ["rows"]

BIN = Path(sys.executable).parent
_PATIENCE_S = 30.0
_POLL_S = 0.001
_MIB = 2**20
_MEMORY = "tdxd: resident memory while serving, MiB"
_CONFIG = """\
[key_release]
servers = ["127.0.0.1:1"]
ca = "{directory}/ca.pem"
signing_key = "ed25519:{key}"

[[volume]]
id = "model"
image = "{directory}/model.img"

[control]
socket = "{directory}/tdxd.sock"
runtime_dir = "{directory}/run"

[security]
accept_unmeasured = true
accept_swap = true
"""


def rows() -> list[dict[str, Any]]:
    """Measure the three budgets of the daemon."""
    if os.geteuid() != 0:
        raise RuntimeError("tdxd runs as root")
    found = [_tdxctl_row(), _start_row()]
    try:
        found.append(_memory_row())
    except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as exc:
        reason = str(exc).strip().splitlines() or [type(exc).__name__]
        found.append(
            {
                "name": _MEMORY,
                "measured": None,
                "budget": 72,
                "ok": None,
                "detail": reason[-1],
            }
        )
    return found


# --- a daemon that serves nothing ---------------------------------------------


class RunningDaemon:
    """A `tdxd` with one volume, over whose socket it is asked."""

    def __init__(self, directory: Path, process: subprocess.Popen[bytes]) -> None:
        self.socket_path = str(directory / "tdxd.sock")
        self.pid = process.pid
        self._log = directory / "log"
        self._process = process

    def status(self) -> dict[str, Any]:
        """Ask for the status, once the socket is there."""
        with self._connect() as sock:
            sock.sendall(wire.encode_frame(wire.request("status", {})))
            reader = wire.FrameReader()
            while data := sock.recv(65536):
                for message in reader.feed(data):
                    result = message.get("result")
                    if isinstance(result, dict):
                        return result
        raise RuntimeError(f"tdxd gave no status: {self._log.read_text()}")

    def _connect(self) -> socket.socket:
        deadline_s = time.monotonic() + _PATIENCE_S
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(_PATIENCE_S)
            try:
                sock.connect(self.socket_path)
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
            else:
                return sock
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                said = self._log.read_text().strip().splitlines() or ["nothing"]
                raise RuntimeError(f"tdxd does not answer; it said: {said[-1]}")
            time.sleep(_POLL_S)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def work_directory() -> Iterator[Path]:
    """Yield a directory that holds a configuration, whose volume has no image."""
    with tempfile.TemporaryDirectory(prefix="tdxd-bench-") as name:
        directory = Path(name)
        key = "A" * 43 + "="
        text = _CONFIG.format(directory=directory, key=key)
        (directory / "tdxd.toml").write_text(text)
        yield directory


@contextlib.contextmanager
def running_daemon(directory: Path) -> Iterator[RunningDaemon]:
    """Run the installed `tdxd` for the time of a with block; it may not answer yet."""
    command = [_installed("tdxd"), "--config", str(directory / "tdxd.toml")]
    with open(directory / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    daemon = RunningDaemon(directory, process)
    try:
        yield daemon
    finally:
        daemon.stop()


def _installed(program: str) -> str:
    path = BIN / program
    if not path.exists():
        raise RuntimeError(f"{path} is not installed: make setup")
    return str(path)


# --- the rows -----------------------------------------------------------------


def _wall_s(*argv: str) -> Callable[[], float]:
    return lambda: run_process(argv).wall_s


def _row(name: str, ratio: Paired, budget: float, detail: str) -> dict[str, Any]:
    return {
        "name": name,
        "measured": round(ratio.ratio, 2),
        "budget": budget,
        "ok": ratio.ratio <= budget,
        "detail": f"{detail}; {ratio.spread()}",
    }


def _ms(value_s: float) -> str:
    return f"{value_s * 1000:.1f} ms"


def _tdxctl_row() -> dict[str, Any]:
    system_python = _wall_s("/usr/bin/python3", "-c", "pass")
    with work_directory() as directory, running_daemon(directory) as daemon:
        daemon.status()
        tdxctl = _wall_s(_installed("tdxctl"), "--socket", daemon.socket_path, "status")
        seen = paired(tdxctl, _wall_s(sys.executable, "-c", "pass"), pairs=31)
        other_s = statistics.median(system_python() for _ in range(11))
    detail = (
        f"tdxctl {_ms(seen.first)}, this python3 {_ms(seen.second)}, "
        f"/usr/bin/python3 {_ms(other_s)}"
    )
    return _row("tdxctl status / python3 -c pass", seen, 4.0, detail)


def _start_row() -> dict[str, Any]:
    with work_directory() as directory:
        seen = paired(
            lambda: _answer_s(directory),
            _wall_s(sys.executable, "-S", "-c", "pass"),
            pairs=15,
        )
    detail = f"tdxd {_ms(seen.first)}, python3 -S {_ms(seen.second)}"
    return _row("tdxd: exec to first answer / python3 -S -c pass", seen, 45.0, detail)


def _answer_s(directory: Path) -> float:
    start_s = time.perf_counter()
    with running_daemon(directory) as daemon:
        daemon.status()
        return time.perf_counter() - start_s


def _memory_row() -> dict[str, Any]:
    budget_bytes = 72 * _MIB
    with serving_daemon() as daemon:
        used_bytes = rss_bytes(daemon.process.pid)
        state = daemon.status()["serving"]["state"]
    return {
        "name": _MEMORY,
        "measured": round(used_bytes / _MIB, 1),
        "budget": budget_bytes // _MIB,
        "ok": used_bytes <= budget_bytes,
        "detail": f"children apart; key fetched, one volume mounted, serving {state}",
    }
