"""How `tdxctl mount` comes by a passphrase, and where it never shows it."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdxd.cli import passphrase
from tdxd.core import wire
from tdxd.errors import (
    HostError,
    PassphraseNeededError,
    TdxdError,
    WrongPassphraseError,
)

ROOT = Path(__file__).parents[2]
WORD = b"correct horse \xc3\xa4 staple"
SHOWN = {"version": "t", "volumes": [], "ready": True}
LIMIT_S = 60.0


class Daemon:
    """Answers `mount` as tdxd does for a volume that an operator opens."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[dict[str, Any]] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                conversation, _peer = self._listener.accept()
            except OSError:
                return
            with conversation:
                reader, messages = wire.FrameReader(), list[dict[str, object]]()
                while not messages:
                    messages = reader.feed(conversation.recv(65536))
                conversation.sendall(wire.encode_frame(self._answer(messages[0])))

    def _answer(self, message: dict[str, object]) -> dict[str, object]:
        number, verb, args = wire.parse_request(message)
        assert verb == "mount"
        self.asked.append(args)
        error: TdxdError
        if "passphrase" not in args:
            error = PassphraseNeededError("volume m: needs it", hint="tdxctl mount m")
        elif args["passphrase"] != WORD:
            error = WrongPassphraseError("m.img: no keyslot opens with the passphrase")
        else:
            return wire.reply(number, more=False, result=SHOWN)
        return wire.error_reply(number, error)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    made = Daemon(tmp_path / "sock")
    yield made
    made.close()


