"""The program that takes this one's place: tried out first, then executed with the state."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import NoReturn

import trio

from tdxd.errors import EX_CONFIG, ConfigError, HostError, ReexecError, TdxdError
from tdxd.guest.handover import (
    FORMAT,
    HandedDaemon,
    State,
    descriptors,
    encode_state,
)
from tdxd.guest.listener import Listeners
from tdxd.host import exec_in_place
from tdxd.host.exec_in_place import Program
from tdxd.host.systemd import Notifier

__all__ = ["Successor", "mount_namespace"]

_CHECK_S = 60.0


def mount_namespace() -> int:
    """Return the inode number that names this process's mount namespace."""
    return os.stat("/proc/self/ns/mnt").st_ino


class Successor:
    """What is now at the path of this program."""

    def __init__(
        self,
        program: Program,
        *,
        notifier: Notifier,
        listeners: Listeners,
        runtime_dir: str,
        mapper: str,
    ) -> None:
        self._program, self._notifier = program, notifier
        self._listeners = listeners
        self._runtime_dir, self._mapper = runtime_dir, mapper

    async def check(self) -> None:
        """Try out whether it starts with the configuration of now, and knows our state.

        Raises: ConfigError, ReexecError, HostError, with its own words.
        """
        argv = [*self._program.argv, "--check-handover", str(FORMAT)]
        path = self._program.path
        try:
            with trio.fail_after(_CHECK_S):
                done = await trio.run_process(
                    argv,
                    executable=path,
                    check=False,
                    capture_stderr=True,
                    stdout=subprocess.DEVNULL,
                )
        except OSError as exc:
            raise HostError.of("try out", path, exc) from exc
        except trio.TooSlowError as exc:
            raise ReexecError(f"{path} did not answer within {_CHECK_S:g} s") from exc
        if done.returncode != 0:
            raise _refusal(path, done.returncode, done.stderr.decode(errors="replace"))

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Callable[[HandedDaemon], NoReturn]]:
        """Hold signals back and tell the service manager; yields what executes the program."""
        self._notifier.reloading()
        try:
            with exec_in_place.held_signals() as caught_fd:
                yield lambda daemon: self._execute(daemon, caught_fd)
        finally:
            self._notifier.send(READY="1")

    def _execute(self, daemon: HandedDaemon, caught_fd: int) -> NoReturn:
        """Execute it.

        Raises: HostError, and everything is as before.
        """
        control, health, evidence = self._listeners.hand_over()
        state = State(
            runtime_dir=self._runtime_dir,
            mount_namespace=mount_namespace(),
            mapper=self._mapper,
            control=control,
            health=health,
            evidence=evidence,
            daemon=daemon,
        )
        fds = [*descriptors(state), *self._listeners.passed_fds()]
        if self._notifier.watchdog_s is not None:
            self._notifier.send(WATCHDOG="1")
        exec_in_place.replace(
            self._program, state=encode_state(state), fds=fds, caught_fd=caught_fd
        )


def _refusal(path: str, status: int, said: str) -> TdxdError:
    """Return the error of a program that does not start, in its words."""
    lines = [line for line in said.splitlines() if line.strip()]
    told = {"error": lines[-1] if lines else f"exit status {status}", "hint": ""}
    for line in lines:
        _, colon, text = line.partition("tdxd: ")
        kind, _, words = text.partition(": ")
        if colon and kind in told:
            told[kind] = words
    text = f"{path} cannot take over: {told['error']}"
    return (ConfigError if status == EX_CONFIG else ReexecError)(
        text, hint=told["hint"]
    )
