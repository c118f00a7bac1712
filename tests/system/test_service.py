"""tdxd as a service: what it tells the service manager, and the socket it is given."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.world import BIN, World, ok, our_loops, program, toml, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(15)

    def until(self, wanted: str) -> list[str]:
        """Return the lines of the datagram that holds `wanted`."""
        while True:
            lines = self.socket.recv(65536).decode().splitlines()
            if any(line.startswith(wanted) for line in lines):
                return lines


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.socket.close()


def test_every_notification(world: World, manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "600000"}
    with world.daemon(env=env, volume=[]) as daemon:
        manager.until("READY=1")
        manager.until("WATCHDOG=1")
        manager.until("WATCHDOG=1")
        os.kill(daemon.process.pid, signal.SIGHUP)
        reloading = manager.until("RELOADING=1")
        assert [line.split("=")[0] for line in reloading] == [
            "RELOADING",
            "MONOTONIC_USEC",
        ]
        manager.until("READY=1")
        os.kill(daemon.process.pid, signal.SIGTERM)
        manager.until("STOPPING=1")


def test_status_text_names_what_is_missing(world: World, manager: Manager) -> None:
    env = {"NOTIFY_SOCKET": str(manager.path)}
    missing = [{"id": "m", "image": str(world.directory / "none.img")}]
    with world.daemon(env=env, volume=missing):
        assert manager.until("STATUS=") == ["STATUS=volume m is absent"]


def test_the_watchdog_is_not_fed_while_the_daemon_hangs(
    world: World, manager: Manager
) -> None:
    env = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "600000"}
    with world.daemon(env=env, volume=[]) as daemon:
        manager.until("WATCHDOG=1")
        os.kill(daemon.process.pid, signal.SIGSTOP)
        manager.socket.settimeout(0)
        try:
            while True:
                manager.socket.recv(65536)
        except BlockingIOError:
            pass
        manager.socket.settimeout(1.5)
        with pytest.raises(TimeoutError):
            manager.until("WATCHDOG=1")
        os.kill(daemon.process.pid, signal.SIGCONT)


def test_a_socket_that_systemd_made_is_used(world: World, tmp_path: Path) -> None:
    path = tmp_path / "activated.sock"
    runtime = Path("/run") / f"tdxd-activated-{os.getpid()}"
    config = tmp_path / "tdxd.toml"
    control = {"socket": str(tmp_path / "unused.sock"), "runtime_dir": str(runtime)}
    config.write_text(toml(world.config(volume=[], control=control)))
    code = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3);"
        "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1');"
        "os.environ['LISTEN_FDNAMES'] = 'control'; os.execv(sys.argv[2], sys.argv[2:])"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        argv = [sys.executable, "-c", code, str(listener.fileno()), str(BIN / "tdxd")]
        process = subprocess.Popen(
            [*argv, "--config", str(config)],
            pass_fds=[listener.fileno()],
            stderr=subprocess.DEVNULL,
        )
        try:
            done = program("tdxctl", "--socket", path, "version")
            assert done.returncode == 0, done.stderr
            assert not (tmp_path / "unused.sock").exists()
        finally:
            process.terminate()
            assert process.wait(30) == 0
        assert path.exists()  # it is systemd's, not ours


def test_what_a_killed_daemon_left_is_swept(world: World) -> None:
    """SIGKILL: children, mounts and loop devices go with it or at the next start."""
    runtime = Path("/run") / f"tdxd-system-{os.getpid()}"
    with world.key_server():
        with world.daemon(killed=True) as daemon:
            daemon.until_volume("mounted")
            assert our_loops()
        config = world.directory / "tdxd.toml"
        assert program("tdxd", "--config", config, "--sweep").returncode == 0
        wait_for(lambda: not our_loops(), "no loop device")
        assert str(runtime) not in Path("/proc/mounts").read_text()
        with world.daemon() as daemon:  # over the stale socket and directory
            daemon.until_volume("mounted")


def test_check_config(world: World) -> None:
    path = world.directory / "tdxd.toml"
    path.write_text(toml(world.config()))
    assert ok("tdxd", "--config", path, "--check-config").endswith("ok, 1 volumes\n")
