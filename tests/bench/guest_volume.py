"""Runs inside the guest: opens and reads one sealed image beside one made the reference's way.

Usage: python3 -m tests.bench.guest_volume SEALED.img SEALED.bundle PLAIN.luks PASSPHRASE_FILE
Prints one JSON object of seconds and bytes per second. The reference's way is its mount script's:
losetup, cryptsetup luksOpen, mount. What opening costs there is the key derivation, whose cost
cryptsetup chooses by measuring the machine it formats on: so the keyslot is made anew here first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from tdxd.core import dm_table
from tdxd.core.bundle import KeyBundle
from tdxd.host import dm, dm_map, keyring, loop
from tdxd.host.dm_map import DmMapper
from tdxd.host.mount import KernelMounts
from tdxd.host.ports import MappedVolume
from tdxd.host.workers import never

OURS, THEIRS, THEIR_NAME = "/run/bench-ours", "/run/bench-theirs", "bench-reference"
OPENS = 5
READS = 3
RANDOM_BYTES = 8 * 2**20
Stages = dict[str, float]
"""Seconds by name, in the order of the work."""


def run(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


class Clock:
    """Adds up what the stages of one opening take."""

    def __init__(self) -> None:
        self.stages: Stages = defaultdict(float)
        self._start_s = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start_s = time.monotonic()
        yield
        self.stages[name] += time.monotonic() - start_s

    def whole(self) -> Stages:
        spent_s = time.monotonic() - self._start_s
        rest_s = spent_s - sum(self.stages.values())
        return {**self.stages, "rest": rest_s, "whole": spent_s}


STEPS: tuple[tuple[ModuleType, str], ...] = (
    (dm_map, "volume_key"),
    (dm_map, "check_root"),
    (loop, "attach"),
    (keyring, "logon_key"),
    (dm, "create"),
)
CONTEXTS = ("volume_key", "logon_key")
"""Steps with an end of their own, which counts as the rest."""


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time the mapper's steps where it calls them."""
    kept = [(module, name, getattr(module, name)) for module, name in STEPS]
    for module, name, step in kept:
        watch = entered if name in CONTEXTS else timed
        setattr(module, name, watch(clock, name, step))
    try:
        yield
    finally:
        for module, name, step in kept:
            setattr(module, name, step)


def timed(clock: Clock, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        layer = f" {args[1].rpartition('-')[2]}" if name == "create" else ""
        with clock.stage(name + layer):
            return step(*args, **options)

    return call


def entered(clock: Clock, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
    @contextmanager
    def call(*args: Any, **options: Any) -> Iterator[Any]:
        with ExitStack() as stack:
            with clock.stage(name):
                value = stack.enter_context(step(*args, **options))
            yield value

    return call


def sealed(image: str, bundle_path: str) -> tuple[MappedVolume, Stages]:
    """Map and mount the sealed image; return the seconds from the key in hand."""
    bundle = KeyBundle.parse(Path(bundle_path).read_bytes())
    clock = Clock()
    with watched(clock):
        mapped = DmMapper().map_volume(image, bundle, cancelled=never)
    with clock.stage("mount"):
        KernelMounts().mount_volume(mapped, OURS)
    return mapped, clock.whole()


def close_sealed(mapped: MappedVolume) -> None:
    KernelMounts().unmount(OURS)
    DmMapper().unmap(mapped)


def reference(image: str, passphrase_path: str) -> tuple[str, Stages]:
    os.makedirs(THEIRS, exist_ok=True)
    clock = Clock()
    with clock.stage("losetup"):
        device = run("losetup", "-f", "--show", image).strip()
    with clock.stage("luksOpen"):
        key = ("--key-file", passphrase_path)
        run("cryptsetup", "luksOpen", *key, device, THEIR_NAME)
    with clock.stage("mount"):
        run("mount", "-o", "ro", f"/dev/mapper/{THEIR_NAME}", THEIRS)
    return device, clock.whole()


def close_reference(device: str) -> None:
    run("umount", THEIRS)
    run("cryptsetup", "close", THEIR_NAME)
    run("losetup", "-d", device)


@contextmanager
def both(paths: list[str]) -> Iterator[MappedVolume]:
    mapped, _ = sealed(paths[0], paths[1])
    try:
        device, _ = reference(paths[2], paths[3])
        try:
            yield mapped
        finally:
            close_reference(device)
    finally:
        close_sealed(mapped)


def opening(paths: list[str]) -> dict[str, Stages]:
    """Open each in turns; return the stages of the median of each."""
    run(
        "cryptsetup", "luksConvertKey", "--batch-mode", "--key-file", paths[3], paths[2]
    )
    ours, theirs = [], []
    for _ in range(OPENS):
        mapped, stages = sealed(paths[0], paths[1])
        close_sealed(mapped)
        ours.append(stages)
        device, stages = reference(paths[2], paths[3])
        close_reference(device)
        theirs.append(stages)
    return {"open": median(ours), "reference_open": median(theirs)}


def median(seen: list[Stages]) -> Stages:
    return sorted(seen, key=lambda stages: stages["whole"])[len(seen) // 2]


SEQUENTIAL = ("--rw=read", "--bs=1M")
RANDOM = ("--rw=randread", "--bs=4k", "--direct=1", f"--io_size={RANDOM_BYTES}")


def read_rate(path: str, how: tuple[str, ...]) -> float:
    """Bytes per second of one cold read by fio, one request at a time."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    argv = ["fio", "--name=read", "--readonly", "--ioengine=psync", *how]
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
    ours, theirs = largest(OURS), largest(THEIRS)
    layers = (node(mapped, "crypt"), f"/dev/mapper/{THEIR_NAME}")
    ways: dict[str, tuple[str, tuple[str, ...]]] = {
        "sequential": (ours, SEQUENTIAL),
        "reference_sequential": (theirs, SEQUENTIAL),
        "random": (ours, RANDOM),
        "reference_random": (theirs, RANDOM),
        "crypt": (layers[0], SEQUENTIAL),
        "reference_crypt": (layers[1], SEQUENTIAL),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(READS):
        for name, (path, how) in ways.items():
            rates[name].append(read_rate(path, how))
    return {name: statistics.median(one) for name, one in rates.items()}


def main() -> None:
    paths = sys.argv[1:5]
    figures: dict[str, object] = dict(opening(paths))
    with both(paths) as mapped:
        figures["bytes_per_s"] = reading(mapped)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
