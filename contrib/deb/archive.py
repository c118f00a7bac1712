"""Writes a package: stages its files, compiles its modules, runs dpkg-deb.

Everything that could differ between two builds is set here: times, modes, owners, order, the
interpreter's hash seed, and which process compiles which module.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from contrib.deb import documents
from contrib.deb.contents import File, units_of
from contrib.deb.packages import Package

__all__ = ["architecture", "write_deb"]

_COMPILE_SLICES = 8
"""Modules are compiled in this many fresh interpreters: what an interpreter has seen before decides
which strings it shares, so each must see the same modules on every machine."""
_GLIBC = re.compile(rb"GLIBC_2\.(\d+)")
_SCRIPTS = ("preinst", "postinst", "prerm", "postrm")


@functools.cache
def architecture() -> str:
    """Return dpkg's name of this machine's architecture."""
    argv = ["dpkg", "--print-architecture"]
    return subprocess.run(
        argv, check=True, capture_output=True, text=True
    ).stdout.strip()


def write_deb(
    package: Package, version: str, epoch_s: int, files: Sequence[File], deb: Path
) -> int:
    """Write the package to `deb`; return the size of its files in bytes."""
    with tempfile.TemporaryDirectory(dir=deb.parent, prefix=".stage-") as directory:
        stage, made = Path(directory, "root"), Path(directory, "deb")
        for one in files:
            _place(stage / one.path, one)
        for path in package.directories:
            (stage / path).mkdir(parents=True, exist_ok=True)
        _compile(stage, package.library)
        installed = sorted(stage.rglob("*"))
        _write_control(stage, package, version, files, installed)
        _set_times_and_modes(stage, files, epoch_s)
        # Fast, and small enough; a fixed number of threads, since one gives other bytes than more.
        options = ["-Zzstd", "-z3", "--threads-max=2", "--root-owner-group"]
        subprocess.run(
            ["dpkg-deb", *options, "--build", str(stage), str(made)],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "SOURCE_DATE_EPOCH": str(epoch_s), "LC_ALL": "C.UTF-8"},
        )
        made.replace(deb)
        return sum(path.stat().st_size for path in installed if path.is_file())


def _place(target: Path, one: File) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(one.source, bytes):
        target.write_bytes(one.source)
    else:
        shutil.copyfile(one.source, target)


def _compile(stage: Path, library: str) -> None:
    """Compile all modules for good: compiled files that are never checked against the source.

    Read-only images cannot compile later, and times of files mean nothing there.
    """
    paths = sorted(str(path) for path in (stage / library).rglob("*.py"))
    options = ["--invalidation-mode", "unchecked-hash", "-s", str(stage), "-p", "/"]
    argv = [sys.executable, "-SP", "-m", "compileall", "-q", *options, "-i", "-"]
    env = {"LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"}
    waiting = [paths[first::_COMPILE_SLICES] for first in range(_COMPILE_SLICES)]
    while waiting:
        batch = [waiting.pop() for _ in range(min(len(waiting), os.cpu_count() or 1))]
        running = []
        for names in batch:
            process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, text=True, env=env, cwd="/"
            )
            assert process.stdin is not None
            process.stdin.write("\n".join(names))
            process.stdin.close()
            running.append(process)
        failed = [process for process in running if process.wait() != 0]
        if failed:
            sys.exit("contrib/deb/build: error: a module does not compile")


def _write_control(
    stage: Path,
    package: Package,
    version: str,
    files: Sequence[File],
    installed: Iterable[Path],
) -> None:
    regular = [path for path in installed if path.is_file()]
    kib = sum(-(-path.stat().st_size // 1024) for path in regular)
    kib += sum(1 for path in installed if path.is_dir())
    target = stage / "DEBIAN"
    target.mkdir()
    text = documents.control(
        package,
        version,
        architecture=architecture(),
        libc=_needed_glibc(regular),
        installed_kib=kib,
    )
    (target / "control").write_text(text)
    sums = "".join(
        f"{_md5(path)}  {path.relative_to(stage)}\n" for path in sorted(regular)
    )
    (target / "md5sums").write_text(sums)
    enabled, others = units_of(files)
    words = {
        "@ENABLED_UNITS@": " ".join(enabled),
        "@OTHER_UNITS@": " ".join(others),
    }
    for name in ("sysusers.d", "tmpfiles.d"):
        found = [Path(one.path).name for one in files if f"lib/{name}/" in one.path]
        words[f"@{name.removesuffix('.d').upper()}@"] = " ".join(found)
    for name in _SCRIPTS:
        source = Path(__file__).parent / package.name / name
        if source.exists():
            text = source.read_text()
            for word, value in words.items():
                text = text.replace(word, value)
            (target / name).write_text(text)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _needed_glibc(paths: Iterable[Path]) -> str:
    """Return the newest glibc version whose symbols any of these libraries needs."""
    minors = {17}
    for path in paths:
        if ".so" in path.suffixes:
            minors |= {int(found) for found in _GLIBC.findall(path.read_bytes())}
    return f"2.{max(minors)}"


def _set_times_and_modes(stage: Path, files: Sequence[File], epoch_s: int) -> None:
    modes = {stage / one.path: one.mode for one in files}
    for path in (stage, *stage.rglob("*")):
        script = path.parent == stage / "DEBIAN" and path.name in _SCRIPTS
        default = 0o755 if path.is_dir() or script else 0o644
        path.chmod(modes.get(path, default))
        os.utime(path, (epoch_s, epoch_s))
