"""The files of a package: where each comes from, and where it goes."""

from __future__ import annotations

import dataclasses
import fnmatch
import gzip
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from contrib.completions.bash import completion
from contrib.deb import distributions, documents
from contrib.deb.imports import closure, modules_below, strings_passed_to
from contrib.deb.packages import Package

__all__ = ["ROOT", "File", "contents", "fingerprint", "packaged_modules", "units_of"]

ROOT = Path(__file__).resolve().parents[2]
_SYSTEMD = {
    "sysusers.d": "usr/lib/sysusers.d",
    "tmpfiles.d": "usr/lib/tmpfiles.d",
    "modules-load.d": "usr/lib/modules-load.d",
    "system-preset": "usr/lib/systemd/system-preset",
    "udev": "usr/lib/udev/rules.d",
}
_MESSAGES = "tdxd.host.tf_messages"
_LAUNCHER = """\
#!/usr/bin/python3 -IS
import sys

sys.path.insert(0, "/{library}")
from {module} import main

sys.exit(main())
"""


@dataclasses.dataclass(frozen=True, slots=True)
class File:
    """A file of a package: its path below /, its content or where that is, its mode."""

    path: str
    source: bytes | Path
    mode: int = 0o644

    def content(self) -> bytes:
        """Return what is in it."""
        if isinstance(self.source, bytes):
            return self.source
        return self.source.read_bytes()


def contents(package: Package, version: str, epoch_s: int) -> tuple[File, ...]:
    """Return the files of a package, sorted; compiled modules are yet to be added."""
    modules, outside = packaged_modules(package)
    messages, needed = _messages(modules)
    names = distributions.with_requirements(
        distributions.holders(outside | needed), package.left_out_distributions
    )
    library: dict[str, bytes | Path] = {**messages}
    generated = {"tensorflow", "tensorflow-serving-api"} if messages else set()
    for name in sorted(names):
        library |= distributions.runtime_files(name)
    for name in sorted(names | generated):
        library |= distributions.record(name)
    library |= {str(path.relative_to(ROOT)): path for path in modules.values()}
    library["tdxd/__init__.py"] = _versioned(version)
    files = [
        File(f"{package.library}/{path}", source)
        for path, source in library.items()
        if not any(fnmatch.fnmatch(path, one) for one in package.left_out_files)
    ]
    files += _programs(package)
    files += _system_files(package)
    files += _man_pages(package)
    about = documents.copyright_file(package, names | generated, epoch_s)
    files += _documents(package, version, epoch_s, about)
    files += _licences(package, names)
    return tuple(sorted(files, key=lambda one: one.path))


def fingerprint(files: Iterable[File]) -> str:
    """Return a hash of all paths, modes and contents."""
    whole = hashlib.sha256()
    for one in files:
        if isinstance(one.source, bytes):
            digest = hashlib.sha256(one.source)
        else:
            with one.source.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
        whole.update(f"{one.path}\0{one.mode}\0{digest.hexdigest()}\n".encode())
    return whole.hexdigest()


def packaged_modules(package: Package) -> tuple[dict[str, Path], set[str]]:
    """Return the modules of tdxd that a package holds, and the names of what they import."""
    starts = set(package.programs.values())
    for part in package.parts:
        starts |= modules_below(ROOT, part)
    return closure(ROOT, starts, ("tdxd",))


def _messages(modules: dict[str, Path]) -> tuple[dict[str, Path], set[str]]:
    """Return the files of TensorFlow's messages, and what they import.

    `tdxd.host.tf_messages` loads them by name, past TensorFlow's own `__init__`.
    """
    if _MESSAGES not in modules:
        return {}, set()
    text = modules[_MESSAGES].read_text(encoding="utf-8")
    starts = strings_passed_to(text, "_load")
    root = distributions.site()
    tops = ("tensorflow", "tensorflow_serving")
    found, outside = closure(root, starts, tops, without=("tensorflow",))
    missing = starts - found.keys()
    if missing:
        message = f"no message modules {sorted(missing)} are installed"
        raise LookupError(message)
    return {str(path.relative_to(root)): path for path in found.values()}, outside


