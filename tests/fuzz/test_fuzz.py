"""A bounded run of the fuzzer over every parser; `make fuzz` looks for longer.

The number of runs and the seed are fixed, so that a run can be repeated.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fuzz.targets import TARGETS

pytest.importorskip("atheris", reason="atheris is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_raise_anything_but_the_parsers_own_error(name, tmp_path):
    corpus, runs = tmp_path / "corpus", TARGETS[name].runs
    options = [f"-runs={runs}", "-seed=1", "-timeout=20", "-rss_limit_mb=2048"]
    options.append(f"-artifact_prefix={tmp_path}/")
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", name, corpus, *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert f"Done {runs} runs" in done.stderr


def test_every_seed_is_accepted_by_its_parser_or_refused_by_its_error():
    for target in TARGETS.values():
        for seed in target.seeds:
            target.run(seed)
