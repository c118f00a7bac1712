"""tdx-convert as a person runs it; TensorFlow's part is in tests/owner/test_converted_models.py."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.graphs import frozen, graph, node, two_towers

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    """Run the program in the test's directory, which holds g.pb."""
    frozen(two_towers(), tmp_path / "g.pb")

    def program(*argv: str, **more) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tdxd.cli.tdx_convert", *argv],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            **more,
        )

    return program


SHOWN = """\
signature serving_default
  in   left: float [?,4], left:0
  in   right: float [?,4], tower/right:0
  out  topk: float […], topk:0
  out  topk_1: int32 […], topk:1
  out  am: int64 […], am:0
"""


def test_show_writes_nothing(run, tmp_path):
    done = run("g.pb", "--show")
    assert (done.returncode, done.stdout, done.stderr) == (0, SHOWN, "")
    assert os.listdir(tmp_path) == ["g.pb"]


def test_convert_without_a_check_says_so(run, tmp_path):
    done = run("g.pb", "models/m", "--no-check")
    assert (done.returncode, done.stderr) == (0, "")
    head, *rest = done.stdout.splitlines()
    size = (tmp_path / "models/m/1/saved_model.pb").stat().st_size
    assert head.startswith(f"models/m/1: {size} bytes, sha256 ")
    assert "\n".join(rest) == SHOWN + (
        "not checked: no TensorFlow has loaded it\nwarm-up requests: 0"
    )


def test_json(run, tmp_path):
    made = json.loads(run("g.pb", "m", "--no-check", "--json").stdout)
    assert made["path"] == "m/1"
    assert made["tensorflow"] is None
    assert made["signatures"]["serving_default"]["inputs"]["left"] == {
        "tensor": "left:0",
        "dtype": "float",
        "shape": [None, 4],
    }
    digest = subprocess.run(
        ["sha256sum", tmp_path / "m/1/saved_model.pb"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert digest.stdout.split()[0] == made["sha256"]


def test_signatures_take_the_tensors_that_follow_them(run):
    argv = ["--output", "am", "--signature", "cut", "--input", "x=deep/out[?,4]"]
    done = run("g.pb", "--show", *argv, "--output", "best=topk:1")
    assert done.stdout == (
        "signature serving_default\n"
        "  in   left: float [?,4], left:0\n"
        "  in   right: float [?,4], tower/right:0\n"
        "  out  am: int64 […], am:0\n"
        "signature cut\n"
        "  in   x: float [?,4], deep/out:0\n"
        "  out  best: int32 […], topk:1\n"
    )


def test_a_signature_may_have_another_name_than_the_default(run):
    assert run("g.pb", "--show", "--signature", "only").stdout == SHOWN.replace(
        "serving_default", "only"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--import_path", "g.pb", "--export_dir", "m", "--model_version", "4"],
        ["--import_path=g.pb", "--export_dir=m", "--model_version=4"],
        ["-import_path=g.pb", "-export_dir", "m", "-model_version", "4"],
        ["--model_version=4", "--import_path=g.pb", "m"],
        ["--model_version=4", "--dtypes=float32", "g.pb", "m"],
    ],
)
def test_the_references_command_line(run, tmp_path, argv):
    node_names = ["--inputs", "deep/out", "--outputs", "am"]
    done = run(*argv, *node_names, "--no-check", "--json")
    assert done.returncode == 0, done.stderr
    (signature,) = json.loads(done.stdout)["signatures"].items()
    assert signature[0] == "serving_default"
    assert signature[1]["inputs"]["input"]["tensor"] == "deep/out:0"
    assert signature[1]["outputs"]["predict"]["tensor"] == "am:0"
    assert (tmp_path / "m/4/saved_model.pb").exists()


def test_the_references_default_nodes(run, tmp_path):
    message = two_towers()
    for one in message.node:
        rename = {"left": "input", "am": "predict"}
        one.name = rename.get(one.name, one.name)
        one.input[:] = [rename.get(text, text) for text in one.input]
    message.node[3].input[1] = "input"
    frozen(message, tmp_path / "r.pb")
    done = run("--import_path=r.pb", "--export_dir=m", "--no-check")
    assert done.returncode == 0, done.stderr
    assert "  in   input: float [?,4], input:0\n" in done.stdout
    assert "  out  predict: int64 […], predict:0\n" in done.stdout


def test_several_nodes_in_the_references_lists(run):
    argv = ["--inputs", "left,tower/right", "--outputs", "am,topk:1"]
    done = run("g.pb", "--show", "--json", *argv)
    (one,) = json.loads(done.stdout)["signatures"].values()
    assert list(one["inputs"]) == ["left", "right"]
    assert list(one["outputs"]) == ["am", "topk_1"]


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        ((), 64, "no graph is named"),
        (("g.pb",), 64, "no directory is named"),
        (("g.pb", "m", "n"), 64, "unrecognized arguments: n"),
        (("--import_path=g.pb", "--export_dir=m", "n"), 64, "n: there is another path"),
        (("g.pb", "m", "--model-version", "0"), 64, "--model-version 0: not 1 or more"),
        (("g.pb", "m", "--model-version", "x"), 64, "invalid int value: 'x'"),
        (("g.pb", "m", "--no-check", "--python", "p"), 64, "exclude each other"),
        (
            ("g.pb", "m", "--inputs", "a", "--input", "b"),
            64,
            "--input does not go with",
        ),
        (("g.pb", "m", "--sample", "x"), 64, "--sample x: no key and file"),
        (("g.pb", "m", "--input", "a b=left"), 64, "key 'a b' is no name"),
        (
            ("g.pb", "m", "--signature", "a", "--signature", "a"),
            64,
            "signature a is begun twice",
        ),
        (
            ("g.pb", "m", "--no-check", "--output", "sofmax"),
            65,
            "output sofmax:0: g.pb",
        ),
        (("none.pb", "m", "--no-check"), 71, "read none.pb: No such file"),
        (("/bin/true", "m", "--no-check"), 65, "/bin/true is no frozen graph"),
        (("g.pb", "g.pb", "--no-check"), 71, "Not a directory"),
        (("g.pb", "m", "--python", "/bin/false"), 69, "/bin/false finds no TensorFlow"),
        (("g.pb", "m", "--python", "/none"), 71, "run /none: No such file"),
    ],
)
def test_bad_input_is_named_and_nothing_stays(run, tmp_path, argv, code, text):
    done = run(*argv)
    assert done.returncode == code
    line, *_ = done.stderr.splitlines()
    assert line.startswith("tdx-convert: error: ")
    assert text in line
    assert os.listdir(tmp_path) == ["g.pb"]


