"""The guest's root disk: the base, the product's packages, and the overlay of the tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from contrib.guest.base import base_directory
from contrib.guest.cache import Inputs, made
from contrib.guest.disks import make_ext4

__all__ = ["root_directory"]

_OVERLAY = Path(__file__).parent / "overlay"
_UNITS = ("guest-config.service", "tdx-sim-device.service")
_SPARE_BYTES = 1536 * 2**20
_LIMIT_S = 600.0


def root_directory(packages: Sequence[Path]) -> Path:
    """Return the directory with `root.raw`, `kernel` and `initrd`, made if need be.

    `packages` are .deb files; all that they depend on must be in the base or among them.
    """
    base = base_directory()
    inputs = Inputs("root", base.name, _UNITS, _SPARE_BYTES).tree(_OVERLAY)
    for package in packages:
        inputs.files([package], package.parent)
    return made(inputs, lambda directory: _build(base, packages, directory))


def _build(base: Path, packages: Sequence[Path], directory: Path) -> None:
    tree = directory / "tree"
    tree.mkdir()
    tree.chmod(0o755)
    _run("tar", "--extract", "--file", base / "base.tar", "--directory", tree)
    if packages:
        _install(packages, tree)
    # Not `-a`: everything belongs to root, whoever checked out the sources.
    _run("cp", "-rT", "--no-preserve=all", _OVERLAY, tree)
    _run("chroot", tree, "systemctl", "--quiet", "enable", *_UNITS)
    root = directory / "root.raw"
    make_ext4(tree, root, label="root", spare_bytes=_SPARE_BYTES)
    shutil.rmtree(tree)
    for name in ("kernel", "initrd"):
        shutil.copy(base / name, directory / name)


def _install(packages: Sequence[Path], tree: Path) -> None:
    """Install as a person would, with /proc there and nothing left mounted or running."""
    place = tree / "packages"
    place.mkdir()
    for package in packages:
        shutil.copy(package, place)
    names = [f"/packages/{package.name}" for package in packages]
    jail = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
    _run(
        *(*jail, f"--mount-proc={tree}/proc", "chroot", tree),
        *("env", "DEBIAN_FRONTEND=noninteractive", "dpkg", "--install", *names),
    )
    shutil.rmtree(place)


def _run(*command: str | Path) -> None:
    words = [str(word) for word in command]
    subprocess.run(words, check=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL)
