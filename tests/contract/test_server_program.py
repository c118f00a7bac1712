"""Which program serves: each is asked, in a cell and confined, before it gets a flag."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core.config import ServingConfig
from tdxd.errors import ConfigError, NotReadyError
from tdxd.guest.server_program import ServerPrograms
from tdxd.host.ports import Host

pytestmark = pytest.mark.root

SAYS = "TensorFlow ModelServer: {}-rc0+dev.sha.1\nTensorFlow Library: {}\n"


@pytest.fixture
def place() -> Iterator[Path]:
    """Programs of several versions; everybody may pass through."""
    directory = Path("/var/tmp") / f"tdxd-programs-{os.getpid()}"
    (directory / "runtime").mkdir(parents=True)
    for number in ("2.6.2", "2.14.1"):
        program(directory, number, f"cat <<END\n{SAYS.format(number, number)}END")
    program(directory, "shell", "echo hello")
    yield directory
    shutil.rmtree(directory)


def program(directory: Path, name: str, code: str) -> None:
    path = directory / name / "bin" / "server"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)


def config(directory: Path, name: str) -> ServingConfig:
    command = str(directory / name / "bin" / "server")
    return ServingConfig(command=command, user="nobody")


async def test_a_program_says_its_version(host: Host, place: Path) -> None:
    programs = ServerPrograms(host, str(place / "runtime"))
    found = await programs.choose(config(place, "2.14.1"))
    assert str(found.version) == "TensorFlow Serving 2.14"
    program(place, "2.14.1", "cat <<END\n" + SAYS.format("2.19.0", "2.19.0") + "END")
    found = await programs.choose(config(place, "2.14.1"))
    assert found.version.number == (2, 19), "another file is asked anew"


async def test_one_that_is_too_old_or_no_model_server_is_refused(
    host: Host, place: Path
) -> None:
    programs = ServerPrograms(host, str(place / "runtime"))
    with pytest.raises(ConfigError, match=r"2\.6, older than 2\.11"):
        await programs.choose(config(place, "2.6.2"))
    with pytest.raises(NotReadyError, match="it said 'hello'"):
        await programs.choose(config(place, "shell"))
    with pytest.raises(NotReadyError, match="cannot execute"):
        await programs.choose(config(place, "missing"))
