"""Builds the measured guest image: a disk, its UKI, and what is in them.

Usage: python -m contrib.guest.image.build [--config DIRECTORY] [--package FILE] [--test]

`make guest-image` calls it after `make deb`. The same packages give the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from contrib.guest.cache import ROOT, Inputs, made
from contrib.guest.image.base import EPOCH_S, base_directory
from contrib.guest.image.disk_image import UKI_PATH, Partition, make_disk
from contrib.guest.image.initrd import make_initrd
from contrib.guest.image.kept import CONTENTS
from contrib.guest.image.programs import output, run
from contrib.guest.image.rootfs import BLOCK_BYTES, Root, make_root, make_tree
from contrib.guest.image.uki import make_uki
from tdxd import __version__

__all__ = ["MeasuredImage", "build_product", "build_test", "built_package", "main"]

_HERE = Path(__file__).parent
_STUB = "boot/usr/lib/systemd/boot/efi/linuxx64.efi.stub"
_FORMAT = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredImage:
    """Files below the cache; none may be written to."""

    disk: Path
    uki: Path
    facts: Path

    def read_facts(self) -> dict[str, Any]:
        """Return what `facts` says."""
        shown: dict[str, Any] = json.loads(self.facts.read_text(encoding="utf-8"))
        return shown


def build_product(
    packages: Sequence[Path], config: Path | None = None
) -> MeasuredImage:
    """Build, or take from the cache, the image for real machines, with these .deb files.

    `config` is a directory with `tdxd.toml` for /etc/tdxd; without, MRCONFIGID must pin what lies
    on the data disk.
    """
    return _image("product", packages, config)


def build_test(packages: Sequence[Path]) -> MeasuredImage:
    """Build, or take from the cache, the image of the tests, which its host controls."""
    return _image("test", packages, None)


def built_package() -> Path:
    """Return tdxd's package as `make deb` left it.

    Raises: SystemExit, if it is missing.
    """
    package = ROOT / "build" / "deb" / f"tdxd_{__version__}_amd64.deb"
    if not package.exists():
        raise SystemExit(f"guest-image: {package} is missing: run make deb")
    return package


def main() -> None:
    """Build what the command line asks for, copy it, and say what it is."""
    parser = argparse.ArgumentParser(prog="python -m contrib.guest.image.build")
    parser.add_argument("--config", type=Path, help="directory for /etc/tdxd")
    parser.add_argument("--package", type=Path, action="append", default=[])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "guest-image")
    parser.add_argument("--test", action="store_true", help="the image of the tests")
    given = parser.parse_args()
    packages = [built_package(), *(one.resolve() for one in given.package)]
    build = build_test if given.test else partial(build_product, config=given.config)
    image = build(packages)
    given.output.mkdir(parents=True, exist_ok=True)
    for path in (image.disk, image.uki, image.facts):
        run("cp", "--sparse=always", "--", path, given.output / path.name)
    _show(image.read_facts(), given.output)


def _image(
    variant: str, packages: Sequence[Path], config: Path | None
) -> MeasuredImage:
    os.umask(0o022)
    base = base_directory(variant)
    inputs = Inputs("measured-" + variant, base.name, EPOCH_S).tree(_HERE)
    for package in packages:
        inputs.files([package], package.parent)
    if config is not None:
        inputs.tree(config)
    name = "tdxd-guest" if variant == "product" else f"tdxd-guest-{variant}"
    directory = made(
        inputs,
        lambda place: _Build(variant, base, place, name).run(packages, config),
    )
    return MeasuredImage(
        disk=directory / f"{name}.raw",
        uki=directory / f"{name}.efi",
        facts=directory / f"{name}.json",
    )


class _Build:
    """One build, in a directory that is empty at first."""

    def __init__(self, variant: str, base: Path, directory: Path, name: str) -> None:
        self.variant, self.base, self.directory = variant, base, directory
        self.name = name
        self.tree = directory / "tree"

    def run(self, packages: Sequence[Path], config: Path | None) -> None:
        test = self.variant == "test"
        release = make_tree(
            self.base,
            self.tree,
            packages,
            overlay=_HERE / "test" if test else None,
            config=config,
        )
        root = make_root(self.tree, self.directory / "root")
        words = [CONTENTS["command_line"]]
        if test:
            words.append(CONTENTS["test"]["command_line"])
        words += [f"roothash={root.root_hash}", f"tdxd.root_blocks={root.blocks}"]
        command_line = " ".join(" ".join(words).split())
        sections = self._write_uki(release, command_line)
        uki, disk = self._file("efi"), self._file("raw")
        partitions = make_disk(uki, root.partition, root.root_hash, disk)
        facts = {
            "format": _FORMAT,
            "name": "tdxd-guest",
            "variant": self.variant,
            "version": __version__,
            "config": "beside" if config is None else "inside",
            "command_line": command_line,
            "root_hash": root.root_hash,
            "root_blocks": root.blocks,
            "kernel_release": release,
            "uki": {"path": UKI_PATH, **_described(uki), "sections": sections},
            "disk": _disk_facts(disk, partitions),
            "rootfs": _rootfs_facts(root),
            "packages": _packages(self.base, packages),
            "boot_parts": _boot_parts(self.base),
        }
        text = json.dumps(facts, indent=1) + "\n"
        self._file("json").write_text(text, encoding="utf-8")
        shutil.rmtree(self.tree)
        root.partition.unlink()

    def _file(self, kind: str) -> Path:
        return self.directory / f"{self.name}.{kind}"

    def _write_uki(self, release: str, command_line: str) -> dict[str, Any]:
        kernel = self.base / "boot/boot" / f"vmlinuz-{release}"
        initrd = make_initrd(self.base, self.tree, release, command_line)
        parts = {
            ".osrel": (self.tree / "usr/lib/os-release").read_bytes(),
            ".uname": release.encode(),
            ".cmdline": command_line.encode(),
            ".linux": kernel.read_bytes(),
            ".initrd": initrd,
        }
        uki, sections = make_uki((self.base / _STUB).read_bytes(), parts)
        self._file("efi").write_bytes(uki)
        return {name: dataclasses.asdict(one) for name, one in sections.items()}


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "size_bytes": path.stat().st_size, "sha256": digest}


def _disk_facts(disk: Path, partitions: Sequence[Partition]) -> dict[str, Any]:
    shown = [dataclasses.asdict(one) for one in partitions]
    return {**_described(disk), "partitions": shown}


def _rootfs_facts(root: Root) -> dict[str, int]:
    whole = root.partition.stat().st_size
    data = root.blocks * BLOCK_BYTES
    return {"file_system_bytes": data, "hash_tree_bytes": whole - data}


def _packages(base: Path, packages: Sequence[Path]) -> list[dict[str, str]]:
    """Return the installed packages; the image has no dpkg to ask."""
    form = "${Package} ${Version} ${Architecture}\n"
    with_ours = [
        output("dpkg-deb", "--show", f"--showformat={form}", one) for one in packages
    ]
    listed = (base / "packages.list").read_text(encoding="utf-8")
    lines = sorted([*listed.splitlines(), *"".join(with_ours).splitlines()])
    names = ("name", "version", "architecture")
    return [dict(zip(names, line.split(), strict=True)) for line in lines]


def _boot_parts(base: Path) -> list[dict[str, str]]:
    lines = (base / "boot.list").read_text(encoding="utf-8").splitlines()
    names = ("package", "version", "sha256")
    return [dict(zip(names, line.split(), strict=True)) for line in lines]


def _show(facts: dict[str, Any], place: Path) -> None:
    for one in facts["packages"]:
        print(f"  {one['name']} {one['version']}")
    for part in facts["boot_parts"]:
        print(f"  {part['package']} {part['version']} (boots it)")
    mib = {
        "root file system": facts["rootfs"]["file_system_bytes"],
        "hash tree": facts["rootfs"]["hash_tree_bytes"],
        "UKI": facts["uki"]["size_bytes"],
        "disk": facts["disk"]["size_bytes"],
    }
    print(f"{len(facts['packages'])} packages; command line: {facts['command_line']}")
    print(", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in mib.items()))
    print(f"{place / facts['disk']['file']}: {facts['disk']['sha256']}")


if __name__ == "__main__":
    main()
