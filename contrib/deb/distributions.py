"""The installed Python distributions: which of them holds a module, and what it needs."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

__all__ = [
    "described",
    "holders",
    "licence_files",
    "runtime_files",
    "site",
    "with_requirements",
]

_KEPT_SUFFIXES = {".py", ".so", ".pem"}
"""Code, and the root certificates of gRPC and certifi. Headers, stubs and sources stay behind."""
_LEFT_OUT_DIRECTORIES = {"tests", "_tests", "type_tests"}
_LICENCE_NAME_CHARACTERS = 60
_LICENCE_WORDS = ("LICEN", "COPYING", "NOTICE", "AUTHORS")
_NO_LICENCE_SUFFIXES = {".py", ".pyc", ".pyi", ".h", ".json"}


@functools.cache
def _installed() -> Mapping[str, metadata.Distribution]:
    return {
        canonicalize_name(one.metadata["Name"]): one for one in metadata.distributions()
    }


def site() -> Path:
    """Return the directory that the distributions are installed in."""
    return Path(str(_installed()["protobuf"].locate_file("")))


@functools.cache
def _holder_of_path() -> Mapping[str, str]:
    return {
        str(path): name
        for name, one in _installed().items()
        for path in one.files or ()
    }


def holders(modules: Iterable[str]) -> set[str]:
    """Return the distributions that hold these modules; the standard library's need none.

    Raises: LookupError for a module that nothing installed holds.
    """
    found = set()
    for module in modules:
        if module.split(".")[0] in sys.stdlib_module_names:
            continue
        found.add(_holder(module))
    return found


def _holder(module: str) -> str:
    paths = _holder_of_path()
    parts = module.split(".")
    while parts:  # `from a import b` also named a.b, which need not be a module
        base = "/".join(parts)
        for path in (f"{base}.py", f"{base}/__init__.py"):
            if path in paths:
                return paths[path]
        parts.pop()
    message = f"no installed distribution holds {module}"
    raise LookupError(message)


def with_requirements(names: Iterable[str], left_out: Iterable[str] = ()) -> set[str]:
    """Return distributions and all that they require here, but for `left_out` and theirs.

    Raises: LookupError for one that is not installed.
    """
    found: set[str] = set()
    waiting = [canonicalize_name(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in left_out:
            continue
        if name not in _installed():
            message = f"{name} is required, but not installed"
            raise LookupError(message)
        found.add(name)
        for text in _installed()[name].requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(requirement.name))
    return found


def runtime_files(name: str) -> dict[str, Path]:
    """Return what a distribution needs to run: path below the module directory, and source."""
    found = {}
    for path in _installed()[name].files or ():
        top = path.parts[0]
        directories = set(path.parts[:-1])
        if top == ".." or top.endswith(".dist-info"):
            continue
        if directories & _LEFT_OUT_DIRECTORIES or "__pycache__" in directories:
            continue
        if path.suffix in _KEPT_SUFFIXES or ".so." in path.name:
            found[str(path)] = Path(str(path.locate()))
    return found


def record(name: str) -> dict[str, Path]:
    """Return the file by which a program learns a distribution's version, as above."""
    return {
        str(path): Path(str(path.locate()))
        for path in _installed()[name].files or ()
        if path.name == "METADATA" and path.parts[0].endswith(".dist-info")
    }


def licence_files(name: str) -> dict[str, Path]:
    """Return a distribution's licence texts, and those of what it took over: names and sources."""
    found = {}
    for path in _installed()[name].files or ():
        if path.suffix in _NO_LICENCE_SUFFIXES or path.parts[0] == "..":
            continue
        if any(word in path.name.upper() for word in _LICENCE_WORDS):
            inner = [part for part in path.parts if part != "licenses"]
            if inner[0].endswith(".dist-info"):
                del inner[0]
            found["_".join(inner)] = Path(str(path.locate()))
    return found


def described(name: str) -> tuple[str, str, str]:
    """Return name, version and licence, as the distribution itself states them."""
    about = _installed()[name].metadata
    for field in ("License-Expression", "License"):
        licence = (about.get_all(field) or [""])[0]
        if licence and len(licence) < _LICENCE_NAME_CHARACTERS and "\n" not in licence:
            break
    else:  # no name, but a whole text: the classifiers name it
        classifiers = about.get_all("Classifier") or []
        kinds = [
            one.rpartition(" :: ")[2]
            for one in classifiers
            if one.startswith("License ::")
        ]
        licence = ", ".join(kinds) or "see its licence text"
    return about["Name"], about["Version"], licence