def test_an_unfrozen_graph_is_told_how_to_freeze(run, tmp_path):
    message = two_towers()
    message.node.add(name="w", op="VarHandleOp")
    message.node[3].input[1] = "w"
    frozen(message, tmp_path / "g.pb")
    done = run("g.pb", "m", "--no-check")
    assert done.returncode == 65
    assert done.stderr == (
        "tdx-convert: error: g.pb: node w (VarHandleOp) is a variable, so the graph is not "
        "frozen\n"
        "tdx-convert: hint: freeze it first: "
        "tf.compat.v1.graph_util.convert_variables_to_constants, or "
        "convert_variables_to_constants_v2\n"
    )


def test_a_version_that_is_there_is_not_replaced(run, tmp_path):
    run("g.pb", "m", "--no-check")
    before = (tmp_path / "m/1/saved_model.pb").stat()
    done = run("g.pb", "m", "--no-check")
    assert done.returncode == 65
    assert "m/1 exists already" in done.stderr
    assert "--model-version" in done.stderr
    assert (tmp_path / "m/1/saved_model.pb").stat() == before


def test_a_full_disk_leaves_nothing(run, tmp_path):
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    done = run("g.pb", "m", "--no-check", preexec_fn=small_files_only)
    assert done.returncode == 71
    assert "saved_model.pb: File too large" in done.stderr
    assert os.listdir(tmp_path) == ["g.pb"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_check_leaves_no_file_and_no_process(tmp_path, number):
    frozen(two_towers(), tmp_path / "g.pb")
    python = tmp_path / "python"
    waits = 'case "$2" in *find_spec*) exit 0;; esac; echo $$ >"$PIDFILE"; exec cat >&2'
    python.write_text(f"#!/bin/sh\n{waits}\n")
    python.chmod(0o755)
    pid_file = tmp_path / "pid"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PIDFILE": str(pid_file)}
    # A shell's background job, as a test run may be, has SIGINT ignored.
    program = ["env", "--default-signal=INT", sys.executable]
    argv = [*program, "-m", "tdxd.cli.tdx_convert", "g.pb", "a/b", "--python", python]
    with subprocess.Popen(argv, cwd=tmp_path, env=env) as process:
        end_s = time.monotonic() + 60
        while not pid_file.exists() or not pid_file.read_text().endswith("\n"):
            assert process.poll() is None
            assert time.monotonic() < end_s
            time.sleep(0.01)
        assert (tmp_path / "a/b").is_dir()
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    child = Path("/proc", pid_file.read_text().strip())
    while child.exists():
        assert time.monotonic() < end_s
        time.sleep(0.01)
    assert sorted(os.listdir(tmp_path)) == ["g.pb", "pid", "python"]


def test_a_graph_of_a_newer_tensorflow_is_left_to_tensorflow(run, tmp_path):
    """An operation that is not in our table is no error of its own."""
    message = graph(
        node("x", "Placeholder", types={"dtype": 1}, shape=(2,)),
        node("y", "Newest", "x"),
    )
    frozen(message, tmp_path / "g.pb")
    assert "  out  y: ? […], y:0\n" in run("g.pb", "--show").stdout
    done = run("g.pb", "m", "--no-check")
    assert done.returncode == 65
    assert "the element type of y:0 is not known without TensorFlow" in done.stderr
