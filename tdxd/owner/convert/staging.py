"""A directory that appears whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tdxd.errors import DataError, HostError

__all__ = ["staged_directory", "write_file"]


@contextlib.contextmanager
def staged_directory(target: Path, *, hint: str = "") -> Iterator[Path]:
    """Yield a hidden directory beside `target`, which gets that name at the end of the block.

    If the block fails, it and the directories above it that were made go away again. `hint` says
    what to do if there is such a directory already. All paths are absolute.

    Raises: DataError if `target` exists; HostError.
    """
    if os.path.lexists(target):
        raise DataError(f"{target} exists already", hint=hint)
    made = _make_parents(target.parent)
    staged: Path | None = None
    try:
        try:
            # Model servers look at names that are numbers only.
            text = tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent)
            staged = Path(text)
            staged.chmod(0o755)
        except OSError as exc:
            raise HostError.of("make a directory in", str(target.parent), exc) from exc
        yield staged
        _publish(staged, target, hint)
    except BaseException:
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
        for one in made:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


def _make_parents(path: Path) -> list[Path]:
    """Make a directory and those above it; return what was made, the innermost first."""
    made: list[Path] = []
    missing = [one for one in (path, *path.parents) if not os.path.lexists(one)]
    for one in reversed(missing):
        try:
            one.mkdir()
        except OSError as exc:
            for other in made:
                with contextlib.suppress(OSError):
                    other.rmdir()
            raise HostError.of("make", str(one), exc) from exc
        made.insert(0, one)
    return made


def _publish(staged: Path, target: Path, hint: str) -> None:
    """Bring all to the disk, then give the name; a directory that came meanwhile stays."""
    try:
        for where, _, _ in os.walk(staged, topdown=False):
            _sync(Path(where))
        os.rename(staged, target)
        _sync(target.parent)
    except OSError as exc:
        if os.path.lexists(target) and os.path.lexists(staged):
            raise DataError(f"{target} exists already", hint=hint) from exc
        raise HostError.of("create", str(target), exc) from exc


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(path: Path, data: bytes) -> None:
    """Write a file of mode 0644 down to the disk, with the directories that it needs.

    An old one is replaced.

    Raises: HostError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as exc:
        raise HostError.of("write", str(path), exc) from exc
