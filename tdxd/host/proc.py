"""Child processes: started in a cell under another uid, awaited by pidfd, stopped in order.

`nsenter` and `setpriv` (util-linux) change namespaces, uid and capabilities, then exec the
program: 2 ms, and no code of ours runs between fork and exec. A child dies with the daemon
(PDEATHSIG). That signal fires when the *thread* that started the child ends, so children are
started in the main thread only. Source: prctl(2), PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Sequence

import trio

from tdxd.errors import HostError
from tdxd.host import netns
from tdxd.host.ports import Cell, Child, ChildSpec

__all__ = ["CellChildren", "Process"]

_MAX_LINE_BYTES = 8192
_INHERITED_ENV = ("PATH", "LANG", "TZ")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Process:
    """A child in its own session; implements `ports.Child`."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes]) -> None:
        assert popen.stdout is not None
        self.name = name
        self._popen = popen
        self._pidfd = os.pidfd_open(popen.pid)
        self._output = trio.lowlevel.FdStream(os.dup(popen.stdout.fileno()))
        popen.stdout.close()
        self._ended = False

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    async def wait(self) -> int:
        """Wait for its end; return the exit status, negative for a signal."""
        await self._until_ended()
        self._reap()
        return self._popen.wait()

    async def _until_ended(self) -> None:
        """Wait for the pidfd; on a copy, since trio lets one task wait for a descriptor."""
        if self._ended:
            return
        pidfd = os.dup(self._pidfd)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def _reap(self) -> None:
        """Collect the status, and end what the child left running in its session."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()
            os.close(self._pidfd)

    async def stop(self, timeout_s: float, *, signal: int = signal.SIGTERM) -> int:
        """Signal it, wait `timeout_s`, then SIGKILL its group; return the status."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._popen.pid, signal)
            with trio.move_on_after(timeout_s):
                await self._until_ended()
            self.kill()
        return self._popen.wait()

    def kill(self) -> None:
        """End it and all of its session at once."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)
            self._reap()

    async def lines(self) -> AsyncIterator[str]:
        """Yield each line of its stdout and stderr until it closes them."""
        buffer = b""
        async with self._output:
            while data := await self._output.receive_some(65536):
                *whole, buffer = (buffer + data).split(b"\n")
                for line in whole:
                    yield line[:_MAX_LINE_BYTES].decode(errors="replace")
                buffer = buffer[:_MAX_LINE_BYTES]
        if buffer:
            yield buffer.decode(errors="replace")


class CellChildren:
    """Starts children in cells; implements `ports.Children`."""

    def __init__(self) -> None:
        self._net_fd = -1

    def make_cell(self, *, hide: str, binds: Sequence[tuple[str, str]]) -> Cell:
        """Make a cell (see `ports.Children`); its network is shared by all.

        Raises: HostError.
        """
        if self._net_fd < 0:
            self._net_fd = netns.make_network()
        return netns.make_cell(net_fd=self._net_fd, hide=hide, binds=binds)

    def spawn(self, spec: ChildSpec) -> Child:
        """Start a child as `spec.user`, without capabilities, its output in one pipe.

        Raises: HostError if nsenter, setpriv or the user does not exist.
        """
        assert threading.current_thread() is threading.main_thread()
        assert isinstance(spec.cell, netns.NamespaceCell)
        cell_fds = (spec.cell.mount_fd, spec.cell.net_fd)
        try:
            argv = [*_enter(*cell_fds), *_drop(spec.user), "--", *spec.argv]
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(*cell_fds, *spec.pass_fds),
                env=_environment(spec),
                cwd="/",
                umask=0,  # its socket must be reachable by uid 0 without capabilities
                start_new_session=True,
            )
        except OSError as exc:
            spec.cell.close()
            raise HostError.of("start", spec.name, exc) from exc
        except HostError:
            spec.cell.close()
            raise
        return Process(spec.name, popen)

    def close(self) -> None:
        """Let go of the shared network namespace; harmless when repeated."""
        if self._net_fd >= 0:
            os.close(self._net_fd)
            self._net_fd = -1


def _enter(mount_fd: int, net_fd: int) -> list[str]:
    return [
        "nsenter",
        f"--net=/proc/self/fd/{net_fd}",
        f"--mount=/proc/self/fd/{mount_fd}",
    ]


def _drop(user: str) -> list[str]:
    uid, gid = user_ids(user)
    return [
        "setpriv",
        f"--reuid={uid}",
        f"--regid={gid}",
        "--clear-groups",
        "--no-new-privs",
        "--bounding-set=-all",
        "--inh-caps=-all",
        "--pdeathsig=KILL",
    ]


def user_ids(user: str) -> tuple[int, int]:
    """Return (uid, gid) of a user name.

    Raises: HostError, with a hint, if there is no such user or it is root.
    """
    import pwd

    try:
        entry = pwd.getpwnam(user)
    except KeyError as exc:
        hint = "create it (systemd-sysusers), or name another in serving.user"
        raise HostError("look up user", user, 0, hint=hint) from exc
    if entry.pw_uid == 0:
        raise HostError(
            "run a model server as", user, 0, hint="name a user other than root"
        )
    return entry.pw_uid, entry.pw_gid


def _environment(spec: ChildSpec) -> dict[str, str]:
    """Build the environment from an allow-list: nothing of the daemon's own leaks through."""
    kept = {name: os.environ[name] for name in _INHERITED_ENV if name in os.environ}
    return {"PATH": _DEFAULT_PATH, **kept, "HOME": "/nonexistent", **spec.env}
