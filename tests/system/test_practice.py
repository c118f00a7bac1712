"""The documents of the practice, run: what needs no cloud, in order, with a simulated platform.

Each block that is to be run is taken from the document as it stands. What needs a cloud is looked
at by tests/cli/test_practice_words.py.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import Block, blocks_of, matches

pytestmark = [pytest.mark.root, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ANY_CLOUD = ROOT / "docs/practice-any-cloud.md"
ALIYUN = ROOT / "docs/practice-aliyun.md"
LIMIT_S = 240
"""Machines that run tests stall; without company it takes a quarter of that."""
STATUS = re.compile(r"tdxctl .*\bstatus$", re.MULTILINE)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """A place for both documents: the second finds the model that the first has trained."""
    made = Path("/var/tmp") / f"tdxd-practice-{os.getpid()}"
    made.mkdir()
    made.chmod(0o755)  # the model server runs as another user
    try:
        yield made
    finally:
        shutil.rmtree(made)


def script(blocks: list[Block], outputs: Path) -> str:
    """Return one shell script of all blocks; the output of each goes to a file of its own."""
    lines = ["set -eu -o pipefail", "ip link set lo up"]
    for block in blocks:
        lines += [f"exec >{outputs}/{block.line} 2>&1", f"echo {block.line} >&9"]
        if block.exit_code:
            body = f"(\n{block.body})"
            lines += [f"code=0; {body} || code=$?", f"test $code = {block.exit_code}"]
        else:
            lines.append(block.body)
    return "\n".join([*lines, "echo end >&9", ""])


def run(path: Path, directory: Path) -> dict[int, str]:
    """Run a document in a network, and with processes, of its own; return what each block said."""
    outputs = directory / f"{path.stem}-output"
    place = directory / path.stem
    for one in (outputs, place):
        one.mkdir()
        one.chmod(0o755)
    if (directory / "training").exists():
        shutil.copytree(directory / "training", place / "training")
    blocks = [block for block in blocks_of(path) if block.runs]
    assert blocks, f"{path.name}: nothing runs"
    story = outputs / "story.sh"
    story.write_text(script(blocks, outputs))
    argv = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child"]
    argv += ["--mount-proc", "bash", "-c", 'exec 9>"$1"; exec bash "$2"', "bash"]
    argv += [str(outputs / "reached"), str(story)]
    path_variable = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path_variable, "TDXD": str(ROOT)}
    env["TF_CPP_MIN_LOG_LEVEL"] = "3"
    with subprocess.Popen(argv, cwd=place, env=env, start_new_session=True) as process:
        try:
            code = process.wait(LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    reached = (outputs / "reached").read_text().split()
    said = {one.line: (outputs / str(one.line)) for one in blocks}
    texts = {line: file.read_text() for line, file in said.items() if file.exists()}
    last = reached[-1] if reached else "0"
    log = place / "tdxd.log"
    told = log.read_text()[-3000:] if log.exists() else ""
    assert (code, last) == (0, "end"), (
        f"{path.name}:{last} ended with {code}:\n{texts.get(int(last), '')[-4000:]}\n{told}"
    )
    return texts


def check_shown(path: Path, said: dict[int, str]) -> None:
    """Check that what the document shows is what the block above it said."""
    above = 0
    status = ""
    for block in blocks_of(path):
        if block.runs:
            above = block.line
            if STATUS.search(block.body):
                status = said[above]
        elif block.info in ("text", "text status"):
            lines = (
                status if block.info == "text status" else said[above]
            ).splitlines()
            for shown in block.body.splitlines():
                found = [at for at, line in enumerate(lines) if matches(shown, line)]
                assert found, f"{block.place}: {shown!r} is not in\n" + "\n".join(lines)
                del lines[: found[0] + 1]


def check_nothing_is_left(directory: Path) -> None:
    """The document has ended all that it began."""
    assert str(directory) not in Path("/proc/mounts").read_text()
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        assert "tdxd:digits:" not in path.read_text(errors="replace")


def test_any_cloud_from_a_model_to_its_users_and_back(directory: Path) -> None:
    said = run(ANY_CLOUD, directory)
    check_shown(ANY_CLOUD, said)
    check_nothing_is_left(directory)
    shutil.copytree(directory / ANY_CLOUD.stem / "training", directory / "training")


def test_aliyun_up_to_the_cloud(directory: Path) -> None:
    """What the owner does there; the model is the one that was trained for the other document."""
    said = run(ALIYUN, directory)
    check_shown(ALIYUN, said)
    check_nothing_is_left(directory)
