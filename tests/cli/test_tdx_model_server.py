"""tdx-model-server as a person runs it, as far as it goes without TensorFlow."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.model_server.running import ROOT, server_command

FAILED_START = 255


def run(*flags):
    # stderr also lists every import, which shows that TensorFlow is none of them.
    return subprocess.run(
        server_command(*flags),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
    )


def test_help_shows_the_flags():
    done = run("--help")
    assert done.returncode == 0
    assert "--grpc_socket_path=" in done.stdout


def test_version_is_two_lines_as_the_originals_and_starts_no_tensorflow():
    done = run("--version")
    first, second = done.stdout.splitlines()
    assert first.startswith("TensorFlow ModelServer: 2.")
    assert second.startswith("TensorFlow Library: 2.")
    assert done.returncode == 0
    assert "| tensorflow\n" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "error", "hint"),
    [
        (
            ["--prot=8500"],
            "unknown argument: --prot=8500",
            "did you mean --port=…?",
        ),
        (
            ["--model_base_path=/m", "--ssl_config_file="],
            "--ssl_config_file=: not supported by this server",
            "this server has no TLS: put tdxd's front before it",
        ),
        (
            ["--port=0", "--model_base_path=/m"],
            "--port=0 without --grpc_socket_path: nothing to listen on",
            "give one of them",
        ),
        (
            ["--model_config_file=/nonexistent"],
            (
                "--model_config_file: [Errno 2] No such file or directory: "
                "'/nonexistent'"
            ),
            None,
        ),
        (
            ["--model_base_path=models/m"],
            (
                "Expected model default to have an absolute path or URI; "
                "got base_path()=models/m"
            ),
            None,
        ),
    ],
)
def test_a_start_that_fails(flags, error, hint):
    done = run(*flags)
    own = [line for line in done.stderr.splitlines() if line.startswith("tdx-model")]
    want = [f"tdx-model-server: error: {error}"]
    if hint is not None:
        want.append(f"tdx-model-server: hint: {hint}")
    assert own == want
    assert (done.returncode, done.stdout) == (FAILED_START, "")
