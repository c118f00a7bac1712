"""How `tdxctl` shows a status and events to a person; as slim as `tdxctl` itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["event_line", "show_status", "to_json"]


def event_line(item: dict[str, object]) -> str:
    """Return an event as one line: time, name, fields."""
    known = ("seq", "time", "level", "event")
    fields = " ".join(f"{key}={item[key]}" for key in item if key not in known)
    return f"{item['time']} {item['event']} {fields}".rstrip()


def to_json(value: object) -> str:
    """Return a value as JSON on one line."""
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


def show_status(shown: dict[str, object], as_json: bool) -> None:  # noqa: FBT001 — the flag's value
    """Print a status for a person, or as JSON."""
    if as_json:
        print(to_json(shown))
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
    message = str(error.get("message"))
    prefix = "" if message.startswith(f"{what}: ") else f"{what}: "
    print(f"{prefix}{message}{again}")
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
