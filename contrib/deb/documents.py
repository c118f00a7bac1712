"""Texts of a package that are made: control, copyright, changelog."""

from __future__ import annotations

import email.utils
import sys
import time
from collections.abc import Iterable

from contrib.deb import distributions
from contrib.deb.packages import Package

__all__ = ["changelog", "control", "copyright_file"]

_MAINTAINER = "The tdxd maintainers <tdxd@example.com>"


def control(
    package: Package,
    version: str,
    *,
    architecture: str,
    libc: str,
    installed_kib: int,
) -> str:
    """Return DEBIAN/control. `libc` is the version that the package's libraries need."""
    major, minor = sys.version_info[:2]
    depends = [
        f"libc6 (>= {libc})",
        *package.depends,
        # Extension modules are built for one minor version.
        f"python3 (>= {major}.{minor}~)",
        f"python3 (<< {major}.{minor + 1})",
    ]
    fields = {
        "Package": package.name,
        "Version": version,
        "Architecture": architecture,
        "Maintainer": _MAINTAINER,
        "Installed-Size": str(installed_kib),
        "Depends": ", ".join(sorted(depends)),
        "Recommends": ", ".join(package.recommends),
        "Suggests": ", ".join(package.suggests),
        "Section": "admin",
        "Priority": "optional",
    }
    lines = [f"{name}: {value}" for name, value in fields.items() if value]
    lines.append(f"Description: {package.summary}")
    lines += [f" {line or '.'}" for line in package.description.splitlines()]
    return "\n".join(lines) + "\n"


def copyright_file(package: Package, names: Iterable[str], epoch_s: int) -> bytes:
    """Return the copyright file: ours, then each library that is shipped along."""
    year = time.gmtime(epoch_s).tm_year
    lines = [
        f"Copyright (C) {year} the tdxd maintainers",
        "",
        "tdxd is licensed under the Apache License, version 2.0; on Debian systems its text is",
        "in /usr/share/common-licenses/Apache-2.0.",
        "",
        f"Below /{package.library} these Python distributions are shipped, with files left out",
        "but otherwise unchanged. Their own licence texts are in licenses/ beside this file.",
        "",
    ]
    for name in sorted(names):
        title, version, licence = distributions.described(name)
        lines.append(f"  {title} {version}: {licence}")
    return ("\n".join(lines) + "\n").encode()


def changelog(package: Package, version: str, epoch_s: int) -> bytes:
    """Return a changelog in Debian's format; what changed stands in CHANGELOG.md."""
    when = email.utils.formatdate(epoch_s)
    return (
        f"{package.name} ({version}) unstable; urgency=medium\n\n"
        f"  * tdxd {version}; see CHANGELOG.md.gz.\n\n"
        f" -- {_MAINTAINER}  {when}\n"
    ).encode()
