"""tdx-infer as a person runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tdxd.errors import EX_DATAERR, EX_OK, EX_TEMPFAIL, EX_UNAVAILABLE, EX_USAGE
from tests.user.double import running_double

ROOT = Path(__file__).parents[2]


def run(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, "-m", "tdxd.cli.tdx_infer", *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def double(tmp_path):
    with running_double(tmp_path) as running:
        yield running


@pytest.fixture
def x(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([[1.5, 2.0]], np.float32))
    return path


def common(double, model="double"):
    return [double.address, "--ca", double.ca, "--model", model]


def test_predict_shows_the_outputs(double, x):
    done = run("predict", *common(double), "--input", x)
    assert done.stdout == "y: float32 [1, 2]\n[[3. 4.]]\n"
    assert (done.returncode, done.stderr) == (EX_OK, "")


def test_predict_from_standard_input_as_json(double):
    done = run("predict", *common(double), "--input", "-", "--json", stdin="[[2, 3]]")
    assert json.loads(done.stdout) == {
        "model": "double",
        "version": 7,
        "signature": "serving_default",
        "outputs": {"y": {"dtype": "float32", "shape": [1, 2], "values": [[4.0, 6.0]]}},
    }
    assert (done.returncode, done.stderr) == (EX_OK, "")


def test_predict_writes_an_output_to_a_file(double, x, tmp_path):
    out = tmp_path / "y.npy"
    done = run("predict", *common(double), "--input", x, "--output", out)
    assert (done.returncode, done.stdout, done.stderr) == (EX_OK, "", "")
    assert np.load(out).tolist() == [[3.0, 4.0]]


def test_predict_with_two_outputs_wants_a_name(double, x, tmp_path):
    arguments = [*common(double), "--input", f"x={x}", "--signature", "two"]
    done = run("predict", *arguments, "--output", tmp_path / "o.npy")
    assert done.returncode == EX_USAGE
    assert done.stderr == (
        "tdx-infer: error: the answer has 2 outputs (t, y)\n"
        "tdx-infer: hint: name it: --output NAME=FILE.npy\n"
    )
    done = run("predict", *arguments, "--output", f"t={tmp_path / 'o.npy'}")
    assert done.returncode == EX_DATAERR
    assert "output t holds strings" in done.stderr
    done = run("predict", *arguments, "--output", f"q={tmp_path / 'o.npy'}")
    assert (done.returncode, "it has: t, y" in done.stderr) == (EX_USAGE, True)


def test_a_refusal_is_two_lines_and_an_exit_code(double, x):
    done = run("predict", *common(double, "nope"), "--input", f"x={x}")
    assert (done.returncode, done.stdout) == (EX_UNAVAILABLE, "")
    assert done.stderr == (
        f"tdx-infer: error: {double.address}: NOT_FOUND: Servable not found for request: "
        "Latest(nope)\n"
        "tdx-infer: hint: see --model and --version; a server answers for a model once it "
        "is loaded\n"
    )


def test_a_wrong_certificate_is_told_without_grpcs_own_noise(double, x, tmp_path):
    with running_double(tmp_path, name="other.example") as other:
        arguments = [double.address, "--ca", other.ca, "--model", "double"]
        done = run("predict", *arguments, "--input", x)
    assert done.returncode == EX_UNAVAILABLE
    assert done.stderr == (
        f"tdx-infer: error: {double.address}: the server's certificate is not one that "
        "--ca vouches for\n"
        "tdx-infer: hint: another server answers, or --ca is another\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["predict"],
        ["bench", "a:1", "--ca", "x", "--model", "m", "--input", "-", "--cnum", "0"],
        ["predict", "a:1", "--ca", "x", "--model", "m", "--input", "-", "--zzz"],
    ],
)
def test_wrong_usage(arguments):
    done = run(*arguments)
    assert done.returncode == EX_USAGE
    assert done.stderr.startswith("tdx-infer: error: ")


def test_an_input_given_twice(double, x):
    done = run("predict", *common(double), "--input", x, "--input", x)
    assert done.returncode == EX_USAGE
    assert "input without a name is given twice" in done.stderr


def test_bench_prints_the_references_lines_then_percentiles(double, x):
    load = ["--batch", 2, "--cnum", 2, "--loop", 3, "--warm-up", 1]
    done = run("bench", *common(double), "--input", x, *load)
    assert (done.returncode, done.stderr) == (EX_OK, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"warm-up: requests 2, time\(s\) [0-9.]+", lines[0])
    query = (
        r"query: secure channel, task [01], batch 2, loop_idx [012], "
        r"latency\(ms\) [0-9]+\.[0-9], tps: [0-9]+\.[0-9]"
    )
    assert len(lines) == 10
    assert all(re.fullmatch(query, line) for line in lines[1:7])
    number = r"[0-9]+\.[0-9]+"
    summary = (
        rf"summary: cnum 2, batch 2, e2e time\(s\) {number}, "
        rf"average latency\(ms\) {number}, tps: {number}"
    )
    assert re.fullmatch(summary, lines[7])
    assert lines[8].startswith("latency(ms): min ")
    assert lines[9] == "errors: none"
    sent = double.requests[-1].inputs["x"]
    assert [dim.size for dim in sent.tensor_shape.dim] == [2, 2]


def test_bench_as_json_with_errors_ends_with_a_code(double, x):
    load = ["--cnum", 1, "--loop", 5, "--warm-up", 1, "--json"]
    done = run("bench", *common(double, "busy"), "--input", x, *load)
    assert done.returncode == EX_TEMPFAIL
    figures = json.loads(done.stdout)
    assert figures["errors"] == {"RESOURCE_EXHAUSTED": 2}
    assert figures["requests"] == 3
    assert set(figures["latency_ms"]) >= {"p50", "p90", "p95", "p99", "p99.9"}


def test_no_tensorflow_is_loaded(double, x):
    code = (
        "import sys; from tdxd.cli import tdx_infer; "
        f"sys.argv[1:] = {['predict', *map(str, common(double)), '--input', str(x)]!r}; "
        "assert tdx_infer.main() == 0; assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
