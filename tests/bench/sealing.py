"""Making an image: tdx-seal create beside mkfs.erofs and cryptsetup; memory for a large one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.bench.measure import paired, peak_memory

__all__ = ["rows"]

_MIB, _GIB = 2**20, 2**30
_SIZE_BYTES = _GIB
_PAIRS = 5
_CORES = 2
_LARGE_GIB, _LESS_GIB = 20, 5
_SPARE_BYTES = 20 * _GIB
_MEMORY_BUDGET_MIB = 150
_SEAL = (sys.executable, "-m", "tdxd.cli.tdx_seal")


def rows() -> list[dict[str, Any]]:
    """Measure the time in memory, since a disk would be all that is measured; the rest on disk."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tdxd-bench-") as name:
        found = [_pair_row(Path(name))]
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="tdxd-bench-") as name:
        return found + _large_rows(Path(name))


def _version_of(model: Path) -> Path:
    version = model / "models/m/1"
    version.mkdir(parents=True)
    return version


def _create(model: Path, directory: Path) -> list[str]:
    image, bundle = directory / "m.img", directory / "m.bundle"
    argv = [*_SEAL, "create", str(model), "--id", "m", "--generation", "1", "--force"]
    return [*argv, "-o", str(image), "--bundle", str(bundle)]


def _pair_row(directory: Path) -> dict[str, Any]:
    """Time both from the same directory to an encrypted image.

    cryptsetup gets a cheap key derivation: this is about the data. It makes no hash tree.
    """
    model, plain, key = (directory / name for name in ("model", "plain", "key"))
    with (_version_of(model) / "saved_model.pb").open("wb") as file:
        for _ in range(_SIZE_BYTES // _MIB):
            file.write(os.urandom(_MIB))
    key.write_text("correct horse battery staple")

    def ours() -> float:
        for path in directory.glob("m.*"):
            path.unlink()  # freeing the last image's memory is not part of the work
        return _timed([_create(model, directory)])

    def theirs() -> float:
        plain.unlink(missing_ok=True)
        make = ["mkfs.erofs", "-x-1", "-T0", "--all-root", "--quiet"]
        how = ["--encrypt", "--reduce-device-size", "32M", "--sector-size", "4096"]
        cipher = ["-c", "aes-xts-plain64", "-s", "512"]
        cheap = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
        encrypt = ["cryptsetup", "reencrypt", "--batch-mode", "--key-file", str(key)]
        return _timed(
            [
                [*make, str(plain), str(model)],
                ["truncate", "-s", "+32M", str(plain)],
                [*encrypt, *how, *cipher, *cheap, str(plain)],
            ]
        )

    found = paired(ours, theirs, pairs=_PAIRS)
    return {
        "name": "tdx-seal create / mkfs.erofs and cryptsetup reencrypt, 1 GiB",
        "measured": round(found.ratio, 2),
        "budget": 1.0,
        "ok": found.ratio <= 1.0,
        "detail": f"{found.first:.1f} s against {found.second:.1f} s; {found.spread()}",
    }


def _timed(commands: list[list[str]]) -> float:
    start_s = time.perf_counter()
    for argv in commands:
        subprocess.run(argv, check=True, capture_output=True)
    return time.perf_counter() - start_s


def _large_rows(directory: Path) -> list[dict[str, Any]]:
    """Seal and verify a large sparse file; the disk holds its image and the staged plaintext."""
    free = shutil.disk_usage(directory).free
    size_gib = _LARGE_GIB
    if free < 2 * _LARGE_GIB * _GIB + _SPARE_BYTES:
        size_gib = _LESS_GIB
    model = directory / "model"
    with (_version_of(model) / "weights").open("wb") as file:
        file.truncate(size_gib * _GIB)
    image, bundle = directory / "m.img", directory / "m.bundle"
    verify = [*_SEAL, "verify", str(image), "--bundle", str(bundle)]
    return [
        _memory_row("create", size_gib, _create(model, directory)),
        _memory_row("verify --bundle", size_gib, verify),
    ]


def _memory_row(what: str, size_gib: int, argv: list[str]) -> dict[str, Any]:
    start_s = time.perf_counter()
    with (
        subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process,
        peak_memory(process.pid) as peak,
    ):
        code = process.wait()
    if code != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with status {code}")
    measured = peak[0] / _MIB
    spent_s = time.perf_counter() - start_s
    return {
        "name": f"tdx-seal {what}: memory at {size_gib} GiB, MiB, mkfs.erofs apart",
        "measured": round(measured, 1),
        "budget": _MEMORY_BUDGET_MIB,
        "ok": measured <= _MEMORY_BUDGET_MIB,
        "detail": f"the program, its workers, and their files in memory; {spent_s:.0f} s",
    }
