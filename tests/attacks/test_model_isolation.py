"""A hostile model, executed as the daemon has models executed: what it can reach.

One model server and one front for all, in real cells, confined.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trio

from tdxd.core.config import Address, ServingConfig
from tdxd.guest.certificates import Certificates
from tdxd.guest.front import Front
from tdxd.guest.front_start import Sockets, start_front
from tdxd.guest.handover import ServedVolume
from tdxd.guest.listener import listen_tcp
from tdxd.guest.server import ModelServer
from tdxd.guest.server_program import ServerPrograms
from tdxd.guest.server_start import offered_by, start_server
from tdxd.guest.volume_reader import VolumeReader
from tdxd.host import landlock, mount, proc
from tests.certificates import self_signed
from tests.contract.fronts import PREDICT, Running
from tests.fakes import fake_host
from tests.model_server.running import Caller, predict_request, refusal

pytestmark = [pytest.mark.root, pytest.mark.tensorflow]

ROOT = Path(__file__).parents[2]
SECRET = "-----BEGIN PRIVATE KEY-----"
LIMIT = 1_000_000
START_S = 90.0
needs_landlock = pytest.mark.skipif(not landlock.abi(), reason="no Landlock here")


@dataclasses.dataclass
class World:
    """What runs, and where things lie: `runtime` is the daemon's, `open_dir` everybody's."""

    runtime: Path
    open_dir: Path
    server: ModelServer
    running: Running
    caller: Caller

    def read(self, path: object) -> tuple[str, str]:
        return refusal(self.caller.outputs, "hostile", "read", path=_text(path))


def _text(value: object) -> Any:
    return np.array(str(value).encode(), dtype=object)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    runtime = Path("/run") / f"tdxd-hostile-{os.getpid()}"
    open_dir = Path("/var/tmp") / runtime.name
    children = proc.CellChildren()
    private, public = self_signed("localhost")
    with contextlib.ExitStack() as stack:
        stack.callback(children.close)
        for path in (runtime, open_dir):
            path.mkdir()
            path.chmod(0o755)
            stack.callback(shutil.rmtree, path)
        _volume(stack, runtime / "volumes" / "m", private)
        _volume(stack, runtime / "volumes" / "other", SECRET.encode())
        config = _config(open_dir)
        server, running = trio.run(_start, children, config, runtime, private)
        stack.callback(trio.run, _stop, server, running.front)
        stack.callback(running.grpc_socket.close)  # type: ignore[attr-defined]
        running.certificate = public
        caller = Caller(runtime / "serve" / "a" / "model.sock")
        stack.callback(caller.close)
        yield World(runtime, open_dir, server, running, caller)


def _volume(stack: contextlib.ExitStack, point: Path, key: bytes) -> None:
    point.mkdir(parents=True)
    mount.mount_tmpfs(str(point), size_bytes=64 * 2**20)
    stack.callback(mount.detach, str(point))
    (point / "tls").mkdir()
    (point / "tls" / "server.pem").write_bytes(key)
    if point.name == "m":
        program = Path(__file__).parent / "hostile_model.py"
        target = point / "models" / "hostile" / "1"
        subprocess.run([sys.executable, program, target], check=True, timeout=START_S)


def _config(open_dir: Path) -> ServingConfig:
    """Serve with this source tree's model server."""
    program = open_dir / "program" / "bin" / "model-server"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tdxd.cli.tdx_model_server import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    (open_dir / "secret").mkdir()
    (open_dir / "secret" / "key").write_text(SECRET)
    (open_dir / "secret" / "key").chmod(0o666)
    (open_dir / "secret").chmod(0o777)
    return ServingConfig(
        command=str(program),
        user="nobody",
        rest_listen="127.0.0.1:0",
        read_paths=(str(ROOT), sys.prefix),
        max_request_bytes=LIMIT,
        drain_timeout_s=1,
    )


async def _start(
    children: proc.CellChildren, config: ServingConfig, runtime: Path, private: bytes
) -> tuple[ModelServer, Running]:
    host = dataclasses.replace(fake_host(), children=children)
    program = await ServerPrograms(host, str(runtime)).choose(config)
    assert program.version.kind == "drop-in"
    volume = ServedVolume(
        volume_id="m", generation=1, mount_point=str(runtime / "volumes" / "m")
    )
    server = start_server(
        host=host,
        config=config,
        program=program,
        runtime_dir=str(runtime),
        slot="a",
        offered=await offered_by((volume,), VolumeReader()),
    )
    with trio.fail_after(START_S):
        while not server.ready:
            await server.poll()
            await trio.sleep(0.1)
    grpc_socket, rest_socket = (listen_tcp(Address("127.0.0.1", 0)) for _ in range(2))
    front = await start_front(
        host=host,
        config=config,
        runtime_dir=str(runtime),
        sockets=Sockets(grpc=grpc_socket, rest=rest_socket),
        certificates=Certificates(server=private),
        key="k",
        active="a",
    )
    ports = (grpc_socket.getsockname()[1], rest_socket.getsockname()[1])
    rest_socket.close()
    running = Running(front, *ports, b"")
    running.grpc_socket = grpc_socket  # type: ignore[attr-defined]
    return server, running


