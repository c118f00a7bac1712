"""The generated code is what grpcio-tools makes of the .proto today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
NAMES = ("keyrelease_pb2.py", "keyrelease_pb2.pyi")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("proto")
    script = REPOSITORY / "contrib" / "gen_proto.py"
    subprocess.run([sys.executable, str(script), str(root)], check=True, timeout=60)
    return root / "tdxd" / "proto"


@pytest.mark.parametrize("name", NAMES)
def test_generating_again_gives_the_same_bytes(made, name):
    assert (made / name).read_bytes() == (REPOSITORY / "tdxd/proto" / name).read_bytes()


def test_paths_of_the_calls_are_those_of_the_service():
    from tdxd.core.keyrelease import CHALLENGE_PATH, RELEASE_PATH, Status
    from tdxd.proto import keyrelease_pb2

    service = keyrelease_pb2.DESCRIPTOR.services_by_name["KeyRelease"]
    paths = [f"/{service.full_name}/{method.name}" for method in service.methods]
    assert paths == [CHALLENGE_PATH, RELEASE_PATH]
    assert keyrelease_pb2.Status.items() == [
        ("STATUS_UNSPECIFIED", 0),
        ("STATUS_RELEASED", int(Status.RELEASED)),
        ("STATUS_DENIED", int(Status.DENIED)),
    ]
