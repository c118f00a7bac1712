"""The tools disk: the whole source tree, its tests, and the Python packages they need.

The guest mounts it at /opt/tools, read-only. It is a virtual environment, so that nothing of it
gets in the way of the guest's own programs: /opt/tools/bin/python3 finds the modules in `python/`,
and the tests run from /opt/tools as they do from the repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from contrib.guest.cache import ROOT, Inputs, made
from contrib.guest.disks import make_ext4

__all__ = ["tools_disk"]

_WANTED = (
    "tdxd[sim]",
    "dcap-qvl",  # reads the simulator's quotes
    "pytest",
    "pytest-trio",
    "hypothesis",
    "coverage",
)
_MESSAGES_ONLY = "tensorflow"
"""Of this only the message modules come along; nothing of what it requires."""
_SPARE_BYTES = 8 * 2**20


def tools_disk() -> Path:
    """Return the raw image, made if need be.

    It holds packages of the interpreter that runs this, so the guest must have the same version.
    """
    names = dict(_closure())
    versions = sorted((name, one.version) for name, one in names.items())
    inputs = Inputs("tools", versions, sys.version_info[:2], _SPARE_BYTES)
    inputs.tree(ROOT / "tdxd").tree(ROOT / "tests").files(
        [ROOT / "pyproject.toml"], ROOT
    )
    return made(inputs, lambda directory: _build(names, directory)) / "tools.raw"


def _closure() -> Iterator[tuple[str, Distribution]]:
    """Find all distributions that the wanted ones require, by name."""
    seen: set[str] = set()
    waiting = [Requirement(text) for text in _WANTED]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        key = f"{name}{sorted(wanted.extras)}"
        if key in seen:
            continue
        seen.add(key)
        found = distribution(name)
        yield name, found
        if name == _MESSAGES_ONLY:
            continue
        for text in found.requires or ():
            one = Requirement(text)
            extras = wanted.extras or {""}
            if one.marker is None or any(
                one.marker.evaluate({"extra": extra}) for extra in extras
            ):
                waiting.append(one)


def _build(distributions: dict[str, Distribution], directory: Path) -> None:
    tree = directory / "tree"
    python = _empty_environment(tree)
    for name, found in distributions.items():
        if name != "tdxd":
            _copy(found, python, messages_only=name == _MESSAGES_ONLY)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tdxd", python / "tdxd", ignore=ignore)
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tree)
    # The guest cannot keep what it compiles, and compiles slowly.
    command = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode"]
    subprocess.run([*command, "unchecked-hash", tree], check=False, timeout=300)
    make_ext4(
        tree,
        directory / "tools.raw",
        label="tools",
        spare_bytes=_SPARE_BYTES,
        journal=False,
    )
    shutil.rmtree(tree)


def _empty_environment(tree: Path) -> Path:
    """Make what the interpreter recognises as a virtual environment; return where modules go."""
    modules = (
        tree
        / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}"
        / "site-packages"
    )
    modules.mkdir(parents=True)
    (tree / "python").symlink_to(modules.relative_to(tree))
    (tree / "bin").mkdir()
    (tree / "bin/python3").symlink_to("/usr/bin/python3")
    (tree / "pyvenv.cfg").write_text("home = /usr/bin\n", encoding="utf-8")
    return modules


def _copy(found: Distribution, target: Path, *, messages_only: bool) -> None:
    """Copy a distribution's modules, with their times: what is compiled stays valid."""
    for file in found.files or ():
        if ".." in file.parts or (messages_only and not file.stem.endswith("_pb2")):
            continue
        if messages_only and file.suffix != ".py":
            continue
        place = target / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(str(found.locate_file(file)), place)
