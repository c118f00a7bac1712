"""tdx-convert as packaged: it needs no TensorFlow, and finds the model server's for the check."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.graphs import frozen, two_towers
from tests.packaging.unpacked import installed

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def run(unpacked, clean_environment, tmp_path):
    """Return a function that runs tdx-convert as if some packages were installed."""
    frozen(two_towers(), tmp_path / "g.pb")

    def program(*argv: object, packages=("tdxd-owner",)):
        prefix = installed(*map(unpacked, packages))
        return subprocess.run(
            [*prefix, "tdx-convert", *map(str, argv)],
            env=clean_environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    return program


def test_the_owners_package_converts_without_tensorflow(run, tmp_path) -> None:
    done = run("g.pb", "m", "--no-check")
    assert done.returncode == 0, done.stderr
    assert "not checked: no TensorFlow has loaded it" in done.stdout
    assert (tmp_path / "m/1/saved_model.pb").exists()


def test_where_there_is_no_tensorflow_nothing_is_made_unchecked(run, tmp_path) -> None:
    done = run("g.pb", "m")
    assert done.returncode == 69
    assert "no TensorFlow to check the model with" in done.stderr
    assert (
        "install tdxd-model-server, or convert unchecked with --no-check" in done.stderr
    )
    assert not (tmp_path / "m").exists()


def test_an_environment_of_ones_own_can_be_named(run, tmp_path) -> None:
    done = run("g.pb", "m", "--python", sys.executable)
    assert done.returncode == 0, done.stderr
    assert "run both ways, greatest difference of the answers 0" in done.stdout


def test_the_model_servers_package_checks_what_is_converted(run) -> None:
    done = run("g.pb", "m", packages=("tdxd-owner", "tdxd-model-server"))
    assert done.returncode == 0, done.stderr
    assert "eagerly and in a Session\n" in done.stdout
    assert "run both ways, greatest difference of the answers 0" in done.stdout
    assert "warm-up requests: 1" in done.stdout
