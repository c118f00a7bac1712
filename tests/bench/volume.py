"""The volume path: the memory mapper and tdx-seal, against what openssl does on the same cores.

The yardstick is AES-256-XTS and SHA-256 of 4096-byte pieces one after the other, on two processes:
1 / (1/xts + 1/sha256). It is measured right before each run, and the median of the ratios counts.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdxd.core.bundle import SECRET_BYTES, KeyBundle
from tdxd.core.secret import Secret
from tdxd.host.memory_map import MemoryMapper
from tdxd.host.workers import never
from tdxd.owner.sealing.seal import SealRequest, seal_directory
from tests.bench.measure import peak_memory

__all__ = ["rows"]

_SIZE_BYTES = 512 * 2**20
_PAIRS = 5
_CORES = 2
_MIB = 2**20
_RSS_BUDGET_MIB = 150


def rows() -> list[dict[str, Any]]:
    """Measure both on a 512 MiB model in memory, and the memory of a whole `tdx-seal create`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:_CORES])
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="tdxd-bench-") as name:
        directory = Path(name)
        model = _model(directory)
        found = [_seal_row(model, directory)]
        bundle = _sealed(model, directory)
        if os.geteuid() == 0:
            found.insert(0, _mapper_row(directory / "m.img", bundle))
        found.append(_memory_row(model, directory))
    return found


def _model(directory: Path) -> Path:
    version = directory / "model/models/m/1"
    version.mkdir(parents=True)
    with (version / "saved_model.pb").open("wb") as file:
        for _ in range(_SIZE_BYTES // _MIB):
            file.write(os.urandom(_MIB))
    return directory / "model"


# --- the yardstick ------------------------------------------------------------


def _openssl(algorithm: str) -> float:
    """Return bytes per second of elapsed time, all processes together."""
    argv = ["openssl", "speed", "-elapsed", "-seconds", "1", "-multi", str(_CORES)]
    argv += ["-bytes", "4096", "-evp", algorithm]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1].removesuffix("k")) * 1000


def _yardstick() -> float:
    return 1 / (1 / _openssl("aes-256-xts") + 1 / _openssl("sha256"))


def _row(name: str, budget: float, work: Callable[[], float]) -> dict[str, Any]:
    """Pair `work`, which returns bytes per second, with the yardstick."""
    work()
    pairs = [(_yardstick(), work()) for _ in range(_PAIRS)]
    ratios = [ours / theirs for theirs, ours in pairs]
    ratio = statistics.median(ratios)
    ours = statistics.median(one for _, one in pairs)
    theirs = statistics.median(one for one, _ in pairs)
    return {
        "name": name,
        "measured": round(ratio, 3),
        "budget": budget,
        "ok": ratio >= budget,
        "detail": f"at least; {ours / 1e9:.2f} GB/s, openssl combined {theirs / 1e9:.2f} GB/s; "
        f"ratios {min(ratios):.2f} to {max(ratios):.2f} in {_PAIRS} pairs",
    }


# --- the rows -----------------------------------------------------------------


def _mapper_row(image: Path, bundle: KeyBundle) -> dict[str, Any]:
    mapper = MemoryMapper(limit_bytes=2 * _SIZE_BYTES)

    def work() -> float:
        start_s = time.perf_counter()
        mapped = mapper.map_volume(str(image), bundle, cancelled=never)
        spent_s = time.perf_counter() - start_s
        mapper.unmap(mapped)
        return bundle.manifest.payload_bytes / spent_s

    return _row("memory mapper: verify and decrypt / openssl", 0.35, work)


def _sealed(model: Path, directory: Path) -> KeyBundle:
    return seal_directory(_request(model, directory), _ignore).bundle


def _request(model: Path, directory: Path) -> SealRequest:
    return SealRequest(
        directory=model,
        volume_id="m",
        generation=1,
        image=directory / "m.img",
        bundle=directory / "m.bundle",
        secret=Secret(bytes(SECRET_BYTES)),
        force=True,
    )


def _ignore(_step: str, _done: int, _whole: int) -> None:
    pass


def _seal_row(model: Path, directory: Path) -> dict[str, Any]:
    def work() -> float:
        starts_s: list[float] = []

        def progress(step: str, _done: int, _whole: int) -> None:
            if step == "hash tree" and not starts_s:
                starts_s.append(time.perf_counter())

        for path in directory.glob("m.*"):
            path.unlink()  # freeing the last image's memory is not part of the work
        made = seal_directory(_request(model, directory), progress)
        return made.bundle.manifest.payload_bytes / (time.perf_counter() - starts_s[0])

    name = "tdx-seal create: tree, encrypt, digest, write / openssl"
    return _row(name, 0.35, work)


def _memory_row(model: Path, directory: Path) -> dict[str, Any]:
    """Run the real program, and look at it and its workers all the while."""
    argv = [sys.executable, "-m", "tdxd.cli.tdx_seal", "create", str(model)]
    argv += ["--id", "m", "--generation", "1", "-o", str(directory / "m.img")]
    argv += ["--bundle", str(directory / "m.bundle"), "--force"]
    with (
        subprocess.Popen(argv, stdout=subprocess.DEVNULL) as process,
        peak_memory(process.pid) as peak,
    ):
        code = process.wait()
    if code != 0:
        raise RuntimeError(f"tdx-seal create ended with status {code}")
    return {
        "name": "tdx-seal create: resident memory, MiB, mkfs.erofs apart",
        "measured": round(peak[0] / _MIB, 1),
        "budget": _RSS_BUDGET_MIB,
        "ok": peak[0] <= _RSS_BUDGET_MIB * _MIB,
        "detail": f"the program and its workers together, {_SIZE_BYTES // _MIB} MiB image",
    }