async def _stop(server: ModelServer, front: Front) -> None:
    await front.stop(0)
    await server.child.stop(5)
    server.close()


# --- what must work -----------------------------------------------------------


def test_it_is_served_through_the_front_and_confined(world: World) -> None:
    """A control: it reads its own files and writes to its own tmp, over gRPC and REST."""
    own = world.runtime / "models" / "m" / "hostile" / "1" / "fingerprint.pb"
    assert world.caller.outputs("hostile", path=_text(own))["content"]
    tmp = _text(world.runtime / "tmp" / "own")
    world.caller.outputs("hostile", "write", path=tmp, content=_text("own"))
    assert world.caller.outputs("hostile", path=tmp)["content"] == b"own"
    status = Path(f"/proc/{world.server.child.pid}/status").read_text()
    assert "\nSeccomp:\t2\n" in status
    assert "\nNoNewPrivs:\t1\n" in status
    assert not (world.runtime / "tmp" / "own").exists()


async def test_it_is_served_over_rest(world: World) -> None:
    status, text = await world.running.rest("GET", "/v1/models/hostile")
    assert (status, "AVAILABLE" in text) == (200, True)


def test_a_long_call_is_refused_by_the_model_server(world: World) -> None:
    request = predict_request("hostile", path=_text("x" * (LIMIT + 1)))
    with world.running.channel() as channel:
        stub: Any = channel.unary_unary(PREDICT, None, None)
        with pytest.raises(grpc.RpcError) as caught:
            stub(request.SerializeToString(), timeout=20)
    # HAProxy ends a stream whose request it did not take whole, and says no more.
    answers = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
    assert caught.value.code() in answers
    assert refusal(world.caller.predict, request)[0] == "RESOURCE_EXHAUSTED"


# --- what must not ------------------------------------------------------------


def test_it_cannot_read_keys_and_other_volumes(world: World) -> None:
    volumes = world.runtime / "volumes"
    for path in (
        volumes / "m" / "tls" / "server.pem",
        volumes / "other" / "tls" / "server.pem",
        world.runtime / "models" / "m" / ".." / ".." / "volumes" / "other",
        world.runtime / "front" / "haproxy.cfg",
        "/etc/shadow",
        f"/proc/{os.getpid()}/environ",
        f"/proc/{os.getpid()}/root{volumes}/m/tls/server.pem",
        f"/proc/{os.getpid()}/mem",
    ):
        assert world.read(path)[0] in ("PERMISSION_DENIED", "NOT_FOUND"), path


@needs_landlock
def test_it_cannot_read_what_modes_would_let_it(world: World) -> None:
    """The memory and the descriptors of the front, which has the same user here, above all."""
    front = Path(f"/proc/{world.running.front.child.pid}")
    certificates = [
        path for path in (front / "fd").iterdir() if "tdxd:cert" in os.readlink(path)
    ]
    assert certificates
    for path in (
        *certificates,
        front / "environ",
        front / "mem",
        world.open_dir / "secret" / "key",
        "/etc/hostname",
        "/sys/kernel/mm/transparent_hugepage/enabled",
    ):
        assert world.read(path)[0] == "PERMISSION_DENIED", path


@needs_landlock
def test_it_cannot_write_outside_its_tmp(world: World) -> None:
    for path in (
        world.open_dir / "secret" / "key",
        world.open_dir / "secret" / "new",
        world.runtime / "models" / "m" / "hostile" / "1" / "fingerprint.pb",
        world.runtime / "models" / "m" / "hostile" / "2" / "saved_model.pb",
        world.runtime / "serve" / "a" / "new",
        "/tmp/tdxd-hostile",
        "/dev/shm/tdxd-hostile",
        "/proc/self/oom_score_adj",
    ):
        inputs = {"path": _text(path), "content": _text("x")}
        code, _words = refusal(world.caller.outputs, "hostile", "write", **inputs)
        assert code in ("PERMISSION_DENIED", "FAILED_PRECONDITION", "UNKNOWN"), path
    assert (world.open_dir / "secret" / "key").read_text() == SECRET


@needs_landlock
def test_it_cannot_look_around(world: World) -> None:
    for pattern in (f"{world.open_dir}/secret/*", f"{world.runtime}/volumes/*"):
        with contextlib.suppress(grpc.RpcError):
            found = world.caller.outputs("hostile", "look", pattern=_text(pattern))
            assert found["paths"].size == 0, pattern


def test_it_cannot_call_out(world: World) -> None:
    """Not to this machine, not to the front: tf.data's client tries and gets nowhere."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        port = listening.getsockname()[1]
        call: Any = world.caller.start(
            "hostile", "dial", address=_text(f"127.0.0.1:{port}")
        )
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and not call.done():
            with pytest.raises(TimeoutError):
                listening.accept()
        assert not call.done() or call.exception() is not None
        call.cancel()
