"""Finds a TensorFlow on this machine and lets it load what was converted, in a process of its own.

The process apart is for two reasons: TensorFlow is not shipped with the owner's tools, so it may
stand in another Python; and a bad graph can make it abort.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tdxd.errors import DataError, HostError, UnavailableError

__all__ = [
    "MODEL_SERVER_LIBRARY",
    "TensorFlowCheck",
    "find_tensorflow",
    "shortened",
    "tensorflow_check",
]

MODEL_SERVER_LIBRARY = Path("/usr/lib/tdxd-model-server/python")
"""Where the package tdxd-model-server keeps a TensorFlow, for Debian's Python."""

_CHILD = Path(__file__).with_name("tensorflow_child.py")
_PROBE = """
import importlib.util, sys
found = importlib.util.find_spec("tensorflow")
sys.exit(not (found and found.origin))
"""
_PROBE_LIMIT_S = 30.0
_ANSWER_LIMIT_S = 900.0
_SHOWN_CHARACTERS = 600
_HINT = (
    "name a Python that has TensorFlow with --python, or install tdxd-model-server, or convert "
    "unchecked with --no-check"
)


def find_tensorflow(python: str | None = None) -> tuple[str, ...]:
    """Return a command to which the child's text is added; `python` names the interpreter.

    Else it is this one, or Debian's with the model server's package, or the PATH's.

    Raises: UnavailableError if none of them has TensorFlow.
    """
    if python is not None:
        if not _has_tensorflow(python):
            raise UnavailableError(f"{python} finds no TensorFlow", hint=_HINT)
        return (python, "-c")
    # The owner's package brings the directory tensorflow, but only message files in it.
    spec = importlib.util.find_spec("tensorflow")
    if spec is not None and spec.origin is not None:
        return (sys.executable, "-c")
    if (MODEL_SERVER_LIBRARY / "tensorflow" / "__init__.py").is_file():
        return ("/usr/bin/python3", "-IS", "-c")
    for name in ("python3", "python"):
        found = shutil.which(name)
        if found is not None and _has_tensorflow(found):
            return (found, "-c")
    raise UnavailableError("no TensorFlow to check the model with", hint=_HINT)


def _has_tensorflow(python: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-c", _PROBE],
            cwd="/",
            capture_output=True,
            timeout=_PROBE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    except OSError as exc:
        raise HostError.of("run", python, exc) from exc
    return done.returncode == 0


@contextlib.contextmanager
def tensorflow_check(command: tuple[str, ...]) -> Iterator[TensorFlowCheck]:
    """Start the process; it ends with the block.

    Raises: HostError; UnavailableError if TensorFlow does not start.
    """
    library = [str(MODEL_SERVER_LIBRARY)] if "-IS" in command else []
    argv = [*command, _CHILD.read_text(encoding="utf-8"), *library]
    with tempfile.TemporaryFile() as noise:
        try:
            process = subprocess.Popen(
                argv,
                cwd="/",  # with -c, the first place where modules are looked for
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=noise,
                text=True,
            )
        except OSError as exc:
            raise HostError.of("run", command[0], exc) from exc
        try:
            yield TensorFlowCheck(process, noise)
        finally:
            process.kill()  # it may be anywhere in TensorFlow, and has nothing to lose
            with contextlib.suppress(BrokenPipeError), process:  # closes the pipes
                pass


class TensorFlowCheck:
    """A running process that has TensorFlow. Paths must be absolute.

    Raises: UnavailableError if TensorFlow does not start.
    """

    def __init__(self, process: subprocess.Popen[str], noise: IO[bytes]) -> None:
        self._process = process
        self._noise = noise
        try:
            self.version: str = self._ask("hello")["version"]
        except DataError as exc:
            raise UnavailableError(
                f"TensorFlow does not start: {exc.message}", hint=exc.hint or _HINT
            ) from exc

    def describe(self, path: Path, tensors: list[str]) -> dict[str, Any]:
        """Return `dtype` and `shape` of tensors in the graph of a SavedModel.

        Raises: DataError with TensorFlow's words if it cannot be loaded.
        """
        answer = self._ask("describe", path=str(path), tensors=tensors)
        return dict(answer["tensors"])

    def check(self, path: Path, samples: dict[str, Any]) -> dict[str, Any]:
        """Load both ways, run each signature's sample; see `tensorflow_child`.

        Raises: DataError with TensorFlow's words if it cannot be loaded.
        """
        return dict(self._ask("check", path=str(path), samples=samples)["signatures"])

    def _ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(_ANSWER_LIMIT_S, self._process.kill)
        watch.daemon = True  # an interrupt may come before the block that cancels it
        try:
            watch.start()
            self._process.stdin.write(json.dumps({"what": what, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if not line:
            raise DataError(
                f"loading the model: TensorFlow {self._end()}", hint=self._last_words()
            )
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            text = shortened(answer["failed"])
            raise DataError(f"TensorFlow cannot load the model: {text}")
        return answer

    def _end(self) -> str:
        code = self._process.wait(_PROBE_LIMIT_S)
        return f"died of signal {-code}" if code < 0 else f"ended with {code}"

    def _last_words(self) -> str:
        self._noise.seek(0)
        lines = self._noise.read().decode(errors="replace").strip().splitlines()
        return "it said: " + lines[-1][-_SHOWN_CHARACTERS:] if lines else ""


def shortened(text: str) -> str:
    """Return TensorFlow's words on one line; its own hints and traces go on for pages."""
    line = " ".join(text.split())
    if len(line) <= _SHOWN_CHARACTERS:
        return line
    return line[:_SHOWN_CHARACTERS] + "…"
