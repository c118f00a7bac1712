"""Makes what the tests boot, and prints where it is.

Usage: python -m contrib.guest.build_image (after `make deb`)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from contrib.guest.cache import ROOT
from contrib.guest.root import root_directory
from contrib.guest.tools import tools_disk
from tdxd import __version__

__all__ = ["GuestImage", "build_image", "built_packages"]

_INSTALLED = ("tdxd", "tdxd-model-server")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GuestImage:
    """Files below the cache; none may be written to."""

    kernel: Path
    initrd: Path
    root: Path
    tools: Path


def build_image(packages: Sequence[Path]) -> GuestImage:
    """Build, or take from the cache, a guest with these .deb files installed."""
    directory = root_directory(packages)
    return GuestImage(
        kernel=directory / "kernel",
        initrd=directory / "initrd",
        root=directory / "root.raw",
        tools=tools_disk(),
    )


def built_packages() -> list[Path]:
    """Return the packages of a guest as `make deb` left them.

    Raises: SystemExit, if one is missing.
    """
    names = [f"{name}_{__version__}_amd64.deb" for name in _INSTALLED]
    packages = [ROOT / "build" / "deb" / name for name in names]
    for package in packages:
        if not package.exists():
            raise SystemExit(f"guest: {package} is missing: run make deb")
    return packages


if __name__ == "__main__":
    image = build_image(built_packages())
    for field in dataclasses.fields(image):
        print(f"{field.name} {getattr(image, field.name)}")
