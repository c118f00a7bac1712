"""Replacing a program in its process, on the real kernel: what stays, what goes, what is undone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tdxd.errors import HostError
from tdxd.host import exec_in_place
from tdxd.host.exec_in_place import SIGNALS, Program

ROOT = Path(__file__).parents[2]
HEAD = f"""#!{sys.executable} -I
import json, os, signal, socket, subprocess, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
from tdxd.host import exec_in_place
inherited = exec_in_place.take()
"""


def run(tmp_path: Path, first: str, second: str, **more: Any) -> Any:
    """Run a script whose first life executes itself anew; return the JSON that it prints."""
    path = tmp_path / "program"
    text = HEAD + "if inherited is None:\n    program = exec_in_place.this_program()\n"
    text += "".join(f"    {line}\n" for line in first.splitlines())
    path.write_text(text + second)
    path.chmod(0o755)
    done = subprocess.run(
        [path, "an argument"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        **more,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


REPLACE = """
with exec_in_place.held_signals() as caught_fd:
    exec_in_place.replace(program, state=state, fds=fds, caught_fd=caught_fd)
"""


def test_process_state_and_named_descriptors_stay(tmp_path: Path) -> None:
    first = """
kept, other = os.memfd_create("kept"), os.memfd_create("other")
os.set_inheritable(other, True)  # as a careless library would
leaked = os.dup(2)
os.set_inheritable(leaked, True)
state, fds = f"{os.getpid()} {kept}".encode() + bytes(3_000_000), [kept]
"""
    second = """
words = inherited.state.rstrip(b"\\0").decode().split()
open_ = {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
         if os.path.lexists(f"/proc/self/fd/{name}")}
child = subprocess.run(["/usr/bin/env"], stdout=subprocess.PIPE, check=True, close_fds=False)
fds = "import os; print(sorted(os.listdir('/proc/self/fd')))"
seen = subprocess.run([sys.executable, "-Ic", fds], stdout=subprocess.PIPE, close_fds=False)
print(json.dumps({
    "same pid": words[0] == str(os.getpid()), "kept": open_[words[1]], "open": sorted(open_),
    "inheritable": os.get_inheritable(int(words[1])), "size": len(inherited.state),
    "env": os.environ.get("TDXD_HANDOVER"), "child env": child.stdout.decode(),
    "child fds": seen.stdout.decode(), "argv": sys.argv[1:], "fds": inherited.fds,
}))
"""
    shown = run(tmp_path, first + REPLACE, second)
    assert shown["same pid"]
    assert shown["kept"] == "/memfd:kept (deleted)"
    assert not shown["inheritable"]
    assert shown["size"] > 3_000_000
    assert shown["argv"] == ["an argument"]
    assert shown["open"][:3] == ["0", "1", "2"]
    assert len(shown["open"]) == 4
    assert shown["env"] is None
    assert "TDXD_HANDOVER" not in shown["child env"]
    assert shown["child fds"].strip() == "['0', '1', '2', '3']"
    assert len(shown["fds"]) == 3  # the state and the caught signals are closed by now


def test_the_environment_is_that_of_the_first_start(tmp_path: Path) -> None:
    """What was taken out of it in between (systemd's variables) is there again."""
    first = 'os.environ.pop("NOTIFY_SOCKET")\nos.environ["MORE"] = "1"\nstate, fds = b"", []'
    second = (
        'print(json.dumps([os.environ.get("NOTIFY_SOCKET"), os.environ.get("MORE")]))'
    )
    env = {**os.environ, "NOTIFY_SOCKET": "/run/x"}
    assert run(tmp_path, first + REPLACE, second, env=env) == ["/run/x", None]


@pytest.mark.parametrize("threads", [0, 3])
def test_a_signal_in_the_last_moment_is_pending_then(
    tmp_path: Path, threads: int
) -> None:
    """Also one that another thread caught, in which this one's mask does not hold it back."""
    first = f"""
for number in exec_in_place.SIGNALS:
    signal.signal(number, lambda *_: None)
for _ in range({threads}):
    threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
with exec_in_place.held_signals() as caught_fd:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    pending = signal.sigpending()
    exec_in_place.replace(
        program, state=json.dumps(sorted(pending)).encode(), fds=[], caught_fd=caught_fd
    )
"""
    second = """
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
print(json.dumps([json.loads(inherited.state), sorted(signal.sigpending()), sorted(blocked)]))
"""
    before, pending, blocked = run(tmp_path, first, second)
    assert before == ([] if threads else [signal.SIGTERM])  # another thread took it
    assert pending == [signal.SIGTERM]
    assert set(SIGNALS) <= set(blocked)


def test_an_exec_that_fails_is_undone(tmp_path: Path) -> None:
    heard: list[int] = []
    before = {one: signal.getsignal(one) for one in SIGNALS}
    signal.signal(signal.SIGHUP, lambda number, _frame: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    open_ = sorted(os.listdir("/proc/self/fd"))
    program = Program(path=str(tmp_path / "none"), argv=("none",), env={})
    kept = os.memfd_create("kept")
    try:
        with exec_in_place.held_signals() as caught_fd:
            # To this thread: others, left by tests before, do not hold signals back.
            signal.pthread_kill(threading.get_ident(), signal.SIGHUP)
            assert heard == []
            with pytest.raises(HostError, match=r"execute .*none: No such file"):
                exec_in_place.replace(
                    program, state=b"x", fds=[kept], caught_fd=caught_fd
                )
            assert not os.get_inheritable(kept)
        assert heard == [signal.SIGHUP]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    finally:
        os.close(kept)
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert sorted(os.listdir("/proc/self/fd")) == open_
    assert "TDXD_HANDOVER" not in os.environ


@pytest.mark.parametrize("note", ["1:3:4", "x", ":", "", "{pid}x:3:4"])
def test_a_variable_meant_for_another_process_is_dropped(
    monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    monkeypatch.setenv("TDXD_HANDOVER", note.format(pid=os.getpid()))
    assert exec_in_place.take() is None
    assert "TDXD_HANDOVER" not in os.environ


@pytest.mark.parametrize("note", ["{pid}:999:998", "{pid}:", "{pid}:a:b"])
def test_state_that_is_not_there_is_empty(
    monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    monkeypatch.setenv("TDXD_HANDOVER", note.format(pid=os.getpid()))
    inherited = exec_in_place.take()
    assert inherited is not None
    assert inherited.state == b""


def test_python_with_a_module_is_started_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from tdxd.host.exec_in_place import this_program\n"
        "made = this_program(); print(made.path, *made.argv)\n"
    )
    argv = [sys.executable, "-B", "-m", "one", "an argument"]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == " ".join([sys.executable, *argv]) + "\n"
