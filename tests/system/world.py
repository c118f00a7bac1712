"""The whole system as programs: simulated platform, key server, images, daemon."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tdxd.core import wire

__all__ = ["Daemon", "World", "free_port", "our_loops"]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
OURS = ("m", "other", "roll", "more", *(f"ten{number}" for number in range(10)))
"""The ids of all volumes that these tests open."""
START_S = 60.0
"""Generous: machines that run tests stall."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def our_loops() -> list[str]:
    """Loop devices of this world's volumes, by the name of their backing memory file."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = path.read_text()
        except OSError:
            continue
        if any(f"tdxd:{name}:" in text for name in OURS):
            found.append(path.parent.parent.name)
    return found


def wait_for(
    condition: Callable[[], bool], what: str, timeout_s: float = START_S
) -> None:
    """Poll a condition of another process, with a limit."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)


def program(name: str, *args: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run an installed program to its end."""
    argv = [str(BIN / name), *map(str, args)]
    return subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=200, **more
    )


def ok(name: str, *args: object) -> str:
    """Run a program that must succeed; return its output."""
    done = program(name, *args)
    assert done.returncode == 0, f"{name} {args}: {done.stderr}"
    return done.stdout


@contextmanager
def background(
    name: str, *args: object, log: Path
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a program that prints a line starting with `ready`; end it with SIGTERM."""
    argv = [str(BIN / name), *map(str, args)]
    with log.open("a") as stderr:
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready"), f"{name}: {line!r} {log.read_text()}"
        yield process, line
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


class Daemon:
    """A running tdxd."""

    def __init__(
        self, process: subprocess.Popen[bytes], socket_path: Path, log: Path
    ) -> None:
        self.process, self.socket_path, self.log = process, socket_path, log

    def ctl(self, *args: object, **more: Any) -> subprocess.CompletedProcess[str]:
        return program("tdxctl", "--socket", self.socket_path, *args, **more)

    def reexec(self) -> dict[str, Any]:
        """Have the program replaced; return what tdxctl says."""
        done = self.ctl("reexec", "--json")
        assert done.returncode == 0, done.stderr + self.log.read_text()[-2000:]
        shown: dict[str, Any] = json.loads(done.stdout)
        return shown

    def status(self) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.ctl("status", "--json").stdout)
        return shown

    def volume(self) -> dict[str, Any]:
        shown: dict[str, Any] = self.status()["volumes"][0]
        return shown

    def until_volume(self, *states: str) -> dict[str, Any]:
        wait_for(
            lambda: self.volume()["state"] in states,
            f"volume {states}: {self.volume()}",
        )
        return self.volume()

    def until_serving(self, *states: str) -> dict[str, Any]:
        def there() -> bool:
            return self.status()["serving"]["state"] in states

        wait_for(there, f"serving {states}; {self.log.read_text()[-2000:]}", 180)
        serving: dict[str, Any] = self.status()["serving"]
        return serving

    def raw(self, data: bytes) -> dict[str, Any]:
        """Send bytes to the control socket; return the last reply."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(self.socket_path))
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            reader, last = wire.FrameReader(), {}
            while received := sock.recv(65536):
                for message in reader.feed(received):
                    last = message
        return last


class World:
    """A directory with one platform, one key server store and some sealed images."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sim_ready: dict[str, str] = {}
        self.port = free_port()
        self.pin: dict[str, Any] = {}

    # --- the owner's side ---

    def make_saved_model(self) -> None:
        """Make two models, in a process of its own: that imports TensorFlow."""
        program = ROOT / "tests/system/make_model.py"
        subprocess.run(
            [sys.executable, program, self.saved_model, self.next_model],
            check=True,
            capture_output=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )

    @property
    def saved_model(self) -> Path:
        return self.directory / "saved_model"

    @property
    def next_model(self) -> Path:
        """One of the same inputs that answers otherwise."""
        return self.directory / "next_model"

    def make_certificate(self, name: str) -> None:
        """Make the front's certificate and key, `server.pem`, and its CA, `ca.pem`."""
        files = ("-o", self.directory / "server.pem")
        ok("tdx-seal", "cert", name, *files, "--cert-out", self.directory / "ca.pem")

    def seal(
        self, source: Path, name: str, *, generation: int, volume_id: str = "m"
    ) -> Path:
        """Seal a directory as NAME.img and NAME.bundle."""
        image = self.directory / f"{name}.img"
        args = ("--id", volume_id, "--generation", generation, "-o", image)
        ok(
            "tdx-seal",
            "create",
            source,
            *args,
            "--bundle",
            self.directory / f"{name}.bundle",
        )
        return image

    def make_directory(self, name: str, *, version: str = "1") -> Path:
        """Copy the model and a certificate into a directory ready to be sealed."""
        directory = self.directory / name
        target = directory / "models" / "line"
        target.mkdir(parents=True)
        shutil.copytree(self.saved_model, target / version)
        (directory / "tls").mkdir()
        shutil.copy(self.directory / "server.pem", directory / "tls" / "server.pem")
        return directory

    def allow(self, *names: str) -> None:
        """Give bundles to the key server, for this platform alone."""
        policy = self.directory / "policy.toml"
        policy.write_text(ok("tdx-sim", "measurements", self.directory / "sim"))
        for name in names:
            bundle = self.directory / f"{name}.bundle"
            ok("tdx-keyd", "add", self.directory / "keys", bundle, "--policy", policy)

    @contextmanager
    def simulator(self, name: str = "sim", *, device: bool = True) -> Iterator[None]:
        """Run the platform; its device below `NAME-mnt`, or its PCCS alone."""
        mount = self.directory / f"{name}-mnt"
        mount.mkdir(exist_ok=True)
        what = ("--mount", mount) if device else ("--pccs-only",)
        args = ("run", self.directory / name, "--pccs", "127.0.0.1:0", *what)
        log = self.directory / "sim.log"
        with background("tdx-sim", *args, log=log) as (_process, line):
            self.sim_ready = dict(word.split("=", 1) for word in line.split()[1:])
            yield

    @contextmanager
    def key_server(self, store: str = "keys") -> Iterator[subprocess.Popen[str]]:
        log = self.directory / "keyd.log"
        with background("tdx-keyd", "serve", self.directory / store, log=log) as (
            process,
            _line,
        ):
            yield process

    def init_key_server(
        self, store: str = "keys", *, name: str = "localhost"
    ) -> dict[str, Any]:
        root = ok("tdx-sim", "root", self.directory / "sim", "--der").strip()
        args = [
            *("--listen", f"127.0.0.1:{self.port}", "--simulated-root", root),
            *("--simulated-collateral-url", self.sim_ready["pccs"]),
        ]
        text = ok(
            "tdx-keyd",
            "init",
            self.directory / store,
            "--json",
            "--name",
            name,
            *args,
        )
        pin: dict[str, Any] = json.loads(text)
        return pin

    # --- the guest's side ---

    def config(self, **changes: Any) -> dict[str, Any]:
        """A daemon's configuration as TOML tables; `changes` replace whole tables."""
        tables: dict[str, Any] = {
            "key_release": {
                "servers": [f"localhost:{self.port}"],
                "ca": self.pin["ca"],
                "signing_key": self.pin["signing_key"],
                "timeout_s": 10,
                "backoff_max_s": 0.5,
            },
            # One platform runs for many daemons and key servers here, as no TD does: what one of
            # them served would stand in the evidence of all others.
            "platform": {"tsm": self.sim_ready["tsm"], "extend": "never"},
            "volume": [{"id": "m", "image": str(self.directory / "m.img")}],
            "security": {"accept_unmeasured": True, "accept_swap": True},
        }
        if "ccel" in self.sim_ready:
            tables["platform"]["event_log"] = self.sim_ready["ccel"]
        return {**tables, **changes}

    @contextmanager
    def daemon(
        self,
        *,
        env: dict[str, str] | None = None,
        killed: bool = False,
        program: Path = BIN / "tdxd",
        **changes: Any,
    ) -> Iterator[Daemon]:
        """Run tdxd; at the end nothing of it may be left."""
        run = Path("/run") / f"tdxd-system-{os.getpid()}"
        control = {"socket": f"{run}.sock", "runtime_dir": str(run)}
        tables = self.config(**{"control": control, **changes})
        path = self.directory / "tdxd.toml"
        path.write_text(toml(tables))
        log = self.directory / "tdxd.log"
        with log.open("w") as output:
            argv = [str(program), "--config", str(path)]
            process = subprocess.Popen(
                argv, stderr=output, env={**os.environ, **(env or {})}
            )
        daemon = Daemon(process, Path(control["socket"]), log)
        try:
            wait_for(
                lambda: (
                    daemon.ctl("version").returncode == 0 or process.poll() is not None
                ),
                "the control socket",
            )
            assert process.poll() is None, log.read_text()
            yield daemon
        finally:
            process.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
            process.wait(120)
        if not killed:
            assert process.returncode == 0, log.read_text()
            self.assert_nothing_left(run)

    @staticmethod
    def assert_nothing_left(run: Path) -> None:
        wait_for(lambda: not our_loops(), f"loop devices {our_loops()}", 5)
        assert not run.exists()
        assert not Path(f"{run}.sock").exists()
        assert str(run) not in Path("/proc/mounts").read_text()
        left = subprocess.run(
            ["pgrep", "-f", f"{run}/"], capture_output=True, text=True, check=False
        )
        assert left.stdout == ""


def toml(tables: dict[str, Any]) -> str:
    """Write the few shapes that the daemon's configuration has."""
    lines: list[str] = []
    for name, table in tables.items():
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in one.items()]
    return "\n".join(lines) + "\n"
