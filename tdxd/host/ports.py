"""What the daemon needs of its operating system, as Protocols, and the `Host` that bundles them.

The real facilities stand beside this file, one each; `tests/fakes.py` holds an in-memory
kernel, and the same contract tests run on both. All methods block unless they are `async`;
the daemon calls the blocking ones in worker threads where they can take long. Every method
raises `HostError`, or the narrower error its docstring names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Literal, Protocol

from tdxd.core.foreign import AnyBundle, AnyManifest
from tdxd.host import clock, machine, tree_memory
from tdxd.host.cgroup import Limits
from tdxd.host.confine import Confinement

__all__ = [
    "Cell",
    "Child",
    "ChildSpec",
    "Children",
    "HandedChild",
    "Host",
    "KeyServer",
    "MappedVolume",
    "Mapper",
    "Mounts",
    "PrivateTmp",
    "Rtmr",
    "Tsm",
]


class Tsm(Protocol):
    """The quoting interface of the kernel (configfs-tsm) and its event log."""

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes of report data.

        Raises: EvidenceUnavailableError.
        """
        ...

    def event_log(self) -> bytes:
        """Return the CCEL data; empty if this platform has none."""
        ...


class Rtmr(Protocol):
    """RTMR3 of this TD, which the guest itself may extend; nothing takes an extension back."""

    def value(self) -> bytes:
        """Return it, 48 bytes."""
        ...

    def check(self) -> None:
        """Check that it could be extended now; changes nothing."""
        ...

    def extend(self, digest: bytes) -> None:
        """Make it SHA-384(old value || digest); a digest is 48 bytes, else ValueError."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MappedVolume:
    """Proof that an image was opened with the right key: a block device of its plaintext.

    `fd` is an open descriptor of `device`, or -1: it keeps an autoclear loop device alive until
    the device is mounted. `payload_bytes` is what lies in the image, hash tree included; 0 if
    an older program mapped it and did not say.
    """

    manifest: AnyManifest
    device: str
    mapper: Literal["dm", "memory"]
    fd: int = -1
    writable: bool = False
    payload_bytes: int = 0


class Mapper(Protocol):
    """Opens images. Contract: never a wrong byte of a sealed one.

    Of a foreign one: its header is read once, nothing in it but validated numbers is used, and
    no byte is shown that did not go through the cipher with the key that the passphrase opened.
    """

    name: Literal["dm", "memory"]

    def check(self, image: str, bundle: AnyBundle) -> None:
        """Check that an image is the one of a key, by one read; nothing is opened.

        Of a foreign one nothing can be said without unlocking it.

        Raises: MissingError, BadHeaderError, IntegrityError, HostError.
        """
        ...

    def map_volume(
        self,
        image: str,
        bundle: AnyBundle,
        *,
        cancelled: Callable[[], bool],
        writable: bool = False,
    ) -> MappedVolume:
        """Open the image; polls `cancelled` and leaves nothing behind if it turns true.

        `writable` is for foreign volumes only, and only `dm` can.

        Raises: MissingError, BadHeaderError, IntegrityError, WrongPassphraseError; HostError
        with EROFS for a `writable` that cannot be.
        """
        ...

    def unmap(self, mapped: MappedVolume) -> None:
        """Close the device and all below it; harmless when repeated.

        Raises: BusyError.
        """
        ...

    def intact(self, mapped: MappedVolume) -> bool:
        """Say whether no wrong block was met since mapping (dm-verity's status).

        A foreign volume, which cannot know, is intact while its device exists.
        """
        ...

    def sweep(self) -> Sequence[str]:
        """Close devices that a killed daemon left open; return their names."""
        ...


class Mounts(Protocol):
    """Mounts in the daemon's private mount namespace."""

    def mount_volume(self, mapped: MappedVolume, target: str) -> None:
        """Make the directory and mount nodev, nosuid, noexec, nosymfollow.

        Read-only unless the volume is writable.
        """
        ...

    def unmount(self, target: str) -> None:
        """Unmount and remove the directory; harmless when not mounted.

        Raises: BusyError.
        """
        ...

    def under(self, directory: str) -> tuple[str, ...]:
        """Return the mount points below `directory`, deepest last."""
        ...


class Cell(Protocol):
    """A network namespace with nothing but `lo`, and a mount namespace that hides the volumes.

    Held by descriptor; gone when closed and the last child in it has ended.
    """

    def close(self) -> None:
        """Let go of the namespaces; harmless when repeated."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrivateTmp:
    """A directory of a cell's own, in memory, empty at first, for one user alone."""

    path: str
    user: str
    size_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One child process: what to run, as whom, where.

    `argv` and `env` never hold a secret; `pass_fds` are inherited under the same numbers.
    """

    name: str
    argv: tuple[str, ...]
    user: str
    cell: Cell
    pass_fds: tuple[int, ...] = ()
    confinement: Confinement | None = None
    limits: Limits | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Child(Protocol):
    """A running child, in its own session."""

    @property
    def pid(self) -> int:
        """The process id."""
        ...

    async def wait(self) -> int:
        """Wait for its end; return the exit status, negative for a signal."""
        ...

    async def stop(self, timeout_s: float, *, signal: int = ...) -> int:
        """Signal it, wait, then SIGKILL its group; return the status when it has ended."""
        ...

    def lines(self) -> AsyncIterator[str]:
        """Yield each line of its stdout and stderr until it closes them."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedChild:
    """A child and its cell on the way from one program to the next, over an exec.

    Every field `…_fd` is a descriptor; -1: closed already. `unread` is a line not ended yet.
    """

    name: str
    pid: int
    pid_fd: int
    output_fd: int
    mount_fd: int
    net_fd: int
    unread: bytes


class Children(Protocol):
    """Starts children, each in a cell."""

    @property
    def limits_problem(self) -> str:
        """Why limits of children are not in force, if one was asked for; else nothing."""
        ...

    def make_cell(
        self,
        *,
        hide: str,
        binds: Sequence[tuple[str, str]],
        tmp: PrivateTmp | None = None,
    ) -> Cell:
        """Make a cell where `hide` is an empty directory but for `binds` and `tmp`.

        Each bind is (source, target below `hide`). All cells share one network namespace.
        """
        ...

    def spawn(self, spec: ChildSpec) -> Child:
        """Start a child; call it in the main thread only. If that fails the cell is closed."""
        ...

    def hand_over(self, child: Child, cell: Cell) -> HandedChild:
        """Return what the program after this one needs to go on with a child not awaited yet."""
        ...

    def adopt(self, handed: HandedChild) -> tuple[Child, Cell]:
        """Go on with a child that the program before this one started.

        One that ended meanwhile is adopted, too: waiting for it tells its status. If it is no
        child of this process its descriptors are closed.
        """
        ...


class KeyServer(Protocol):
    """The two calls of the key release protocol, to one server."""

    async def challenge(self) -> bytes:
        """Return an encoded `ChallengeResponse`: a token, and which key will sign.

        Raises: UnreachableError.
        """
        ...

    async def release(self, request: bytes) -> bytes:
        """Send an encoded `ReleaseRequest`, return the encoded `ReleaseResponse`.

        Raises: UnreachableError, DeniedError.
        """
        ...

    async def aclose(self) -> None:
        """Close the channel."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The facilities of one machine."""

    tsm: Tsm
    rtmr: Rtmr
    mapper: Mapper
    mounts: Mounts
    children: Children
    random_bytes: Callable[[int], bytes]
    boottime_s: Callable[[], float] = clock.boottime_s
    available_memory_bytes: Callable[[], int] = machine.available_memory_bytes
    tree_memory_bytes: Callable[[int], int] = tree_memory.tree_memory_bytes
