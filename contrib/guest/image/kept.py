"""Takes out of a Debian tree all that the measured image does not name."""

from __future__ import annotations

import fnmatch
import os
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["CONTENTS", "keep_modules", "keep_named", "modules_with_needs"]

CONTENTS = tomllib.loads(
    Path(__file__).with_name("contents.toml").read_text(encoding="utf-8")
)
_UNITS = "usr/lib/systemd/system"
_KINDS = (
    (_UNITS, "units"),
    ("usr/lib/udev/rules.d", "rules"),
    ("usr/lib/tmpfiles.d", "tmpfiles"),
)


def keep_named(tree: Path, *, test: bool) -> None:
    """Remove everything that `contents.toml` does not keep; nobody can gain rights by a file."""
    more = CONTENTS["test"] if test else {}
    for folder, kind in _KINDS:
        _keep(tree / folder, [*CONTENTS[kind], *more.get(kind, ())])
    for pattern in CONTENTS["removed"]:
        for path in list(tree.glob(pattern)):
            _remove(path)
    for name in CONTENTS["emptied"]:
        _remove(tree / name)
        (tree / name).mkdir(mode=0o755)
    for path in tree.rglob("*"):
        mode = path.lstat().st_mode
        if mode & 0o6000 and not path.is_symlink():
            path.chmod(mode & 0o1777)


def _keep(folder: Path, wanted: Sequence[str]) -> None:
    """Remove what has none of these names; also what a unit that stays would want."""
    for path in folder.iterdir():
        if path.name.endswith((".wants", ".requires")):
            _keep(path, wanted)
            if not any(path.iterdir()):
                path.rmdir()
        elif not any(fnmatch.fnmatch(path.name, one) for one in wanted):
            _remove(path)


def modules_with_needs(modules: Path, wanted: Sequence[str]) -> list[Path]:
    """Return the files of these kernel modules, each after all that it needs.

    `modules` is a kernel's directory that `depmod` has described.
    """
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    ordered: list[str] = []
    for name in wanted:
        _add(_path_of(name, needs), needs, ordered)
    return [modules / path for path in ordered]


def keep_modules(modules: Path, wanted: Sequence[str]) -> None:
    """Remove all other modules; `depmod` must describe the directory anew."""
    kept = set(modules_with_needs(modules, wanted))
    for path in modules.rglob("*.ko*"):
        if path not in kept:
            path.unlink()
    places = [place for place in (modules / "kernel").rglob("*") if place.is_dir()]
    for place in sorted(places, reverse=True):
        if not any(place.iterdir()):
            place.rmdir()


def _path_of(name: str, paths: Iterable[str]) -> str:
    plain = name.replace("-", "_")
    for path in paths:
        if os.path.basename(path).split(".")[0].replace("-", "_") == plain:
            return path
    raise LookupError(f"the kernel has no module {name}")


def _add(path: str, needs: dict[str, list[str]], ordered: list[str]) -> None:
    for one in reversed(needs[path]):  # the deepest comes last
        _add(one, needs, ordered)
    if path not in ordered:
        ordered.append(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
