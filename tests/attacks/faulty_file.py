"""An image file whose place misbehaves: reads fail or hang, the directory does not answer.

A FUSE mount of one file, `image`, served by a process of its own; told what to do through its
standard input. No sleep: a read that hangs does so until it is let go, and says that it does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["FaultyFile", "faulty_file"]

_ROOT = Path(__file__).parents[2]
_LIMIT_S = 30.0
_HANG_S = 25.0
"""What hangs goes on by itself then: a test that fails must not hang for ever, too."""
_MNT_DETACH = 2


class FaultyFile:
    """The tests' side: `path` is the image."""

    def __init__(self, mount_point: Path, process: subprocess.Popen[str]) -> None:
        self.path = mount_point / "image"
        self._process = process
        self._hung = threading.Semaphore(0)
        self._done = threading.Semaphore(0)
        threading.Thread(target=self._listen, daemon=True).start()

    def fail(self, start: int, stop: int, number: int = errno.EIO) -> None:
        """Answer reads that touch these bytes of the file with an error."""
        self._tell(fail=[start, stop, number])

    def end(self, at: int) -> None:
        """Give nothing from here on, though the size says otherwise."""
        self._tell(end=at)

    def hang(self, start: int, stop: int) -> None:
        """Answer no read that touches these bytes until `heal`."""
        self._tell(hang=[start, stop])

    def hang_names(self) -> None:
        """Answer no listing of the directory and no look at a file until `heal`."""
        self._tell(hang_names=True)

    def heal(self) -> None:
        """Answer everything from now on, also what hangs."""
        self._tell(heal=True)
        while self._hung.acquire(blocking=False):
            pass  # what hung until now is no news any more

    def until_something_hangs(self) -> None:
        assert self._hung.acquire(timeout=_LIMIT_S), "nothing was asked for"

    def _tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        assert self._done.acquire(timeout=_LIMIT_S), "the file system does not answer"

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            (self._hung if line.strip() == "hung" else self._done).release()


@contextlib.contextmanager
def faulty_file(image: Path, mount_point: Path) -> Iterator[FaultyFile]:
    """Mount a copy of `image`, as it is now, and take everything away afterwards."""
    mount_point.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.attacks.faulty_file", image, mount_point],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    try:
        deadline_s = time.monotonic() + _LIMIT_S
        while not os.path.ismount(mount_point):
            assert process.poll() is None, "the file system did not start"
            assert time.monotonic() < deadline_s, "the file system is not mounted"
            time.sleep(0.005)
        file = FaultyFile(mount_point, process)
        yield file
        file.heal()
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(mount_point), _MNT_DETACH)
        process.kill()  # the kernel answers what still hangs: ENOTCONN
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        mount_point.rmdir()


def _overlap(start: int, stop: int, areas: list[list[int]]) -> list[int] | None:
    return next((one for one in areas if start < one[1] and one[0] < stop), None)


class _Faults:
    """What is wrong now; changed by lines of standard input."""

    def __init__(self) -> None:
        self._fail: list[list[int]] = []
        self._hang: list[list[int]] = []
        self._names = False
        self.end: int | None = None
        self._healed = threading.Event()
        self._writing = threading.Lock()

    def obey(self) -> None:
        for line in sys.stdin:
            command = json.loads(line)
            if "fail" in command:
                self._fail.append(command["fail"])
            if "hang" in command:
                self._hang.append(command["hang"])
            self.end = command.get("end", self.end)
            self._names = self._names or "hang_names" in command
            if "heal" in command:
                self._fail, self._hang, self._names = [], [], False
                self.end = None
                self._healed.set()
                self._healed = threading.Event()
            self._say("done")
        os._exit(0)  # the tests are gone: the kernel answers what hangs with an error

    def read(self, start: int, stop: int) -> None:
        if _overlap(start, stop, self._hang):
            self._wait()
        failed = _overlap(start, stop, self._fail)
        if failed is not None:
            raise OSError(failed[2], os.strerror(failed[2]))

    def name(self) -> None:
        if self._names:
            self._wait()

    def _wait(self) -> None:
        healed = self._healed
        self._say("hung")
        healed.wait(_HANG_S)

    def _say(self, word: str) -> None:
        with self._writing:
            print(word, flush=True)


def main(image: str, mount_point: str) -> None:
    os.environ.setdefault("FUSE_LIBRARY_PATH", "libfuse3.so.3")
    import mfusepy

    data = Path(image).read_bytes()
    faults = _Faults()
    threading.Thread(target=faults.obey, daemon=True).start()

    class Operations(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
            faults.name()
            if path != "/image":
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            return {"st_mode": stat.S_IFREG | 0o444, "st_size": len(data)}

        def readdir(self, path: str, fh: int) -> list[str]:
            faults.name()
            return [".", "..", "image"]

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            faults.read(offset, offset + size)
            return data[: faults.end][offset : offset + size]

    options = {
        "attr_timeout": 0,
        "entry_timeout": 0,
        "negative_timeout": 0,
        "direct_io": True,
        "max_idle_threads": 8,
    }
    with contextlib.suppress(RuntimeError):
        mfusepy.FUSE(Operations(), mount_point, foreground=True, **options)


if __name__ == "__main__":
    main(*sys.argv[1:])
