"""Sets of collateral on disk, below STORE/collateral/: one file a set, written whole or not at all.

What is read here was verified before it was written, and is verified again: the directory only
saves a question. A problem of the server's own fetching is kept beside, for `collateral status`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tdxd.errors import DataError, HostError
from tdxd.owner.collateral.bundle import (
    BUNDLE_MAX_BYTES,
    CollateralSet,
    encode_bundle,
    parse_bundle,
)

__all__ = ["CollateralFiles", "Problem"]

DIRECTORY_NAME = "collateral"
_FILES_MAX = 64
"""Of each kind: anybody may ask for any FMSPC."""
_ROOT_DIGITS = 16
_SET = ".set"
_PROBLEM = ".problem"
_TEXT_MAX_CHARS = 1000
_NEW = ".new-"
_LEFT_OVER_S = 3600


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Why the last attempt to get a set failed, and when (unix seconds)."""

    fmspc: str
    ca: str
    at_s: int
    message: str
    hint: str


class CollateralFiles:
    """The files of one root CA."""

    def __init__(self, store: Path, root_key_sha384: str) -> None:
        self._store = store
        self._directory = store / DIRECTORY_NAME
        self._root = root_key_sha384

    def stamp(self, fmspc: str, ca: str) -> int:
        """Return a number that changes with the file, 0 where there is none."""
        try:
            found = os.stat(self._path(fmspc, ca, _SET))
        except OSError:
            return 0
        return found.st_mtime_ns ^ found.st_ino

    def read(self, fmspc: str, ca: str) -> CollateralSet | None:
        """Return a set, None where there is none.

        Raises: DataError, HostError.
        """
        path = self._path(fmspc, ca, _SET)
        data = _read(path)
        if data is None:
            return None
        (one,) = parse_bundle(data, source=str(path)) or (None,)
        if one is None or (one.root, one.fmspc, one.ca) != (self._root, fmspc, ca):
            raise DataError(f"{path} holds another set than its name says")
        return one

    def write(self, one: CollateralSet) -> None:
        """Write a set over the one before, down to the disk.

        Raises: HostError.
        """
        self._write(self._path(one.fmspc, one.ca, _SET), encode_bundle([one]))
        self.forget_problem(one.fmspc, one.ca)
        self._prune(_SET)

    def questions(self) -> tuple[tuple[str, str], ...]:
        """Return FMSPC and CA of every set and every problem there is, sorted."""
        return tuple(
            sorted({*self._questions(_SET), *self._questions(_PROBLEM)}),
        )

    def note_problem(self, problem: Problem) -> None:
        """Keep why a set could not be got.

        Raises: HostError.
        """
        text = json.dumps(dataclasses.asdict(problem))
        path = self._path(problem.fmspc, problem.ca, _PROBLEM)
        self._write(path, text.encode())
        self._prune(_PROBLEM)

    def forget_problem(self, fmspc: str, ca: str) -> None:
        """Say that there is none any more."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(fmspc, ca, _PROBLEM))

    def problem(self, fmspc: str, ca: str) -> Problem | None:
        """Return the problem that was noted last, if it stands."""
        data = _read(self._path(fmspc, ca, _PROBLEM))
        if data is None:
            return None
        try:
            value = json.loads(data)
            return Problem(
                fmspc=fmspc,
                ca=ca,
                at_s=int(value["at_s"]),
                message=str(value["message"])[:_TEXT_MAX_CHARS],
                hint=str(value["hint"])[:_TEXT_MAX_CHARS],
            )
        except (ValueError, KeyError, TypeError):
            return None

    def _path(self, fmspc: str, ca: str, kind: str) -> Path:
        return self._directory / f"{self._root[:_ROOT_DIGITS]}-{fmspc}-{ca}{kind}"

    def _questions(self, kind: str) -> Iterator[tuple[str, str]]:
        for path in self._found(kind):
            _, fmspc, ca = path.name.removesuffix(kind).split("-")
            yield fmspc, ca

    def _found(self, kind: str) -> list[Path]:
        pattern = f"{self._root[:_ROOT_DIGITS]}-*-*{kind}"
        return [
            path
            for path in sorted(self._directory.glob(pattern))
            if path.name.count("-") == 2
        ]

    def _prune(self, kind: str) -> None:
        """Keep the newest files, and none that a crash left half written."""
        found = self._found(kind)
        old_s = time.time() - _LEFT_OVER_S
        for path in self._directory.glob(_NEW + "*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < old_s:
                    path.unlink()
        with contextlib.suppress(OSError):
            found.sort(key=lambda path: path.stat().st_mtime_ns)
            for path in found[:-_FILES_MAX]:
                path.unlink()

    def _write(self, path: Path, data: bytes) -> None:
        """Write 0600 and atomically, for the owner of the store: root may use its verbs."""
        try:
            owner = os.stat(self._store)
            with contextlib.suppress(FileExistsError):
                os.mkdir(self._directory, 0o700)
                _give(self._directory, owner)
            fd, name = tempfile.mkstemp(dir=self._directory, prefix=_NEW)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(fd)
                _give(Path(name), owner)
                os.rename(name, path)
            except BaseException:
                os.unlink(name)
                raise
            _sync(self._directory)
        except OSError as exc:
            raise HostError.of("write", str(path), exc) from exc


def _give(path: Path, owner: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(BUNDLE_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
