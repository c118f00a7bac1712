"""The whole story on one machine: train, seal, attest, serve, ask, tamper.

Prints each command as a person would type it, runs it, and cleans up. The TDX platform is
simulated by tdx-sim; every other part is the one that runs in the field.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
ENV = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3"}
BOLD, DIM, END = (
    ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")
)
TAMPERED_OFFSET = 16 * 1024 * 1024 + 12345


class DemoError(Exception):
    """A step did not do what it should."""


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n{BOLD}# {text}{END}", flush=True)


def run(command: str, *, expect: int = 0) -> str:
    """Print a command, run it, print what it says; return its standard output."""
    print(f"{DIM}${END} {command}", flush=True)
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=ENV, text=True, capture_output=True, check=False
    )
    for text in (done.stdout, done.stderr):
        if text.strip():
            print(text.rstrip(), flush=True)
    if done.returncode != expect:
        raise DemoError(f"exit code {done.returncode}, expected {expect}: {command}")
    return done.stdout


class Background:
    """Programs that were started and must be ended, last first."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def start(self, command: str, log: str, *, wait_ready: bool = True) -> str:
        """Print and start a command; return its `ready …` line."""
        print(f"{DIM}${END} {command} 2>{log} &", flush=True)
        with Path(log).open("w") as errors:
            process = subprocess.Popen(
                shlex.split(command),
                env=ENV,
                text=True,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self._running.append(process)
        if not wait_ready:
            return ""
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        print(line, flush=True)
        if not line.startswith("ready"):
            raise DemoError(f"{command} did not start: {Path(log).read_text()}")
        return line

    def stop(self) -> None:
        """End all in reverse order."""
        while self._running:
            process = self._running.pop()
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def free_port() -> int:
    """Return a TCP port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def write(path: str, text: str) -> None:
    """Show and write a file."""
    print(f"{DIM}${END} cat > {path} <<EOF\n{text.rstrip()}\nEOF", flush=True)
    Path(path).write_text(text)


def owner_seals() -> None:
    """On the owner's machine: train, make a certificate, seal."""
    say("The owner trains a model on handwritten digits")
    run(f"python {HERE}/train_digits.py training 2>train.log")
    say(
        "and seals it with the server's TLS key: an encrypted image, and a secret bundle"
    )
    run("mkdir -p sealed/tls && mv training/models sealed/")
    run("tdx-seal cert localhost -o sealed/tls/server.pem --cert-out ca.pem")
    run(
        "tdx-seal create sealed --id digits --generation 1 -o digits.img --bundle digits.bundle"
    )
    run("tdx-seal inspect digits.img")


def owner_releases(background: Background, port: int) -> tuple[str, str]:
    """Start the platform and the key server; return the ready line and the guest's pin."""
    say("No TDX machine is at hand: tdx-sim plays one, under a root CA of its own")
    run("tdx-sim init platform && mkdir device")
    command = "tdx-sim run platform --mount device --pccs 127.0.0.1:0"
    ready = background.start(command, "sim.log")
    pccs = dict(word.split("=", 1) for word in ready.split()[1:])["pccs"]
    say("The owner's key server releases the bundle to this guest alone")
    pin = run(
        f"tdx-keyd init keys --name localhost --listen 127.0.0.1:{port} "
        f"--simulated-root $(tdx-sim root --der platform) --simulated-collateral-url {pccs}"
    )
    run("tdx-sim measurements platform > policy.toml")
    run("tdx-keyd add keys digits.bundle --policy policy.toml")
    background.start("tdx-keyd serve keys", "keyd.log")
    return ready, pin


def guest_config(ready: str, pin: str, keyd_port: int, listen_port: int) -> str:
    """Return the daemon's configuration."""
    places = dict(word.split("=", 1) for word in ready.split()[1:])
    here = Path.cwd()
    event_log = f'event_log = "{places["ccel"]}"\n' if "ccel" in places else ""
    return f"""\
[key_release]
servers = ["localhost:{keyd_port}"]
ca = "{here}/keys/ca.pem"
signing_key = "{signing_key(pin)}"

[platform]
tsm = "{places["tsm"]}"
{event_log}rtmr = "{places["rtmr"]}"
runtime_log = "{here}/runtime-log"

[[volume]]
id = "digits"
image = "{here}/digits.img"

[serving]
listen = "127.0.0.1:{listen_port}"
user = "nobody"
drain_timeout_s = 1

[control]
socket = "{here}/tdxd.sock"
runtime_dir = "{here}/run"

[security]              # for trying out: nothing measures this machine
accept_unmeasured = true
accept_swap = true
"""


def signing_key(pin: str) -> str:
    """Find the pin in what tdx-keyd init printed."""
    words = pin.replace('"', " ").split()
    return next(word for word in words if word.startswith("ed25519:"))


def ask(port: int, started: float) -> str:
    """Send all held-out digits over TLS; return the figures."""
    say("A user asks over TLS, knowing nothing but the certificate")
    target = f"localhost:{port} --ca ca.pem --model digits"
    run(f"tdx-infer predict {target} --input training/digit.npy")
    first_s = time.monotonic() - started
    run(f"tdx-infer predict {target} --input training/images.npy --output answers.npy")
    figures = run(f"python {HERE}/check_answers.py training/heldout.npz answers.npy")
    run(
        f"tdx-infer bench {target} --input training/digit.npy --cnum 4 --loop 50 --quiet"
    )
    return f"{figures.strip()}, {first_s:.1f} s from tdxd start to first prediction"


def tamper() -> None:
    """Change the image as a hostile host would, and see it refused."""
    say("The host changes some bytes of the image: the next opening is refused")
    run("tdxctl --socket tdxd.sock unmount digits > /dev/null")
    change = f"dd of=digits.img bs=1 seek={TAMPERED_OFFSET} conv=notrunc status=none"
    run(f"printf tampered | {change}")
    run("tdxctl --socket tdxd.sock mount digits", expect=65)
    run("tdxctl --socket tdxd.sock status")


def story(background: Background) -> str:
    """Tell all of it; return the figures."""
    keyd_port, listen_port = free_port(), free_port()
    owner_seals()
    ready, pin = owner_releases(background, keyd_port)
    say(
        "In the guest: tdxd gets a quote, shows it, opens the image and serves the model"
    )
    write("tdxd.toml", guest_config(ready, pin, keyd_port, listen_port))
    started = time.monotonic()
    background.start("tdxd --config tdxd.toml", "tdxd.log", wait_ready=False)
    deadline = started + 20
    while not Path("tdxd.sock").exists():
        if time.monotonic() > deadline:
            raise DemoError(f"tdxd did not start: {Path('tdxd.log').read_text()}")
        time.sleep(0.02)
    run("tdxctl --socket tdxd.sock wait --timeout 90")
    run("tdxctl --socket tdxd.sock status")
    figures = ask(listen_port, started)
    tamper()
    say("SIGTERM closes everything in order")
    background.stop()
    run("! mount | grep -F $PWD")
    return figures


def main() -> int:
    """Run the demo in a directory of its own."""
    if os.geteuid() != 0:
        print(
            "demo: error: tdxd mounts and makes namespaces: run it as root",
            file=sys.stderr,
        )
        return 77
    directory = Path(tempfile.mkdtemp(prefix="tdxd-demo-", dir="/var/tmp"))
    directory.chmod(0o755)  # the model server runs as another user
    os.chdir(directory)
    print(f"demo: working in {directory}")
    background = Background()
    try:
        figures = story(background)
    except (DemoError, subprocess.TimeoutExpired) as exc:
        log = Path("tdxd.log")
        print(log.read_text()[-3000:] if log.exists() else "", file=sys.stderr)
        print(f"demo: error: {exc}", file=sys.stderr)
        return 1
    finally:
        background.stop()
        os.chdir("/")
        shutil.rmtree(directory, ignore_errors=True)
    print(f"\ndemo: ok {figures}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
