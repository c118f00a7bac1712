"""The read-only root file system: a tree of Debian's packages and ours, erofs, its hash tree."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path

from contrib.guest.image.base import EPOCH_S
from contrib.guest.image.kept import CONTENTS, keep_modules, keep_named
from contrib.guest.image.programs import output, run

__all__ = ["BLOCK_BYTES", "Root", "make_root", "make_tree"]

BLOCK_BYTES = 4096
_HERE = Path(__file__).parent
_UUID = uuid.uuid5(uuid.NAMESPACE_DNS, "tdxd-guest root file system")
_BESIDE = "/srv/config"
"""Where the configuration lies on the data disk, if it is not in the image."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """`partition` holds the file system and, from block `blocks` on, its hash tree."""

    partition: Path
    blocks: int
    root_hash: str


def make_tree(
    base: Path,
    tree: Path,
    packages: Sequence[Path],
    *,
    overlay: Path | None,
    config: Path | None,
) -> str:
    """Fill `tree`; return the kernel's release. `overlay` is that of the tests."""
    tree.mkdir(mode=0o755)
    run("tar", "--extract", "--file", base / "base.tar", "--directory", tree)
    _install(packages, tree)
    release = _kernel(base, tree)
    test = overlay is not None
    keep_named(tree, test=test)
    for source in (_HERE / "root", *([overlay] if overlay else [])):
        run("cp", "-rT", "--no-preserve=all", source, tree)
        for path in source.rglob("*"):  # of the modes only this one counts
            if path.is_file() and path.stat().st_mode & 0o100:
                (tree / path.relative_to(source)).chmod(0o755)
    _configure(tree, config)
    enabled = list(CONTENTS["enabled"])
    if test:
        _make_places(tree)
        enabled += CONTENTS["test"]["enabled"]
    run("chroot", tree, "systemctl", "--quiet", "enable", *enabled)
    _compile(tree)
    return release


def _install(packages: Sequence[Path], tree: Path) -> None:
    """Install as a person would, with /proc there and nothing left mounted or running."""
    place = tree / "packages"
    place.mkdir()
    for package in packages:
        shutil.copy(package, place)
    names = [f"/packages/{package.name}" for package in packages]
    jail = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
    run(
        *(*jail, f"--mount-proc={tree}/proc", "chroot", tree),
        *("dpkg", "--install", *names),
        DEBIAN_FRONTEND="noninteractive",
        SOURCE_DATE_EPOCH=str(EPOCH_S),
    )
    shutil.rmtree(place)


def _kernel(base: Path, tree: Path) -> str:
    """Place the modules that the image needs; return the kernel's release."""
    (source,) = (base / "boot/lib/modules").iterdir()
    modules = tree / "usr/lib/modules" / source.name
    shutil.copytree(source, modules)
    run("chroot", tree, "depmod", source.name)
    keep_modules(modules, CONTENTS["modules"])
    run("chroot", tree, "depmod", source.name)
    return source.name


def _configure(tree: Path, config: Path | None) -> None:
    """Put the configuration in, or a link to where MRCONFIGID vouches for it."""
    place = tree / "etc/tdxd"
    place.rmdir()
    if config is None:
        place.symlink_to(_BESIDE)
    else:
        run("cp", "-rT", "--no-preserve=all", config, place)
    system = tree / "etc/systemd/system"
    system.mkdir(parents=True, exist_ok=True)
    # Where something would open a shell, the machine ends.
    for name in ("emergency.target", "rescue.target", "ctrl-alt-del.target"):
        (system / name).symlink_to("/usr/lib/systemd/system/poweroff.target")
    (system / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    resolv = tree / "etc/resolv.conf"
    resolv.unlink()
    resolv.symlink_to("../run/systemd/resolve/resolv.conf")


def _make_places(tree: Path) -> None:
    """Make what the disks of the tests are mounted over."""
    for name in CONTENTS["test"]["places"]:
        (tree / name).mkdir(parents=True)
    for name in CONTENTS["test"]["program_places"]:
        (tree / name).touch()


def _compile(tree: Path) -> None:
    """Compile Debian's Python for good: times mean nothing in the image."""
    for cache in tree.glob("usr/lib/python3*/**/__pycache__"):
        shutil.rmtree(cache)
    options = ("-q", "--invalidation-mode", "unchecked-hash")
    places = sorted(tree.glob("usr/lib/python3*"))
    names = [f"/{place.relative_to(tree)}" for place in places]
    python = ("python3", "-ISB", "-m", "compileall")
    run("chroot", tree, *python, *options, *names, PYTHONHASHSEED="0")


def make_root(tree: Path, partition: Path) -> Root:
    """Write the file system and its hash tree. The same tree gives the same bytes."""
    options = ("-zlz4hc", "-x-1", f"-T{EPOCH_S}", f"-U{_UUID}", "--all-root", "--quiet")
    run("mkfs.erofs", *options, partition, tree)
    blocks, rest = divmod(partition.stat().st_size, BLOCK_BYTES)
    if rest:
        blocks += 1
        with partition.open("r+b") as file:
            file.truncate(blocks * BLOCK_BYTES)
    text = output(
        *("veritysetup", "format", "--no-superblock", "--salt=-", "--hash=sha256"),
        *(f"--data-block-size={BLOCK_BYTES}", f"--hash-block-size={BLOCK_BYTES}"),
        *(f"--data-blocks={blocks}", f"--hash-offset={blocks * BLOCK_BYTES}"),
        *(str(partition), str(partition)),
    )
    found = re.search(r"^Root hash:\s+([0-9a-f]{64})$", text, re.MULTILINE)
    if found is None:
        raise subprocess.SubprocessError(f"veritysetup: no root hash in {text!r}")
    return Root(partition=partition, blocks=blocks, root_hash=found[1])
