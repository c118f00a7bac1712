"""What a new generation of a volume costs while the old one serves: time and memory.

The whole system runs, with ResNet50 sealed: the key is released, the image opened, a second model
server started beside the first, the front moved over. One client calls steadily meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tdxd.host import tf_messages
from tdxd.host.tree_memory import tree_memory_bytes
from tdxd.user.endpoint import open_channel
from tdxd.user.infer import Model, decode_answer, encode_request
from tests.bench.front import make_model
from tests.system.under_load import Serving
from tests.system.world import BIN, World, ok

__all__ = ["rows"]

GENERATIONS = 3
"""New ones; what is told is the median of these."""
TIME_BUDGET = 1.5
MEMORY_BUDGET = 1.1
"""What the daemon wants to be free, as a multiple of the running server's memory."""
_MIB = 2**20
_LOOK_S = 0.1
_LONGEST_S = 120.0
_PAUSE_S = 0.2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rollover:
    """One change of generations."""

    first_answer_s: float
    """From the reload's start to the first answer of the new version."""
    done_s: float
    """Until the reload said that all is done."""
    server_start_s: float
    """Of the first model server, alone on the machine: from its start until it was ready."""
    before_bytes: int
    """What the model server takes that serves."""
    extra_bytes: int
    """What both take at most, less that."""


def rows() -> list[dict[str, Any]]:
    """Return a row for the time and one for the memory.

    Raises: RuntimeError.
    """
    if os.geteuid() != 0:
        raise RuntimeError("tdxd runs as root")
    with _world() as world:
        found = list(_rollovers(world))
    return [_time_row(found), _memory_row(found)]


@contextlib.contextmanager
def _world() -> Iterator[World]:
    # Not below /tmp: the model server's user must be able to read on the way.
    with tempfile.TemporaryDirectory(prefix="tdxd-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        world = World(directory)
        make_model(directory)
        world.make_certificate("localhost")
        ok("tdx-sim", "init", directory / "sim")
        with world.simulator():
            world.pin = world.init_key_server()
            with world.key_server():
                yield world


def _publish(world: World, generation: int) -> None:
    """Seal the model as the version of that number; put it beside the others when it is whole."""
    name = f"next-{generation}"
    tree = world.directory / name
    models = tree / "models" / "resnet"
    shutil.copytree(world.directory / "resnet" / "1", models / str(generation))
    (tree / "tls").mkdir()
    shutil.copy(world.directory / "server.pem", tree / "tls")
    image = world.seal(tree, name, generation=generation, volume_id="roll")
    shutil.rmtree(tree)
    world.allow(name)
    image.rename(world.directory / f"roll-{generation}.img")


def _rollovers(world: World) -> Iterator[Rollover]:
    _publish(world, 1)
    pattern = str(world.directory / "roll-*.img")
    serving = Serving(world, volume=[{"id": "roll", "image": pattern}])
    try:
        serving.start()
        start_s = _server_start_s(serving)
        for generation in range(2, 2 + GENERATIONS):
            yield _roll_over(world, serving, generation, start_s)
    finally:
        serving.stop()


def _server_start_s(serving: Serving) -> float:
    lines = serving.daemon.ctl("events", "--json", "--all").stdout.splitlines()
    events = [json.loads(line) for line in lines]
    took = [one["seconds"] for one in events if one["event"] == "server.ready"]
    return float(took[0])


def _roll_over(
    world: World, serving: Serving, generation: int, server_start_s: float
) -> Rollover:
    request = encode_request(Model(name="resnet"), {"input": _image()})
    with open_channel(serving.endpoint) as channel:
        call: Any = channel.unary_unary(tf_messages.PREDICT_METHOD)

        def version() -> int:
            return decode_answer(call(request, timeout=60)).version

        assert version() == generation - 1
        _publish(world, generation)
        with _memory_of_servers(serving.daemon.process.pid) as seen:
            before_bytes = seen[0]
            started_s = time.monotonic()
            with _reload(serving):
                while version() != generation:
                    time.sleep(_PAUSE_S)
                    if time.monotonic() > started_s + _LONGEST_S:
                        raise RuntimeError(f"generation {generation} is not served")
                first_answer_s = time.monotonic() - started_s
            done_s = time.monotonic() - started_s
    return Rollover(
        first_answer_s=first_answer_s,
        done_s=done_s,
        server_start_s=server_start_s,
        before_bytes=before_bytes,
        extra_bytes=max(seen) - before_bytes,
    )


def _image() -> Any:
    return np.random.default_rng(1).random((1, 224, 224, 3), np.float32)


@contextlib.contextmanager
def _reload(serving: Serving) -> Iterator[None]:
    """Run `tdxctl reload` beside the block, and wait for its success after it."""
    path = serving.daemon.socket_path
    process = subprocess.Popen(
        [str(BIN / "tdxctl"), "--socket", str(path), "reload"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield
        _, said = process.communicate(timeout=_LONGEST_S)
        if process.returncode != 0:
            raise RuntimeError(f"tdxctl reload: {said}")
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def _memory_of_servers(daemon_pid: int) -> Iterator[list[int]]:
    """Yield what the model servers take together, looked at again and again, bytes."""
    seen, ended = [_servers_bytes(daemon_pid)], threading.Event()

    def look() -> None:
        while not ended.wait(_LOOK_S):
            seen.append(_servers_bytes(daemon_pid))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def _servers_bytes(daemon_pid: int) -> int:
    children = Path(f"/proc/{daemon_pid}/task/{daemon_pid}/children").read_text()
    return sum(tree_memory_bytes(int(pid)) for pid in children.split() if _serves(pid))


def _serves(pid: str) -> bool:
    try:
        return b"--model_config_file=" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # it has just ended


def _time_row(found: list[Rollover]) -> dict[str, Any]:
    first_s = statistics.median(one.first_answer_s for one in found)
    done_s = statistics.median(one.done_s for one in found)
    alone_s = found[0].server_start_s
    ratio = first_s / alone_s
    return {
        "name": "reload: time to the new version / start of the model server alone",
        "measured": round(ratio, 2),
        "budget": TIME_BUDGET,
        "ok": ratio <= TIME_BUDGET,
        "detail": (
            f"first answer of the new version after {first_s:.1f} s, old one ended and unmounted "
            f"after {done_s:.1f} s; a server alone is ready after {alone_s:.1f} s; ResNet50, "
            f"median of {len(found)}, one client calls {1 / _PAUSE_S:g} times a second"
        ),
    }


def _memory_row(found: list[Rollover]) -> dict[str, Any]:
    extra_bytes = statistics.median(one.extra_bytes for one in found)
    before_bytes = statistics.median(one.before_bytes for one in found)
    ratio = extra_bytes / before_bytes
    return {
        "name": "reload: extra memory at the peak / memory of one model server",
        "measured": round(ratio, 2),
        "budget": MEMORY_BUDGET,
        "ok": ratio <= MEMORY_BUDGET,
        "detail": (
            f"{extra_bytes / _MIB:.0f} MiB more than the {before_bytes / _MIB:.0f} MiB of the one "
            "that serves (proportional share); the daemon asks for 1.1 times the latter before it "
            "starts another; beside it the memory mapper holds each opened image"
        ),
    }


if __name__ == "__main__":
    for row in rows():
        print(row)
