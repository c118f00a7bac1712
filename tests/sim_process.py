"""Runs `tdx-sim run` as a person would, and stops it."""

from __future__ import annotations

import contextlib
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAIN = (
    "import sys; sys.path.insert(0, sys.argv.pop(1));"
    "from tdxd.cli.tdx_sim import main; sys.exit(main())"
)
READY_TIMEOUT_S = 20.0


def sim_command(*arguments: str | Path) -> list[str]:
    words = [str(argument) for argument in arguments]
    return [sys.executable, "-I", "-c", MAIN, str(ROOT), *words]


class RunningSim:
    """`ready` holds the words of the ready line: pccs, tsm, ccel."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], READY_TIMEOUT_S)
        line = process.stdout.readline() if readable else ""
        if not line.startswith("ready"):
            process.kill()
            raise AssertionError(f"tdx-sim is not ready: {process.communicate()}")
        words = line.split()[1:]
        self.ready = dict(word.split("=", 1) for word in words)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal it, wait, return the exit code and what it said on stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=READY_TIMEOUT_S)
        return self.process.returncode, errors


@contextlib.contextmanager
def running_sim(directory: Path, *arguments: str | Path) -> Iterator[RunningSim]:
    """Run the simulator of `directory` for the time of a with block."""
    process = subprocess.Popen(
        sim_command("run", directory, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    sim = None
    try:
        sim = RunningSim(process)
        yield sim
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=READY_TIMEOUT_S)
