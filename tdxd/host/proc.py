"""Child processes: started in a cell under another uid, awaited by pidfd, stopped in order.

`nsenter` and `setpriv` (util-linux) change namespaces, uid and capabilities, then exec the
program: 2 ms, and no code of ours runs between fork and exec. A child dies with the daemon
(PDEATHSIG). That signal fires when the *thread* that started the child ends, so children are
started in the main thread only. Source: prctl(2), PR_SET_PDEATHSIG.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Sequence

import trio

from tdxd.errors import HostError
from tdxd.host import confine, netns
from tdxd.host.cgroup import ControlGroups, Limits
from tdxd.host.ports import Cell, Child, ChildSpec, HandedChild, PrivateTmp

__all__ = ["CellChildren", "Process", "end_all_children", "is_user", "user_ids"]

_MAX_LINE_BYTES = 8192
_UNKNOWN_STATUS = 255
"""Somebody else reaped the child; as asyncio and trio have it."""
_INHERITED_ENV = ("PATH", "LANG", "TZ")
_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Process:
    """A child in its own session; implements `ports.Child`. It owns both descriptors.

    Started here or by the program before this one, it is awaited in the same way: by its pidfd,
    which no other process can take over.
    """

    def __init__(
        self, name: str, *, pid: int, pid_fd: int, output_fd: int, unread: bytes = b""
    ) -> None:
        self.name = name
        self.pid = pid
        self._pid_fd = pid_fd
        self._output_fd = output_fd
        self._output = trio.lowlevel.FdStream(output_fd) if output_fd >= 0 else None
        self._unread = unread
        self._status: int | None = None

    async def wait(self) -> int:
        """Wait for its end; return the exit status, negative for a signal."""
        await self._until_ended()
        return self._reap()

    async def _until_ended(self) -> None:
        """Wait for the pidfd; on a copy, since trio lets one task wait for a descriptor."""
        if self._status is not None:
            return
        pid_fd = os.dup(self._pid_fd)
        try:
            await trio.lowlevel.wait_readable(pid_fd)
        finally:
            os.close(pid_fd)

    def _reap(self) -> int:
        """Collect the status, and end what the child left running in its session."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._status = _collect(self._pid_fd)
            os.close(self._pid_fd)
            self._pid_fd = -1
        return self._status

    async def stop(self, timeout_s: float, *, signal: int = signal.SIGTERM) -> int:
        """Signal it, wait `timeout_s`, then SIGKILL its group; return the status."""
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal)
            with trio.move_on_after(timeout_s):
                await self._until_ended()
        return self.kill()

    def kill(self) -> int:
        """End it and all of its session at once; return the status."""
        return self._reap()

    async def lines(self) -> AsyncIterator[str]:
        """Yield each line of its stdout and stderr until it closes them."""
        if self._output is None:
            return
        try:
            async with self._output:
                while data := await self._output.receive_some(65536):
                    *whole, self._unread = (self._unread + data).split(b"\n")
                    for line in whole:
                        yield line[:_MAX_LINE_BYTES].decode(errors="replace")
                    self._unread = self._unread[:_MAX_LINE_BYTES]
        finally:
            self._output, self._output_fd = None, -1
        if self._unread:
            yield self._unread.decode(errors="replace")

    def hand_over(self, cell: netns.NamespaceCell) -> HandedChild:
        """Return what the program after this one needs to go on with it."""
        return HandedChild(
            name=self.name,
            pid=self.pid,
            pid_fd=self._pid_fd,
            output_fd=self._output_fd,
            mount_fd=cell.mount_fd,
            net_fd=cell.net_fd,
            unread=self._unread,
        )


def _collect(pid_fd: int) -> int:
    """Wait for a child and reap it; return the exit status, negative for a signal."""
    try:
        ended = os.waitid(os.P_PIDFD, pid_fd, os.WEXITED)
    except ChildProcessError:
        return _UNKNOWN_STATUS
    assert ended is not None  # only with WNOHANG
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


