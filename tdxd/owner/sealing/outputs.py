"""Output files that appear whole and together, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tdxd.errors import DataError, HostError

__all__ = ["Outputs", "unnamed_file"]


@contextlib.contextmanager
def unnamed_file(directory: Path) -> Iterator[int]:
    """Open a file without a name, mode 0600: an interrupted run leaves nothing.

    Raises: HostError.
    """
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        hint = "the output directory must exist and take temporary files (O_TMPFILE)"
        raise HostError.of("make a file in", str(directory), exc, hint=hint) from exc
    try:
        yield fd
    finally:
        os.close(fd)


class Outputs:
    """Files written without a name, that all get their names at the end of the `with` block.

    If the block fails, or one name cannot be given, none of the files stays. With `force`,
    old files of the same names are replaced.
    """

    def __init__(self, *, force: bool) -> None:
        self._force = force
        self._open = contextlib.ExitStack()
        self._files: list[tuple[int, Path]] = []
        self._devices: list[tuple[int, Path]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._open:
            if kind is None:
                self._publish()

    def reserve(self, path: Path, *, mode: int) -> int:
        """Open a new file for `path`; returns its descriptor, which stays ours.

        A block device is opened itself: it has its name already, and is only brought to rest
        before the files get theirs.

        Raises: DataError if there is such a file and no `force`; HostError.
        """
        if os.path.lexists(path) and not self._force:
            hint = "name another, or overwrite with --force"
            raise DataError(f"{path} exists already", hint=hint)
        if path.is_char_device() or path.is_fifo() or path.is_socket():
            raise DataError(f"{path} is neither a file nor a block device")
        if path.is_block_device():
            fd = _open_device(path)
            self._open.callback(os.close, fd)
            self._devices.append((fd, path))
            return fd
        fd = self._open.enter_context(unnamed_file(path.parent))
        os.fchmod(fd, mode)
        self._files.append((fd, path))
        return fd

    def _publish(self) -> None:
        """Bring all files to the disk, then name them; Ctrl-C waits meanwhile."""
        given: list[Path] = []
        path = Path()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            for fd, path in self._devices + self._files:
                _bring_to_disk(fd, path)
            for fd, path in self._files:
                self._name(fd, path)
                given.append(path)
        except OSError as exc:
            for one in given:
                one.unlink()
            raise HostError.of("create", str(path), exc) from exc
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _name(self, fd: int, path: Path) -> None:
        parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        name = f".{path.name}.{os.getpid()}.new" if self._force else path.name
        try:
            # With a directory descriptor Python calls linkat(AT_SYMLINK_FOLLOW), as open(2)
            # wants it for files made with O_TMPFILE.
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent)
            if self._force:
                os.replace(name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError:
            if self._force:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=parent)
            raise
        finally:
            os.close(parent)


def _bring_to_disk(fd: int, path: Path) -> None:
    try:
        os.fsync(fd)
    except OSError as exc:
        raise HostError.of("write", str(path), exc) from exc


def _open_device(path: Path) -> int:
    try:
        # O_EXCL: the kernel refuses a device that is mounted or otherwise in use.
        return os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as exc:
        hint = "it is mounted or otherwise in use" if exc.errno == errno.EBUSY else ""
        raise HostError.of("open", str(path), exc, hint=hint) from exc
