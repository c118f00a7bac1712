"""Build products kept by the hash of everything that went into them."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

__all__ = ["CACHE", "ROOT", "Inputs", "made"]

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("TDXD_CACHE_DIR", ROOT / ".cache")).absolute() / "guest"
_KEPT = 2
"""Of each kind so many are kept: the newest and the one before."""


class Inputs:
    """The hash of what a build product is made of."""

    def __init__(self, kind: str, *values: object) -> None:
        self.kind = kind
        self._hash = hashlib.sha256(repr((kind, *values)).encode())

    def files(self, paths: Iterable[Path], below: Path) -> Inputs:
        """Add files: name relative to `below`, mode and content."""
        for path in sorted(paths):
            self._hash.update(
                f"\0{path.relative_to(below)}\0{path.lstat().st_mode}\0".encode()
            )
            if path.is_symlink():
                self._hash.update(os.readlink(path).encode())
            elif path.is_file():
                with path.open("rb") as file:
                    self._hash.update(hashlib.file_digest(file, "sha256").digest())
        return self

    def tree(self, directory: Path) -> Inputs:
        """Add everything below a directory but Python's caches."""
        paths = (one for one in directory.rglob("*") if "__pycache__" not in one.parts)
        return self.files(paths, directory.parent)

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return self._hash.hexdigest()[:16]


def made(inputs: Inputs, build: Callable[[Path], None]) -> Path:
    """Return the directory that `build` fills, from the cache or made now.

    `build` gets an empty directory; it appears under its name only when complete. One builder
    works at a time, others wait for it.
    """
    final = CACHE / f"{inputs.kind}-{inputs.key}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{inputs.kind}.lock"):
        if not final.exists():
            # What a killed build left; none other can be running.
            for stale in CACHE.glob(f"{inputs.kind}-*.new"):
                shutil.rmtree(stale)
            new = CACHE / f"{final.name}.new"
            new.mkdir()
            start = time.monotonic()
            build(new)
            new.rename(final)
            print(
                f"guest: made {final.name} in {time.monotonic() - start:.1f} s",
                flush=True,
            )
        os.utime(final)
        _prune(inputs.kind)
    return final


def _prune(kind: str) -> None:
    """Remove all but the last used products of a kind."""
    products = [one for one in CACHE.glob(f"{kind}-*") if one.suffix != ".new"]
    products.sort(key=lambda one: one.stat().st_mtime, reverse=True)
    for old in products[_KEPT:]:
        shutil.rmtree(old)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
