"""The disk that a cloud imports: an EFI system partition with the UKI, and the root partition."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import uuid
from pathlib import Path

from contrib.guest.image.base import EPOCH_S
from contrib.guest.image.programs import run

__all__ = ["UKI_PATH", "Partition", "make_disk"]

UKI_PATH = "/EFI/BOOT/BOOTX64.EFI"
_MIB = 2**20
_SECTOR_BYTES = 512
_ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
_LINUX_TYPE = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition; its identifiers follow from the image's content."""

    name: str
    type: str
    uuid: str
    first_byte: int
    size_bytes: int


def make_disk(uki: Path, root: Path, root_hash: str, disk: Path) -> list[Partition]:
    """Write a raw GPT disk. The same parts give the same bytes."""
    esp = disk.with_suffix(".esp")
    _make_esp(uki, esp, serial=root_hash[:8])
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, root_hash)
    partitions = []
    start = _MIB
    for name, kind, source in (
        ("esp", _ESP_TYPE, esp),
        ("tdxd-root", _LINUX_TYPE, root),
    ):
        size_bytes = -(-source.stat().st_size // _MIB) * _MIB
        one = Partition(
            name=name,
            type=kind,
            uuid=str(uuid.uuid5(identity, name)),
            first_byte=start,
            size_bytes=size_bytes,
        )
        partitions.append(one)
        start += size_bytes
    with disk.open("wb") as file:
        file.truncate(start + _MIB)  # room for the second table
    _write_table(disk, str(identity), partitions)
    for one, source in zip(partitions, (esp, root), strict=True):
        run(
            *("dd", f"if={source}", f"of={disk}", "bs=1M", "conv=notrunc,sparse"),
            *(f"seek={one.first_byte // _MIB}", "status=none"),
        )
    esp.unlink()
    return partitions


def _make_esp(uki: Path, esp: Path, *, serial: str) -> None:
    size_bytes = -(-(uki.stat().st_size * 17 // 16) // _MIB) * _MIB + 33 * _MIB
    with esp.open("wb") as file:
        file.truncate(size_bytes)
    epoch = {"SOURCE_DATE_EPOCH": str(EPOCH_S)}
    label = ("-F", "32", "-n", "ESP", "-i", serial, "--invariant")
    run("mkfs.fat", *label, esp, **epoch)
    tree = esp.with_suffix(".d")
    place = tree / UKI_PATH.lstrip("/")
    place.parent.mkdir(parents=True)
    shutil.copy(uki, place)
    # mtools writes the times of the files that it copies.
    run("find", tree, "-exec", "touch", "--date", f"@{EPOCH_S}", "{}", "+")
    run("mcopy", "-m", "-s", "-i", esp, tree / "EFI", "::", **epoch)
    shutil.rmtree(tree)


def _write_table(disk: Path, identity: str, partitions: list[Partition]) -> None:
    lines = ["label: gpt", f"label-id: {identity}", "unit: sectors"]
    lines += [
        f"start={one.first_byte // _SECTOR_BYTES}, size={one.size_bytes // _SECTOR_BYTES}, "
        f'type={one.type}, uuid={one.uuid}, name="{one.name}"'
        for one in partitions
    ]
    subprocess.run(
        ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(disk)],
        input="\n".join(lines) + "\n",
        check=True,
        text=True,
        timeout=60,
    )
