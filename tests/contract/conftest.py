"""What tests of the front share: a directory, servers behind it, and children that can start."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from tdxd.host import proc
from tdxd.host.ports import Host
from tests.contract.fronts import Backend
from tests.fakes import fake_host


@pytest.fixture
def front_dir() -> Iterator[Path]:
    directory = Path("/run") / f"tdxd-front-{os.getpid()}"
    for slot in ("a", "b"):
        (directory / "serve" / slot).mkdir(parents=True)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def backends(front_dir: Path) -> Iterator[dict[str, Backend]]:
    servers, handlers = [], {}
    for slot in ("a", "b"):
        server = grpc.server(
            futures.ThreadPoolExecutor(4),
            options=[("grpc.max_receive_message_length", -1)],
        )
        handlers[slot] = Backend(slot)
        server.add_generic_rpc_handlers((handlers[slot],))
        path = front_dir / "serve" / slot / "model.sock"
        server.add_insecure_port(f"unix:{path}")
        server.start()
        path.chmod(0o777)
        servers.append(server)
    yield handlers
    for server in servers:
        server.stop(None).wait()


@pytest.fixture
def host() -> Iterator[Host]:
    children = proc.CellChildren()
    yield dataclasses.replace(fake_host(), children=children)
    children.close()
