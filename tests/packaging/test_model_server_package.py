"""tdx-model-server as packaged, without what was left out of TensorFlow, serves models."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tdxd.core.server_flags import parse_version
from tests.model_server.running import Caller, running_server
from tests.packaging.unpacked import ROOT, installed

pytestmark = pytest.mark.slow

LEFT_OUT = ("keras", "h5py", "clang", "setuptools", "pasta", "sklearn", "scipy")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    make = [sys.executable, str(ROOT / "tests/model_server/models.py"), str(directory)]
    subprocess.run(make, check=True, capture_output=True, timeout=180)
    return directory


def launcher(package) -> list[str]:
    """Return the command of the installed program, with the package's directory instead of /usr."""
    text = (package.root / "usr/bin/tdx-model-server").read_text()
    shebang, _, code = text.partition("\n")
    assert shebang == "#!/usr/bin/python3 -IS"
    assert f'"/usr/lib/{package.name}/python"' in code
    code = code.replace(f"/usr/lib/{package.name}/python", str(package.library))
    return ["/usr/bin/python3", "-IS", "-c", code]


def check_answers(running, models) -> None:
    """Ask for kernels of several kinds: compiled, strings, control flow, a TensorFlow 1 graph."""
    running.wait_for("Running gRPC ModelServer")
    caller = Caller(running.socket)
    try:
        caller.ready()
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        assert np.array_equal(caller.outputs("many", x=x)["y"], x * 3)
        picture = np.ones((1, 8, 8, 3), np.float32)
        out = caller.outputs("many", "picture", i=picture)["o"]
        assert out.shape == (1, 8, 8, 2)
        assert out[0, 4, 4, 0] == 27
        text = caller.outputs("many", "text", t=np.array([b"abc"], dtype=object))
        assert text["length"].tolist() == [3]
        gate = models / "gate"
        gate.touch()
        assert caller.outputs("many", "wait", gate=np.array(str(gate), "S"))["opened"]
        one = np.ones((1, 2), np.float32)
        assert caller.outputs("frozen", input=one)["predict"].tolist() == [[2, 2]]
    finally:
        caller.close()


def config_of(models, directory) -> str:
    path = directory / "models.config"
    entries = "".join(
        f'config {{ name: "{name}" base_path: "{models / name}" '
        'model_platform: "tensorflow" }\n'
        for name in ("many", "frozen")
    )
    path.write_text(f"model_config_list {{ {entries} }}")
    return f"--model_config_file={path}"


def test_it_serves_models_from_its_own_files_alone(unpacked, models, tmp_path) -> None:
    package = unpacked("tdxd-model-server")
    flags = [config_of(models, tmp_path)]
    with running_server(tmp_path, *flags, program=launcher(package)) as running:
        check_answers(running, models)
        maps = f"/proc/{running.process.pid}/maps"
        with open(maps, encoding="ascii") as file:
            mapped = {line.split()[-1] for line in file if ".so" in line}
    assert any("libtensorflow_cc" in path for path in mapped)
    for path in mapped:
        system = path.startswith(("/usr/lib/", "/lib/"))
        assert system or path.startswith(str(package.library)), path


@pytest.mark.root
def test_it_serves_models_where_it_is_installed(unpacked, models, tmp_path) -> None:
    program = [*installed(unpacked("tdxd-model-server")), "tdx-model-server"]
    flags = [config_of(models, tmp_path)]
    with running_server(tmp_path, *flags, program=program) as running:
        check_answers(running, models)


def test_it_says_who_it_is(unpacked) -> None:
    """The daemon asks it before it starts it."""
    program = [*installed(unpacked("tdxd-model-server")), "tdx-model-server"]
    done = subprocess.run(
        [*program, "--version"], check=True, capture_output=True, text=True
    )
    version = parse_version(done.stdout)
    assert version is not None
    assert version.kind == "drop-in"
    assert version.usable


def test_what_serving_does_not_use_is_left_out(unpacked) -> None:
    library = unpacked("tdxd-model-server").library
    for name in LEFT_OUT:
        assert not (library / name).exists()
    assert not (library / "tensorflow/include").exists()
    modules = unpacked("tdxd-model-server").modules()
    assert "tdxd.model_server.loader" in modules
    assert not [name for name in modules if name.startswith(("tdxd.guest", "tdxd.sim"))]
