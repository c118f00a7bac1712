"""tdx-infer as a person runs it: interrupts, sweeps, plots, terminals, the reference's way."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from contrib.completions.bash import completion
from tdxd.cli import tdx_infer
from tdxd.errors import (
    EX_DATAERR,
    EX_OK,
    EX_OSERR,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    EX_USAGE,
)
from tests.certificates import self_signed
from tests.user.double import running_double

ROOT = Path(__file__).parents[2]
QUERY = (
    r"query: secure channel, task \d+, batch \d+, loop_idx \d+, "
    r"latency\(ms\) \d+\.\d, tps: \d+\.\d"
)
ENDLESS = QUERY.replace(r"loop_idx \d+, ", "")


def command(*arguments):
    return [sys.executable, "-m", "tdxd.cli.tdx_infer", *map(str, arguments)]


@pytest.fixture
def run(monkeypatch, capfd):
    """Return a function that runs the program in this process, which is quicker."""
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tdx-infer", *map(str, arguments)])
        code = tdx_infer.main()
        sys.stdout.flush()
        out, errors = capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=errors)

    return call


@pytest.fixture
def double(tmp_path):
    with running_double(tmp_path) as running:
        yield running


@pytest.fixture
def x(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.array([[1.5, 2.0]], np.float32))
    return path


def bench(double, *arguments, model="double"):
    return ["bench", double.address, "--ca", double.ca, "--model", model, *arguments]


def running(arguments):
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# --- interrupts ---------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_endless_run_ends_with_what_was_measured(double, x, number):
    with running(bench(double, "--input", x, "--cnum", 2, "--loop", 0)) as process:
        assert process.stdout.readline().startswith("warm-up: ")
        seen = [process.stdout.readline() for _ in range(5)]
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (128 + number, "")
    lines = [*seen, *out.splitlines()]
    queries = [line for line in lines if line.startswith("query: ")]
    assert all(re.fullmatch(ENDLESS, line.rstrip()) for line in queries)
    assert lines[-4].startswith("summary: cnum 2, batch 1, e2e time(s) ")
    assert lines[-3].startswith("latency(ms): min ")
    assert lines[-2] == "errors: none"
    assert lines[-1].startswith("interrupted: ")


def test_an_interrupted_sweep_prints_what_there_was(double, x):
    arguments = bench(double, "--input", x, "--cnum", "1,2", "--duration", 60, "--json")
    with running(arguments) as process:
        while len(double.requests) < 20:  # beyond the warm-up
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    (only,) = json.loads(out)["runs"]
    assert only["interrupted"] is True
    assert only["requests"] > 0


def test_interrupted_while_nobody_answers(double, x):
    with running(bench(double, "--input", x, model="slow")) as process:
        assert double.waiting.acquire(timeout=30)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
    assert (process.returncode, out, errors) == (130, "", "")


def test_killed_without_warning_it_leaves_no_process(double, x):
    arguments = bench(double, "--input", x, "--loop", 0, "--cnum", 2)
    with running([*arguments, "--processes", 2]) as process:
        assert process.stdout.readline().startswith("warm-up: ")
        below = [os.pidfd_open(pid) for pid in children(process.pid)]
        assert len(below) == 2
        process.kill()
    for pidfd in below:
        ready, _, _ = select.select([pidfd], [], [], 30)
        os.close(pidfd)
        assert ready


# --- loads --------------------------------------------------------------------


def test_open_loop(run, double, x):
    load = ["--rate", 200, "--cnum", 2, "--loop", 10, "--arrivals", "poisson"]
    done = run(*bench(double, "--input", x, *load, "--quiet"))
    assert (done.returncode, done.stderr) == (EX_OK, "")
    lines = done.stdout.splitlines()
    assert re.fullmatch(
        r"rate: wanted 200/s, answered \d+\.\d/s, sent late\(ms\): p99 \d+\.\d",
        lines[3],
    )
    assert lines[-1] == "errors: none"


def test_a_sweep_is_a_table_and_a_plot(run, double, x, tmp_path):
    plot = tmp_path / "plot.html"
    load = ["--cnum", "1,2", "--batch", "1,3", "--loop", 2, "--warm-up", 1]
    done = run(*bench(double, "--input", x, *load, "--quiet", "--plot", plot))
    assert (done.returncode, done.stderr) == (EX_OK, "")
    table = [line.split() for line in done.stdout.splitlines()[-5:]]
    assert table[0][:3] == ["cnum", "batch", "rate"]
    runs = [["1", "1", "-"], ["1", "3", "-"], ["2", "1", "-"], ["2", "3", "-"]]
    assert [row[:3] for row in table[1:]] == runs
    assert done.stdout.count("summary: ") == 4
    assert "2 clients, batch 3" in plot.read_text()
    done = run(*bench(double, "--input", x, *load, "--json", "--processes", 1))
    assert [one["batch"] for one in json.loads(done.stdout)["runs"]] == [1, 3, 1, 3]


def test_a_plot_that_cannot_be_written_costs_no_figures(run, double, x, tmp_path):
    load = ["--cnum", "1,1", "--loop", 1, "--warm-up", 1, "--quiet"]
    plot = tmp_path / "none" / "plot.html"
    done = run(*bench(double, "--input", x, *load, "--plot", plot))
    assert done.returncode == EX_OSERR
    assert done.stdout.count("summary: ") == 2
    assert f"write {plot}: No such file" in done.stderr


def test_a_later_run_that_fails_loses_no_earlier_one(run, double, x):
    load = ["--cnum", "1,1", "--loop", 1, "--warm-up", 1, "--json"]
    done = run(*bench(double, "--input", x, *load, model="busy"))
    assert done.returncode == EX_TEMPFAIL  # the third call of all is refused
    assert [one["requests"] for one in json.loads(done.stdout)["runs"]] == [1]
    assert "RESOURCE_EXHAUSTED: too many" in done.stderr


def test_random_inputs_by_the_models_metadata(run, double):
    load = ["--batch", 4, "--cnum", 1, "--loop", 1, "--warm-up", 1, "--quiet"]
    done = run(*bench(double, *load, model="pixels"))
    assert (done.returncode, done.stderr) == (EX_OK, "")
    sent = double.requests[-1].inputs["x"]
    assert [dim.size for dim in sent.tensor_shape.dim] == [4, 2, 3, 3]
    done = run(*bench(double, *load))
    assert done.returncode == EX_USAGE
    assert "tdx-infer: hint: --shape x=1,224,224,3 says them\n" in done.stderr
    done = run(*bench(double, *load, "--shape", "?,5"))
    assert done.returncode == EX_OK
    sent = double.requests[-1].inputs["x"]
    assert [dim.size for dim in sent.tensor_shape.dim] == [4, 5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cnum", "1,2", "--loop", "0"], "the first would not end"),
        (["--cnum", "1", "--processes", "2"], "2 processes for 1 clients"),
        (["--rate", "0"], "rate 0.0 is not greater than 0"),
        (["--rate", "x"], "argument --rate"),
        (["--shape", "1,2"], "--shape is for inputs that are not given"),
        (["--plaintext"], "--plaintext and --ca exclude each other"),
        (["--key", "k"], "--key without --cert"),
        (["--url", "a:1"], "--url and ADDRESS exclude each other"),
        (["--version", "1", "--version-label", "x"], "exclude each other"),
    ],
)
def test_wrong_usage(run, double, x, arguments, words):
    done = run(*bench(double, "--input", x, *arguments))
    assert (done.returncode, done.stdout) == (EX_USAGE, "")
    assert words in done.stderr
    assert not double.requests


# --- a terminal ---------------------------------------------------------------


def test_progress_on_a_terminal_alone(double, x):
    """Standard error is a terminal; the figures still go to standard output alone."""
    ours, theirs = pty.openpty()
    load = ["--cnum", 2, "--loop", 20, "--quiet"]
    with subprocess.Popen(
        command(*bench(double, "--input", x, *load)),
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # EIO: the other end is closed
                break
            if not piece:
                break
            shown += piece
        out, _errors = process.communicate(timeout=30)
    os.close(ours)
    assert process.returncode == EX_OK
    assert re.search(rb"\d+ requests, \d+\.\d/s, p50 \d+\.\d ms, p99", shown)
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "warm-up",
        "summary",
        "latency(ms)",
        "errors",
    ]


# --- client certificates ------------------------------------------------------


def test_a_client_key_is_in_no_argument_and_no_environment(tmp_path, x):
    both, public = self_signed("client")
    (tmp_path / "client.crt").write_bytes(public)
    (tmp_path / "client.key").write_bytes(both.removesuffix(public))
    identity = ["--cert", tmp_path / "client.crt", "--key", tmp_path / "client.key"]
    secret = both.splitlines()[1]
    with running_double(tmp_path, client_ca_pem=public) as double:
        arguments = bench(double, "--input", x, *identity, "--loop", 0, "--cnum", 2)
        with running([*arguments, "--processes", 2]) as process:
            assert process.stdout.readline().startswith("warm-up: ")
            found = [process.pid, *children(process.pid)]
            assert len(found) == 3
            for pid in found:
                for name in ("cmdline", "environ"):
                    assert secret not in Path(f"/proc/{pid}/{name}").read_bytes()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=30)
    assert process.returncode == 130
    assert not any(os.path.exists(f"/proc/{pid}") for pid in found)


def children(pid):
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(one) for task in tasks for one in task.read_text().split()]


# --- as the reference is called -----------------------------------------------


def test_the_references_command_line_and_lines(run, double):
    load = ["-batch", 2, "-cnum", 2, "-loop", 3]
    done = run("-url", double.address, "-crt", double.ca, *load, "--model", "pixels")
    assert (done.returncode, done.stderr) == (EX_OK, "")
    lines = done.stdout.splitlines()
    assert sum(bool(re.fullmatch(QUERY, line)) for line in lines) == 6
    (answer,) = (line for line in lines if line.startswith("{'outputs'"))
    answer = ast.literal_eval(answer)
    assert answer["outputs"]["y"]["dtype"] == "DT_FLOAT"
    assert answer["modelSpec"]["name"] == "pixels"
    number = r"\d+\.\d+"
    summary = (
        rf"summary: cnum 2, batch 2, e2e time\(s\) {number}, "
        rf"average latency\(ms\) {number}, tps: {number}"
    )
    assert sum(bool(re.fullmatch(summary, line)) for line in lines) == 1


def test_the_references_image_model_and_two_dashes(run, double, tmp_path):
    image = tmp_path / "cat.jpg"
    Image.new("RGB", (6, 4), (200, 0, 0)).save(image)
    common = [f"--url={double.address}", "--crt", double.ca, "--img", image]
    done = run(*common, "--loop", 1, "--cnum", 1)
    assert done.returncode == EX_UNAVAILABLE
    assert "Latest(resnet50-v15-fp32)" in done.stderr
    done = run(*common, "--loop", 1, "--cnum", 1, "--model", "pixels", "--quiet")
    assert done.returncode == EX_OK
    sent = double.requests[-1].inputs["x"]
    assert [dim.size for dim in sent.tensor_shape.dim] == [1, 2, 3, 3]
    assert max(sent.tensor_content) > 0


def test_the_references_mutual_tls(run, tmp_path):
    both, public = self_signed("client")
    (tmp_path / "c.crt").write_bytes(public)
    (tmp_path / "c.key").write_bytes(both.removesuffix(public))
    with running_double(tmp_path, client_ca_pem=public) as double:
        done = run(
            *("-url", double.address, "-ca", double.ca, "-crt", tmp_path / "c.crt"),
            *("-key", tmp_path / "c.key", "-loop", 1, "-cnum", 1),
            *("--model", "pixels", "--quiet"),
        )
    assert (done.returncode, done.stderr) == (EX_OK, "")


def test_without_a_certificate_there_is_no_channel_by_accident(run, tmp_path):
    """The reference falls back to plain text; here that is said."""
    with running_double(tmp_path, tls=False) as double:
        done = run("--url", double.address, "--loop", 1, "--model", "pixels")
        assert done.returncode == EX_USAGE
        assert "--ca FILE is missing: whom to believe" in done.stderr
        load = ["--loop", 1, "--cnum", 1, "--model", "pixels"]
        done = run("--url", double.address, "--plaintext", *load)
    assert done.returncode == EX_OK
    assert "query: insecure channel, task 0, batch 1, loop_idx 0, " in done.stdout


# --- predict and show ---------------------------------------------------------


def test_images_labels_and_the_greatest(run, double, tmp_path):
    image, labels = tmp_path / "a.png", tmp_path / "labels.txt"
    Image.new("RGB", (3, 2), (1, 2, 3)).save(image)
    common = [double.address, "--ca", double.ca, "--model", "pixels"]
    done = run("predict", *common, "--input", image, "--image", f"x={image}")
    assert (done.returncode, "input x is given twice" in done.stderr) == (
        EX_USAGE,
        True,
    )
    done = run("predict", *common, "--input", image, "--input", image, "--json")
    assert done.returncode == EX_OK, done.stderr
    output = json.loads(done.stdout)["outputs"]["y"]
    assert output["shape"] == [2, 2, 3, 3]
    assert output["values"][1][1][2] == [2.0, 4.0, 6.0]
    x = tmp_path / "x.json"
    x.write_text("[[0.5, 3, 1]]")
    labels.write_text("cat\ndog\nemu\n")
    common[-1] = "double"
    done = run("predict", *common, "--input", x, "--labels", labels, "--top", 2)
    assert done.stdout == (
        "y: float32 [1, 3]\nrow 0\n  6                1  dog\n  2                2  emu\n"
    )
    done = run("predict", *common, "--input", x, "--top", 1, "--json")
    assert json.loads(done.stdout)["outputs"]["y"] == {
        "dtype": "float32",
        "shape": [1, 3],
        "top": [[{"index": 1, "score": 6.0}]],
    }
    labels.write_text("cat\n")
    done = run("predict", *common, "--input", x, "--labels", labels)
    assert done.returncode == EX_DATAERR
    assert "output y has 3 classes, but there are 1 labels" in done.stderr


def test_an_input_that_does_not_fit_is_not_sent(run, double, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 3), np.float32))
    common = [double.address, "--ca", double.ca, "--model", "pixels"]
    done = run("predict", *common, "--input", tmp_path / "x.npy")
    assert (done.returncode, done.stdout) == (EX_DATAERR, "")
    assert done.stderr == (
        "tdx-infer: error: input x: shape [2, 3, 3]; the model takes float [?, 2, 3, 3]\n"
        "tdx-infer: hint: the first axis counts the examples, also if there is one: "
        "array[None, ...]\n"
    )
    assert [type(one).__name__ for one in double.requests] == [
        "GetModelMetadataRequest"
    ]


def test_a_refused_request_is_told_with_what_does_not_fit(run, double, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 2), np.float32))
    common = [double.address, "--ca", double.ca, "--model", "double"]
    done = run("predict", *common, "--input", f"q={tmp_path / 'x.npy'}")
    assert done.returncode == EX_DATAERR
    assert "INVALID_ARGUMENT: no x" in done.stderr
    assert "hint: no input 'q' in the signature; it has: x\n" in done.stderr


def test_predict_without_an_input(run, double):
    done = run("predict", double.address, "--ca", double.ca, "--model", "double")
    assert (done.returncode, "--input FILE is missing" in done.stderr) == (
        EX_USAGE,
        True,
    )


def test_show(run, double):
    common = [double.address, "--ca", double.ca, "--model", "pixels"]
    done = run("show", *common)
    assert done.stdout == (
        "model pixels, version 7\n"
        "signature serving_default\n"
        "  input   x: float [?, 2, 3, 3]\n"
        "  output  y: float of unknown shape\n"
        "signature two\n"
        "  input   x: int32 of unknown shape\n"
        "  input   z: int32 of unknown shape\n"
    )
    shown = json.loads(run("show", *common, "--json").stdout)
    assert shown["signatures"]["serving_default"]["inputs"] == {
        "x": {"dtype": "float", "shape": [None, 2, 3, 3]}
    }


def test_completion():
    text = completion("tdx-infer", "tdxd.cli.tdx_infer")
    assert text is not None
    for word in (
        "predict",
        "bench",
        "show",
        "--rate",
        "--labels",
        "--pixels",
        "--arrivals",
    ):
        assert word in text
    done = subprocess.run(["bash", "-n"], input=text, text=True, check=False)
    assert done.returncode == 0