def argv(daemon: Daemon, *more: str) -> list[str]:
    start = [sys.executable, "-m", "tdxd.cli.tdxctl", "--socket", str(daemon.path)]
    return [*start, "mount", "m", "--json", *more]


ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def run(daemon: Daemon, *more: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run it where there is no terminal to ask on."""
    return subprocess.run(
        argv(daemon, *more),
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
        env=ENV,
        start_new_session=True,
        **options,
    )


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execve(command[0], command, ENV)
        self.text = b""

    def until(self, what: bytes, *, times: int = 1) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while self.text.count(what) < times:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, self.text
            if select.select([self.fd], [], [], left_s)[0]:
                self.text += os.read(self.fd, 4096)

    def type(self, line: bytes, *, prompts: int = 1) -> None:
        self.until(b"Passphrase of volume m: ", times=prompts)
        assert not termios.tcgetattr(self.fd)[3] & termios.ECHO
        os.write(self.fd, line + b"\n")

    def end(self) -> int:
        """Read all that it still says; return its exit code."""
        while True:
            try:
                data = os.read(self.fd, 4096)
            except OSError:  # the terminal of a program that ended
                break
            if not data:
                break
            self.text += data
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(daemon: Daemon) -> Iterator[Terminal]:
    made = Terminal(argv(daemon))
    yield made
    with contextlib.suppress(
        ChildProcessError, ProcessLookupError
    ):  # the test has seen its end
        os.kill(made.pid, signal.SIGKILL)
        os.waitpid(made.pid, 0)


def test_it_is_asked_for_on_the_terminal_and_not_shown(
    daemon: Daemon, terminal: Terminal
) -> None:
    terminal.type(WORD)
    assert terminal.end() == 0
    assert [one.get("passphrase") for one in daemon.asked] == [None, WORD]
    assert WORD not in terminal.text
    assert b'"ready": true' in terminal.text


def test_a_wrong_one_is_asked_for_again(daemon: Daemon, terminal: Terminal) -> None:
    terminal.type(b"sesame")
    terminal.until(b"no keyslot opens with the passphrase")
    terminal.type(WORD, prompts=2)
    assert terminal.end() == 0
    assert daemon.asked[-1]["passphrase"] == WORD
    assert b"sesame" not in terminal.text


def test_three_wrong_ones_are_enough(daemon: Daemon, terminal: Terminal) -> None:
    for count in (1, 2, 3):
        terminal.type(b"sesame", prompts=count)
    assert terminal.end() == 65
    assert len(daemon.asked) == 4
    assert terminal.text.count(b"no keyslot opens") == 3


def test_nothing_typed_is_no_passphrase(daemon: Daemon, terminal: Terminal) -> None:
    terminal.type(b"")
    assert terminal.end() == 64
    assert b"the passphrase is empty" in terminal.text
    assert len(daemon.asked) == 1


def test_whoever_gives_up_gets_the_terminal_back(
    daemon: Daemon, terminal: Terminal
) -> None:
    terminal.until(b"Passphrase of volume m: ")
    watched = os.open(f"/proc/{terminal.pid}/fd/0", os.O_RDWR | os.O_NOCTTY)
    assert not termios.tcgetattr(watched)[3] & termios.ECHO
    os.write(terminal.fd, b"ses\x03")
    assert os.waitstatus_to_exitcode(os.waitpid(terminal.pid, 0)[1]) == 130
    assert termios.tcgetattr(watched)[3] & termios.ECHO
    os.close(watched)
    os.close(terminal.fd)
    assert len(daemon.asked) == 1


def test_without_a_terminal_the_daemons_error_is_told(daemon: Daemon) -> None:
    done = run(daemon, stdin=subprocess.DEVNULL)
    assert done.returncode == 77
    assert "needs it" in done.stderr
    assert "hint: tdxctl mount m" in done.stderr


def test_from_a_descriptor(daemon: Daemon) -> None:
    reading, writing = os.pipe()
    os.write(writing, WORD)
    os.close(writing)
    done = run(daemon, "--passphrase-fd", str(reading), pass_fds=(reading,))
    os.close(reading)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == SHOWN
    assert done.stderr == ""
    assert daemon.asked == [{"volume": "m", "passphrase": WORD}]


def test_from_a_file_with_the_newline_that_stands_there(
    daemon: Daemon, tmp_path: Path
) -> None:
    path = tmp_path / "word"
    path.write_bytes(WORD + b"\n")
    done = run(daemon, "--passphrase-file", str(path))
    assert done.returncode == 65
    assert "ends in a newline, which counts" in done.stderr
    assert daemon.asked[0]["passphrase"] == WORD + b"\n"
    path.write_bytes(WORD)
    assert run(daemon, "--passphrase-file", str(path)).returncode == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--passphrase-fd", "99"), "descriptor 99: Bad file descriptor"),
        (("--passphrase-fd", "-1"), "descriptor -1: Bad file descriptor"),
        (("--passphrase-fd", "9" * 12), "descriptor 999999999999: "),
        (("--passphrase-fd", "0"), "descriptor 0: the passphrase is empty"),
        (("--passphrase-file", "/dev/zero"), "longer than 512 bytes"),
        (("--passphrase-fd", "0", "--passphrase-file", "/x"), "give one of them"),
    ],
)
def test_what_is_no_passphrase(
    daemon: Daemon, options: tuple[str, ...], text: str
) -> None:
    done = run(daemon, *options, stdin=subprocess.DEVNULL)
    assert done.returncode == 64
    assert text in done.stderr
    assert daemon.asked == []


def test_no_such_file(daemon: Daemon) -> None:
    done = run(daemon, "--passphrase-file", "/none/word")
    assert done.returncode == 71
    assert "open /none/word: No such file" in done.stderr


def test_a_terminal_that_hung_up_is_told_in_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(passphrase, "_TERMINAL", "/dev/null")
    monkeypatch.setattr(passphrase, "hide_memory", lambda: None)
    with pytest.raises(HostError, match="ask on /dev/null"):
        passphrase.asked_on_terminal("volume m")


def test_no_argument_shows_it_while_the_program_has_it(daemon: Daemon) -> None:
    reading, writing = os.pipe()
    started = subprocess.Popen(
        argv(daemon, "--passphrase-fd", str(reading)),
        pass_fds=(reading,),
        stdout=subprocess.DEVNULL,
        env=ENV,
    )
    os.close(reading)
    os.write(writing, WORD)  # it waits for the end of this
    for name in ("cmdline", "environ"):
        assert WORD not in Path(f"/proc/{started.pid}/{name}").read_bytes()
    os.close(writing)
    assert started.wait(LIMIT_S) == 0


@pytest.mark.parametrize("how", ["from_fd(0)", "from_file('/dev/stdin')"])
def test_no_core_has_it(how: str) -> None:
    """What reads a passphrase is not dumpable from then on (PR_GET_DUMPABLE is 3)."""
    code = (
        "import ctypes\n"
        "from tdxd.cli import passphrase\n"
        "before = ctypes.CDLL(None).prctl(3)\n"
        f"passphrase.{how}\n"
        "print(before, ctypes.CDLL(None).prctl(3))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=WORD,
        capture_output=True,
        check=True,
        env=ENV,
        timeout=LIMIT_S,
    )
    assert done.stdout == b"1 0\n"
