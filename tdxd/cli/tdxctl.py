"""Command the daemon over its socket. Starts fast: imports msgpack and little else."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

from tdxd.cli.boundary import Parser, run
from tdxd.core import wire
from tdxd.errors import (
    NotAllowedError,
    RemoteProtocolError,
    UnavailableError,
    UsageError,
)

__all__ = ["main"]

_SOCKET = "/run/tdxd.sock"
_SILENCE_S = 15.0
"""The daemon sends a frame at least every five seconds."""

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
    for verb, text in (
        ("mount", "want a volume mounted until the next reload"),
        ("unmount", "want a volume closed until the next reload"),
    ):
        add(verb, text).add_argument("volume")
    add("reload", "read the configuration anew; returns when it is carried out")
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
    return parser


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
    """Send a request, yield each reply.

    Raises: UnavailableError without a daemon; RemoteError for what it reports.
    """
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
    _show(_result(args.socket, "status"), args.json)
    if args.watch:
        for message in _replies(args.socket, "events", follow=True):
            if "event" in message:
                if not args.json:
                    print()
                _show(_result(args.socket, "status"), args.json)
                sys.stdout.flush()
    return 0


def _change(args: argparse.Namespace) -> int:
    named = {"volume": args.volume} if getattr(args, "volume", None) else {}
    _show(_result(args.socket, args.verb, **named), args.json)
    return 0


def _events(args: argparse.Namespace) -> int:
    for message in _replies(args.socket, "events", follow=args.follow, all=args.all):
        item = message.get("event")
        if isinstance(item, dict):
            print(_json(item) if args.json else _event_line(item), flush=args.follow)
    return 0


def _event_line(item: dict[str, object]) -> str:
    known = ("seq", "time", "level", "event")
    fields = " ".join(f"{key}={item[key]}" for key in item if key not in known)
    return f"{item['time']} {item['event']} {fields}".rstrip()


def _wait(args: argparse.Namespace) -> int:
    if args.timeout is not None and args.timeout < 0:
        raise UsageError(f"timeout {args.timeout} is negative")
    return _verdict(_result(args.socket, "wait", timeout_s=args.timeout), args.json)


def _health(args: argparse.Namespace) -> int:
    shown = _result(args.socket, "health")
    if args.what == "live":
        print(_json(shown) if args.json else "live")
        return 0
    return _verdict(shown, args.json)


def _verdict(shown: dict[str, object], as_json: bool) -> int:  # noqa: FBT001 — the flag's value
    """Print ready or why not; return the exit code that the daemon names."""
    code = shown.get("exit")
    if as_json:
        print(_json(shown))
    else:
        reasons = shown.get("reasons")
        texts = [str(item) for item in reasons] if isinstance(reasons, list) else []
        print("ready" if shown.get("ready") else "not ready: " + "; ".join(texts))
    return code if isinstance(code, int) else 0


def _version(args: argparse.Namespace) -> int:
    shown = _result(args.socket, "version")
    print(_json(shown) if args.json else f"tdxd {shown.get('version')}")
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "status": _status,
    "mount": _change,
    "unmount": _change,
    "reload": _change,
    "retry": _change,
    "events": _events,
    "wait": _wait,
    "health": _health,
    "version": _version,
}


# --- showing ------------------------------------------------------------------


def _json(value: object) -> str:
    import json

    return json.dumps(value)


_COLOURS = {
    "mounted": 32,
    "ready": 32,
    "denied": 31,
    "failed": 31,
    "backoff": 33,
    "closing": 33,
    "draining": 33,
}


def _show(shown: dict[str, object], as_json: bool) -> None:  # noqa: FBT001 — the flag's value
    if as_json:
        print(_json(shown))
        return
    head = "ready" if shown.get("ready") else "not ready"
    print(
        f"tdxd {shown.get('version')}  {_paint(head)}  pid {shown.get('pid')}  "
        f"since {shown.get('since')}  mapper {shown.get('mapper')}  "
        f"config: {shown.get('config')}"
    )
    if shown.get("swap_accepted"):
        print("warning: swap is accepted: keys and models can land on the disk")
    _show_volumes(_dicts(shown.get("volumes")))
    serving = shown.get("serving")
    if isinstance(serving, dict):
        _show_serving(serving)


def _dicts(value: object) -> list[dict[str, object]]:
    return (
        [item for item in value if isinstance(item, dict)]
        if isinstance(value, list)
        else []
    )


def _show_volumes(volumes: list[dict[str, object]]) -> None:
    titles = ("VOLUME", "STATE", "GEN", "INTEGRITY", "SIZE", "IMAGE")
    rows = [
        (
            str(one["id"]),
            str(one["state"]),
            str(one["generation"] or "-"),
            str(one["integrity"] or "-"),
            _size(one["size_bytes"]),
            str(one["image"]),
        )
        for one in volumes
    ]
    _table(titles, rows)
    for one in volumes:
        _show_error(f"volume {one['id']}", one.get("error"))


def _show_serving(serving: dict[str, object]) -> None:
    rows = []
    for one in _dicts(serving.get("servers")):
        for model in _dicts(one.get("models")):
            versions = model.get("versions")
            numbers = versions if isinstance(versions, list) else []
            state = "active" if one.get("active") else "standby"
            text = ",".join(str(number) for number in numbers)
            rows.append((str(model["name"]), text, state, str(one["pid"])))
    print(
        f"serving {_paint(str(serving.get('state')))}  listen {serving.get('listen')}  "
        f"restarts {serving.get('restarts')}"
    )
    if rows:
        _table(("MODEL", "VERSIONS", "SERVER", "PID"), rows)
    _show_error("serving", serving.get("error"))


def _show_error(what: str, error: object) -> None:
    if not isinstance(error, dict):
        return
    later = error.get("retry_in_s")
    again = f" (attempt {error.get('attempts')}, again in {later} s)" if later else ""
    print(f"{what}: {error.get('message')}{again}")
    if error.get("hint"):
        print(f"  hint: {error.get('hint')}")


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [
        max(len(row[index]) for row in [titles, *rows]) for index in range(len(titles))
    ]
    for row in [titles, *rows]:
        cells = []
        for text, width in zip(row, widths, strict=True):
            cells.append(_paint(text) + " " * (width - len(text)))
        print("  ".join(cells).rstrip())


def _paint(text: str) -> str:
    """Colour a state word, on a terminal only."""
    colour = _COLOURS.get(text)
    if colour is None or not sys.stdout.isatty():
        return text
    return f"\033[{colour}m{text}\033[0m"


def _size(value: object) -> str:
    """Return a size in binary units."""
    if not isinstance(value, int):
        return "-"
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


if __name__ == "__main__":
    sys.exit(main())