class CellChildren:
    """Starts children in cells; implements `ports.Children`."""

    def __init__(self) -> None:
        self._net_fd = -1
        self._groups: ControlGroups | None = None

    @property
    def limits_problem(self) -> str:
        """Why limits are not in force (see `ports.Children`)."""
        return self._groups.problem if self._groups is not None else ""

    def _limit(self, name: str, pid: int, limits: Limits) -> None:
        """Put a child into a control group, where the daemon may make some."""
        if self._groups is None:
            self._groups = ControlGroups()
        if not self._groups.problem:
            self._groups.confine(name, pid, limits)

    def make_cell(
        self,
        *,
        hide: str,
        binds: Sequence[tuple[str, str]],
        tmp: PrivateTmp | None = None,
    ) -> Cell:
        """Make a cell (see `ports.Children`); its network is shared by all.

        Raises: HostError.
        """
        if self._net_fd < 0:
            self._net_fd = netns.make_network()
        own = None
        if tmp is not None:
            uid, gid = user_ids(tmp.user)
            own = netns.TmpMount(
                path=tmp.path, uid=uid, gid=gid, size_bytes=tmp.size_bytes
            )
        return netns.make_cell(net_fd=self._net_fd, hide=hide, binds=binds, tmp=own)

    def spawn(self, spec: ChildSpec) -> Child:
        """Start a child as `spec.user`, without capabilities, its output in one pipe.

        Raises: HostError if nsenter, setpriv or the user does not exist.
        """
        assert threading.current_thread() is threading.main_thread()
        assert isinstance(spec.cell, netns.NamespaceCell)
        cell_fds = (spec.cell.mount_fd, spec.cell.net_fd)
        try:
            argv = [*_enter(*cell_fds), *_drop(spec.user), "--", *_confined(spec)]
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
        process = _process(spec.name, popen)
        if spec.limits is not None:
            try:
                self._limit(spec.name, process.pid, spec.limits)
            except HostError:
                process.kill()
                spec.cell.close()
                raise
        return process

    def hand_over(self, child: Child, cell: Cell) -> HandedChild:
        """Return what the program after this one needs (see `ports.Children`)."""
        assert isinstance(child, Process)
        assert isinstance(cell, netns.NamespaceCell)
        return child.hand_over(cell)

    def adopt(self, handed: HandedChild) -> tuple[Child, Cell]:
        """Go on with a child of the program before this one (see `ports.Children`).

        Raises: HostError.
        """
        try:
            netns.check_namespace(handed.net_fd, "net")
            self._net_fd = handed.net_fd  # shared: kept whatever becomes of this child
            netns.check_namespace(handed.mount_fd, "mnt")
            _check_child(handed)
        except OSError as exc:
            for fd in {handed.pid_fd, handed.output_fd, handed.mount_fd}:
                with contextlib.suppress(OSError):
                    os.close(fd)
            raise HostError.of("adopt", f"{handed.name} {handed.pid}", exc) from exc
        process = Process(
            handed.name,
            pid=handed.pid,
            pid_fd=handed.pid_fd,
            output_fd=handed.output_fd,
            unread=handed.unread,
        )
        return process, netns.NamespaceCell(handed.mount_fd, handed.net_fd)

    def close(self) -> None:
        """Let go of the shared network namespace; harmless when repeated."""
        if self._net_fd >= 0:
            os.close(self._net_fd)
            self._net_fd = -1


def _process(name: str, popen: subprocess.Popen[bytes]) -> Process:
    """Take a child over from the module that started it."""
    assert popen.stdout is not None
    output_fd = os.dup(popen.stdout.fileno())
    popen.stdout.close()
    # Its end is ours to collect: as with asyncio, the module must not wait for it, too.
    popen.returncode = 0
    pid_fd = os.pidfd_open(popen.pid)
    return Process(name, pid=popen.pid, pid_fd=pid_fd, output_fd=output_fd)


def _check_child(handed: HandedChild) -> None:
    """Check that the pidfd is one of a child of ours, running or not reaped, with that pid.

    Raises: OSError.
    """
    os.waitid(os.P_PIDFD, handed.pid_fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    with open(f"/proc/self/fdinfo/{handed.pid_fd}", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    if int(fields.get("Pid", "-1")) != handed.pid:
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))


def end_all_children() -> None:
    """Kill every child of this process with its session, and reap it.

    Source: proc(5), /proc/pid/task/tid/children.
    """
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            pids = [int(pid) for pid in file.read().split()]
        for pid in pids:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


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


def _confined(spec: ChildSpec) -> Sequence[str]:
    if spec.confinement is None:
        return spec.argv
    return confine.wrapped(spec.confinement, spec.argv)


def is_user(user: str) -> bool:
    """Say whether there is a user of that name."""
    import pwd

    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


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
