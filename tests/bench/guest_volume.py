"""Runs inside the guest: opens and reads one sealed image beside one made the reference's way.

Usage: python3 -m tests.bench.guest_volume SEALED.img SEALED.bundle PLAIN.luks PASSPHRASE_FILE
Prints one JSON object of seconds and bytes per second. The reference's way is its mount script's:
losetup, cryptsetup luksOpen of an image formatted with cryptsetup's defaults, mount.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tdxd.core import dm_table
from tdxd.core.bundle import KeyBundle
from tdxd.host.dm_map import DmMapper
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import MappedVolume
from tdxd.host.workers import never

OURS, THEIRS, THEIR_NAME = "/run/bench-ours", "/run/bench-theirs", "bench-reference"
OPENS = 5
READS = 3


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def sealed(image: str, bundle_path: str) -> tuple[MappedVolume, float]:
    """Map and mount the sealed image; return the seconds from the key in hand."""
    bundle = KeyBundle.parse(Path(bundle_path).read_bytes())
    start_s = time.monotonic()
    mapped = DmMapper().map_volume(image, bundle, cancelled=never)
    KernelMounts().mount_volume(mapped, OURS)
    return mapped, time.monotonic() - start_s


def close_sealed(mapped: MappedVolume) -> None:
    KernelMounts().unmount(OURS)
    DmMapper().unmap(mapped)


def reference(image: str, passphrase_path: str) -> tuple[str, float]:
    os.makedirs(THEIRS, exist_ok=True)
    start_s = time.monotonic()
    loop = run("losetup", "-f", "--show", image).strip()
    run("cryptsetup", "luksOpen", "--key-file", passphrase_path, loop, THEIR_NAME)
    run("mount", "-o", "ro", f"/dev/mapper/{THEIR_NAME}", THEIRS)
    return loop, time.monotonic() - start_s


def close_reference(loop: str) -> None:
    run("umount", THEIRS)
    run("cryptsetup", "close", THEIR_NAME)
    run("losetup", "-d", loop)


@contextmanager
def both(paths: list[str]) -> Iterator[MappedVolume]:
    mapped, _ = sealed(paths[0], paths[1])
    try:
        loop, _ = reference(paths[2], paths[3])
        try:
            yield mapped
        finally:
            close_reference(loop)
    finally:
        close_sealed(mapped)


def opening(paths: list[str]) -> dict[str, float]:
    """Medians of opening each, in turns."""
    ours, theirs = [], []
    for _ in range(OPENS):
        mapped, seconds = sealed(paths[0], paths[1])
        close_sealed(mapped)
        ours.append(seconds)
        loop, seconds = reference(paths[2], paths[3])
        close_reference(loop)
        theirs.append(seconds)
    return {
        "open_s": statistics.median(ours),
        "reference_open_s": statistics.median(theirs),
    }


def read_rate(path: str) -> float:
    """Bytes per second of one cold sequential read, by fio in requests of 1 MiB."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    argv = [
        "fio",
        "--name=read",
        "--rw=read",
        "--bs=1M",
        "--readonly",
        "--ioengine=psync",
    ]
    shown = json.loads(run(*argv, f"--filename={path}", "--output-format=json"))
    rate: float = shown["jobs"][0]["read"]["bw_bytes"]
    return rate


def largest(directory: str) -> str:
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return str(max(files, key=lambda path: path.stat().st_size))


def node(mapped: MappedVolume, layer: dm_table.Layer) -> str:
    """Return the block device of one layer."""
    uuid = dm_table.device_uuid(mapped.manifest, layer)
    for entry in Path("/sys/block").glob("dm-*/dm/uuid"):
        if entry.read_text().strip() == uuid:
            return f"/dev/{entry.parents[1].name}"
    raise LookupError(uuid)


def reading(mapped: MappedVolume) -> dict[str, float]:
    """Medians of reading the same content through each layer, in turns."""
    size = os.path.getsize(largest(THEIRS))
    ways: dict[str, Callable[[], float]] = {
        "mounted": lambda: read_rate(largest(OURS)),
        "reference_mounted": lambda: read_rate(largest(THEIRS)),
        "crypt": lambda: read_rate(node(mapped, "crypt")),
        "reference_crypt": lambda: read_rate(f"/dev/mapper/{THEIR_NAME}"),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(READS):
        for name, way in ways.items():
            rates[name].append(way())
    found = {
        f"{name}_bytes_per_s": statistics.median(one) for name, one in rates.items()
    }
    return {**found, "size_bytes": float(size)}


def main() -> None:
    paths = sys.argv[1:5]
    figures = opening(paths)
    with both(paths) as mapped:
        figures.update(reading(mapped))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
