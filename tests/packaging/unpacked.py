"""A built package, unpacked into a directory."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Unpacked", "build", "installed"]

ROOT = Path(__file__).parents[2]
BUILD_LIMIT_S = 600


def build(
    tree: Path, output: Path, name: str, *options: str, **environment: str
) -> Path:
    """Build one package of a source tree; return its file, the newest in `output`."""
    argv = [str(tree / "contrib/deb/build"), "--output", str(output), *options, name]
    done = subprocess.run(
        argv,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=BUILD_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return output / done.stdout.split(":")[0]


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """A package's name, its .deb, and the directory that stands for /."""

    name: str
    deb: Path
    root: Path

    @property
    def library(self) -> Path:
        return self.root / "usr/lib" / self.name / "python"

    def modules(self) -> list[str]:
        """Every module of tdxd that is in it."""
        found = []
        for path in (self.library / "tdxd").rglob("*.py"):
            parts = path.relative_to(self.library).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
        return sorted(found)

    def field(self, name: str) -> str:
        argv = ["dpkg-deb", "-f", str(self.deb), name]
        done = subprocess.run(argv, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def run_alone(
        self, code: str, environment: Mapping[str, str], **more: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code that finds this package's modules and the standard library's only."""
        begin = f"import sys; sys.path.insert(0, {str(self.library)!r})\n"
        return subprocess.run(
            ["/usr/bin/python3", "-IS", "-W", "error", "-c", begin + code],
            env=environment,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **more,
        )


def installed(*packages: Unpacked) -> list[str]:
    """Return a command prefix that runs what follows with the packages laid over /usr.

    In a mount namespace of its own, so nothing is installed; root only.
    """
    layers = ":".join([*(str(one.root / "usr") for one in packages), "/usr"])
    mount = f"mount -t overlay overlay -o lowerdir={layers} /usr"
    return ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