def _versioned(version: str) -> bytes:
    text = (ROOT / "tdxd" / "__init__.py").read_text(encoding="utf-8")
    text, count = re.subn(
        r'^__version__ = ".*"$', f'__version__ = "{version}"', text, flags=re.MULTILINE
    )
    assert count == 1, "tdxd/__init__.py states no version"
    return text.encode()


def _programs(package: Package) -> Iterator[File]:
    for name, module in package.programs.items():
        text = _LAUNCHER.format(library=package.library, module=module)
        yield File(f"usr/bin/{name}", text.encode(), 0o755)
        completed = completion(name, module)
        if completed is not None:
            path = f"usr/share/bash-completion/completions/{name}"
            yield File(path, completed.encode())


def _system_files(package: Package) -> Iterator[File]:
    """Yield what systemd/ holds for this package: tdx-keyd's for the owner, the rest for guests."""
    owner = {"tdxd": False, "tdxd-owner": True}
    if package.name not in owner:
        return
    for path in sorted((ROOT / "systemd").rglob("*")):
        if not path.is_file() or _is_of_owner(path) != owner[package.name]:
            continue
        folder = path.parent.name
        if path.parent == ROOT / "systemd":
            target = "usr/lib/systemd/system"
        elif folder.endswith((".service.d", ".socket.d")):
            target = f"usr/lib/systemd/system/{folder}"
        else:
            target = _SYSTEMD[folder]
        yield File(f"{target}/{path.name}", path)


def _is_of_owner(path: Path) -> bool:
    return any(
        part.startswith("tdx-keyd") for part in path.relative_to(ROOT / "systemd").parts
    )


def units_of(files: Iterable[File]) -> tuple[list[str], list[str]]:
    """Return the installable units among files: those that the preset enables, and the others."""
    presets = [path.read_text() for path in (ROOT / "systemd").rglob("*.preset")]
    wanted = set(re.findall(r"^enable (\S+)$", "\n".join(presets), re.MULTILINE))
    enabled: list[str] = []
    others: list[str] = []
    for one in files:
        folder, _, name = one.path.rpartition("/")
        if folder == "usr/lib/systemd/system" and b"\n[Install]\n" in one.content():
            (enabled if name in wanted else others).append(name)
    return enabled, others


def _man_pages(package: Package) -> Iterator[File]:
    for name in package.man_pages:
        text = (ROOT / "contrib" / "man" / name).read_bytes()
        path = f"usr/share/man/man{name[-1]}/{name}.gz"
        yield File(path, packed(text))


def packed(data: bytes) -> bytes:
    """Compress as `gzip -9n` does: without name and time."""
    return gzip.compress(data, 9, mtime=0)


def _documents(
    package: Package, version: str, epoch_s: int, about: bytes
) -> Iterator[File]:
    folder = f"usr/share/doc/{package.name}"
    yield File(f"{folder}/copyright", about)
    changelog = documents.changelog(package, version, epoch_s)
    yield File(f"{folder}/changelog.gz", packed(changelog))
    whole = (ROOT / "CHANGELOG.md").read_bytes()
    yield File(f"{folder}/CHANGELOG.md.gz", packed(whole))
    here = Path(__file__).parent
    readme = here / package.name / "README.Debian"
    if readme.exists():
        yield File(f"{folder}/README.Debian", readme)
    for example in package.examples:
        path = here / example
        yield File(f"{folder}/examples/{path.name}", path)
    if package.monitoring:
        yield File(f"{folder}/monitoring/README.md", ROOT / "docs" / "monitoring.md")
    for name in package.monitoring:
        path = ROOT / "contrib" / "monitoring" / name
        yield File(f"{folder}/monitoring/{name}", path)


def _licences(package: Package, names: set[str]) -> Iterator[File]:
    for name in names:
        for title, path in distributions.licence_files(name).items():
            folder = f"usr/share/doc/{package.name}/licenses/{name}"
            yield File(f"{folder}/{title}", path)
