"""Command the daemon over its socket. Starts fast: imports msgpack and little else."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from tdxd.cli import passphrase
from tdxd.cli.boundary import Parser, run, show_error
from tdxd.cli.doctor_tables import show_findings
from tdxd.cli.status_tables import event_line, show_status, to_json
from tdxd.core import wire
from tdxd.errors import (
    NotAllowedError,
    RemoteProtocolError,
    UnavailableError,
    UsageError,
)

__all__ = ["main"]

_SOCKET = "/run/tdxd.sock"
_SILENCE_S = 30.0
"""The daemon sends a frame every five seconds, and later on a machine that is busy."""
_AGAIN_S = 0.1
_TRIES = 3
"""How often a passphrase is asked for, as cryptsetup does."""

Reply = dict[str, object]


def main() -> int:
    """Run the program; the entry point."""
    return run("tdxctl", _main)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tdxctl", description="Command tdxd.")
    parser.add_argument("--socket", default=_SOCKET, help=f"default: {_SOCKET}")
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(verb: str, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(verb, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print JSON")
        return made

    status = add("status", "show volumes and serving")
    status.add_argument(
        "--watch", action="store_true", help="show it anew at each change"
    )
    _add_passphrase(add("mount", "want a volume mounted until the next reload"))
    add("unmount", "want a volume closed until the next reload").add_argument("volume")
    add("reload", "read the configuration anew; returns when it is carried out")
    reexec = add("reexec", "run the installed tdxd in the place of the one that runs")
    reexec.add_argument("--timeout", type=_seconds, default=120.0, metavar="SECONDS")
    retry = add("retry", "forget failures and try again now")
    retry.add_argument("volume", nargs="?", help="default: all, and serving")
    events = add("events", "show what happened")
    events.add_argument("--follow", "-f", action="store_true", help="go on showing")
    events.add_argument("--all", action="store_true", help="the children's output, too")
    wait = add("wait", "wait until all that is required serves")
    wait.add_argument("--timeout", type=_seconds, metavar="SECONDS")
    health = add("health", "tell by the exit code whether the daemon is live or ready")
    health.add_argument("what", choices=("live", "ready"), nargs="?", default="ready")
    add("version", "show the daemon's version")
    add("doctor", "say what is missing on this machine, and what to do about it")
    return parser


def _add_passphrase(mount: argparse.ArgumentParser) -> None:
    mount.add_argument("volume")
    mount.add_argument(
        "--passphrase-fd",
        type=int,
        metavar="N",
        help="read the passphrase that it needs from a descriptor, not from the terminal",
    )
    mount.add_argument(
        "--passphrase-file",
        metavar="FILE",
        help="read the passphrase that it needs from a file",
    )


def _seconds(text: str) -> float:
    units = {"s": 1, "min": 60, "h": 3600}
    for unit, factor in units.items():
        number = text.removesuffix(unit)
        if text != number and number.replace(".", "", 1).isdigit():
            return float(number) * factor
    return float(text)


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        return _COMMANDS[args.verb](args)
    except (ConnectionError, TimeoutError) as exc:
        raise UnavailableError(
            f"tdxd at {args.socket} ended the conversation: {exc}",
            hint="is it being stopped? systemctl status tdxd",
        ) from exc


# --- talking ------------------------------------------------------------------


def _replies(path: str, verb: str, **args: object) -> Iterator[Reply]:
    """Send a request, yield each reply; ask again where the daemon left off for a re-exec.

    Raises: UnavailableError without a daemon; RemoteError for what it reports.
    """
    while True:
        asked_s = time.monotonic()
        try:
            for message in _conversation(path, verb, args):
                item = message.get("event")
                if isinstance(item, dict):
                    args["after"] = item.get("seq")
                yield message
        except wire.RemoteError as exc:
            if exc.remote_code != "reexec" or verb == "reexec":
                raise
        else:
            return
        left_s = args.get("timeout_s")
        if isinstance(left_s, float):
            args["timeout_s"] = max(0.0, left_s - (time.monotonic() - asked_s))


def _conversation(path: str, verb: str, args: dict[str, object]) -> Iterator[Reply]:
    with _connect(path) as sock:
        sock.sendall(wire.encode_frame(wire.request(verb, args)))
        reader = wire.FrameReader()
        while True:
            data = sock.recv(65536)
            if not data:
                raise RemoteProtocolError(
                    "tdxd closed the connection without an answer"
                )
            for message in reader.feed(data):
                if "error" in message:
                    wire.raise_error(message["error"])
                yield message
                if not message.get("more"):
                    return


def _connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(_SILENCE_S)
    try:
        sock.connect(path)
    except PermissionError as exc:
        sock.close()
        hint = "only root and group tdxd may open it"
        raise NotAllowedError(f"{path}: not allowed to connect", hint=hint) from exc
    except OSError as exc:
        sock.close()
        hint = "is tdxd running? systemctl status tdxd"
        raise UnavailableError(
            f"no daemon at {path}: {exc.strerror}", hint=hint
        ) from exc
    return sock


def _result(path: str, verb: str, **args: object) -> dict[str, object]:
    """Send a request and return the result of its last reply."""
    result: object = None
    for message in _replies(path, verb, **args):
        result = message.get("result")
    return result if isinstance(result, dict) else {}


# --- commands -----------------------------------------------------------------


def _status(args: argparse.Namespace) -> int:
    show_status(_result(args.socket, "status"), args.json)
    if args.watch:
        for message in _replies(args.socket, "events", follow=True):
            if "event" in message:
                if not args.json:
                    print()
                show_status(_result(args.socket, "status"), args.json)
                sys.stdout.flush()
    return 0


def _change(args: argparse.Namespace) -> int:
    named = {"volume": args.volume} if getattr(args, "volume", None) else {}
    show_status(_result(args.socket, args.verb, **named), args.json)
    return 0


def _mount(args: argparse.Namespace) -> int:
    """Have a volume mounted; ask for its passphrase if the daemon says that it needs one."""
    given = _given_passphrase(args)
    if given is not None:
        return _mount_with(args, given)
    try:
        return _change(args)
    except wire.RemoteError as exc:
        if exc.remote_code != "passphrase-needed" or not passphrase.has_terminal():
            raise
    for left in reversed(range(_TRIES)):
        typed = passphrase.asked_on_terminal(f"volume {args.volume}")
        try:
            return _mount_with(args, typed)
        except wire.RemoteError as exc:
            if exc.remote_code != "volume-passphrase" or not left:
                raise
            show_error("tdxctl", exc)
    raise AssertionError


def _given_passphrase(args: argparse.Namespace) -> bytes | None:
    if args.passphrase_fd is not None and args.passphrase_file is not None:
        raise UsageError("--passphrase-fd and --passphrase-file: give one of them")
    if args.passphrase_fd is not None:
        return passphrase.from_fd(args.passphrase_fd)
    if args.passphrase_file is not None:
        return passphrase.from_file(args.passphrase_file)
    return None


def _mount_with(args: argparse.Namespace, secret: bytes) -> int:
    named: dict[str, object] = {"volume": args.volume, "passphrase": secret}
    show_status(_result(args.socket, "mount", **named), args.json)
    return 0


def _events(args: argparse.Namespace) -> int:
    for message in _replies(args.socket, "events", follow=args.follow, all=args.all):
        item = message.get("event")
        if isinstance(item, dict):
            print(to_json(item) if args.json else event_line(item), flush=args.follow)
    return 0


def _wait(args: argparse.Namespace) -> int:
    """Wait; with a limit also for a daemon that was there, ended and is started again."""
    if args.timeout is None:
        return _verdict(_result(args.socket, "wait", timeout_s=None), args.json)
    if args.timeout < 0:
        raise UsageError(f"timeout {args.timeout} is negative")
    deadline_s, was_there = time.monotonic() + args.timeout, False
    while True:
        left_s = max(0.0, deadline_s - time.monotonic())
        try:
            return _verdict(_result(args.socket, "wait", timeout_s=left_s), args.json)
        except (ConnectionError, TimeoutError, RemoteProtocolError):
            was_there = True
            if not left_s:
                raise
        except UnavailableError:
            if not was_there or not left_s:
                raise
        time.sleep(_AGAIN_S)


def _health(args: argparse.Namespace) -> int:
    shown = _result(args.socket, "health")
    if args.what == "live":
        print(to_json(shown) if args.json else "live")
        return 0
    return _verdict(shown, args.json)


def _verdict(shown: dict[str, object], as_json: bool) -> int:  # noqa: FBT001 — the flag's value
    """Print ready or why not; return the exit code that the daemon names."""
    code = shown.get("exit")
    if as_json:
        print(to_json(shown))
    else:
        reasons = shown.get("reasons")
        texts = [str(item) for item in reasons] if isinstance(reasons, list) else []
        print("ready" if shown.get("ready") else "not ready: " + "; ".join(texts))
    return code if isinstance(code, int) else 0


def _reexec(args: argparse.Namespace) -> int:
    """Have the program replaced, then ask the new one."""
    if args.timeout <= 0:
        raise UsageError(f"timeout {args.timeout:g} is not positive")
    old: Reply = {}
    try:
        for message in _replies(args.socket, "reexec"):
            accepted = message.get("accepted")
            old = accepted if isinstance(accepted, dict) else old
    except (ConnectionError, RemoteProtocolError):
        if not old:  # once it has accepted, the exec itself ends the conversation
            raise
    new = _answer_of_new(args.socket, old, time.monotonic() + args.timeout)
    if _number(new.get("reexecs")) <= _number(old.get("reexecs")):
        raise UnavailableError(
            f"tdxd {new.get('version')} was started afresh, as pid {new.get('pid')}",
            hint="why: journalctl -u tdxd; what comes up: tdxctl status",
        )
    shown = {"from": old.get("version"), "to": new.get("version"), "pid": new["pid"]}
    text = f"re-executed: version {shown['from']} -> {shown['to']}, pid {shown['pid']}"
    print(to_json(shown) if args.json else text)
    return 0


def _answer_of_new(path: str, old: Reply, deadline_s: float) -> Reply:
    """Ask until the new program answers; meanwhile the listener's queue holds the question.

    Raises: what the last question met.
    """
    while True:
        try:
            return _result(path, "version")
        except (OSError, UnavailableError, RemoteProtocolError):
            ended = not os.path.exists(f"/proc/{_number(old.get('pid'))}")
            if ended or time.monotonic() > deadline_s:
                raise
            time.sleep(_AGAIN_S)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _version(args: argparse.Namespace) -> int:
    shown = _result(args.socket, "version")
    print(to_json(shown) if args.json else f"tdxd {shown.get('version')}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    """Have the daemon examine the machine, or the program itself where there is no daemon."""
    try:
        shown = _result(args.socket, "doctor")
    except UnavailableError as exc:
        print(f"tdxctl: {exc.message}: asking tdxd doctor instead", file=sys.stderr)
        beside = os.path.join(os.path.dirname(os.path.abspath(sys.argv[0])), "tdxd")
        program = beside if os.access(beside, os.X_OK) else "tdxd"
        flags = ["--json"] if args.json else []
        try:
            os.execvp(program, ["tdxd", "doctor", *flags])  # noqa: S606 — no shell is wanted
        except OSError as gone:
            text = f"no program {program}: {gone.strerror}"
            raise UnavailableError(text, hint="install the package tdxd") from gone
    return show_findings(shown, args.json)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "status": _status,
    "mount": _mount,
    "unmount": _change,
    "reload": _change,
    "reexec": _reexec,
    "retry": _change,
    "events": _events,
    "wait": _wait,
    "health": _health,
    "version": _version,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
