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
    _show_protection(_dicts(shown.get("protection")))
    _show_runtime(shown.get("runtime"))
    _show_volumes(_dicts(shown.get("volumes")))
    _show_secrets(_dicts(shown.get("secrets")))
    serving = shown.get("serving")
    if isinstance(serving, dict):
        _show_serving(serving)


def _dicts(value: object) -> list[dict[str, object]]:
    return (
        [item for item in value if isinstance(item, dict)]
        if isinstance(value, list)
        else []
    )


def _show_protection(matters: list[dict[str, object]]) -> None:
    """Name what is protected on one line, and say of each other matter why it is not."""
    good = [str(one.get("name")) for one in matters if one.get("protected")]
    if matters:
        print(f"protection: {', '.join(good) or 'none'}")
    for one in matters:
        if not one.get("protected"):
            print(f"NOT protected: {one.get('name')}: {one.get('text')}")
            print(f"  hint: {one.get('hint')}")


def _show_runtime(runtime: object) -> None:
    """Say what keeps quotes from showing which volumes are served; nothing if they do."""
    if not isinstance(runtime, dict):
        return
    if runtime.get("extend") == "never":
        print("warning: quotes do not show what is served: RTMR3 is not extended")
    _show_error("runtime log", runtime.get("error"))


def _show_volumes(volumes: list[dict[str, object]]) -> None:
    titles = (
        *("VOLUME", "KIND", "STATE", "SINCE", "GEN", "LEASE"),
        *("INTEGRITY", "MAPPER", "SIZE", "READ", "IMAGE"),
    )
    _table(titles, [_volume_row(one) for one in volumes])
    for one in volumes:
        name = f"volume {one['id']}"
        _show_error(name, one.get("error"))
        _show_error(f"lease of {name}", one.get("lease_error"))
        last = one.get("last_error")
        if isinstance(last, dict) and not one.get("error"):
            _show_error(f"{name}, last error at {_moment(last.get('time'))}", last)


def _show_secrets(secrets: list[dict[str, object]]) -> None:
    rows = [
        (
            str(one["id"]),
            str(one.get("content") or "-"),
            str(one.get("generation") or "-"),
            _moment(one.get("since")) or "-",
            _span(one.get("lease_left_s")),
            str(one.get("sha256") or "-"),
        )
        for one in secrets
    ]
    if rows:
        _table(("SECRET", "CONTENT", "GEN", "SINCE", "LEASE", "SHA256"), rows)
    for one in secrets:
        _show_error(f"secret {one['id']}", one.get("error"))


def _volume_row(one: dict[str, object]) -> tuple[str, ...]:
    writable = " rw" if one.get("writable") else ""
    header = f" ({one['header']} header)" if one.get("header") else ""
    return (
        str(one["id"]),
        f"{one.get('kind')}{writable}",
        str(one["state"]),
        _moment(one.get("since")),
        _generation(one),
        _span(one.get("lease_left_s")),
        f"{one['integrity'] or '-'}{header}",
        str(one.get("mapper") or "-"),
        _size(one["size_bytes"]),
        _size(one.get("bytes_read")),
        str(one["image"]),
    )


def _generation(one: dict[str, object]) -> str:
    """Return the open generation, or that which a newer one is looked for."""
    looked_beyond = one.get("newer_than")
    other = "-" if looked_beyond is None else f">{looked_beyond}"
    return str(one["generation"] or other)


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
    certificate = serving.get("certificate")
    if isinstance(certificate, dict):
        names = certificate.get("from")
        sources = ", ".join(map(str, names)) if isinstance(names, list) else ""
        print(f"certificate {certificate.get('sha256')}  from {sources or '-'}")
        _show_error("newer certificate", certificate.get("error"))


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


def _moment(value: object) -> str:
    """Return a time of the daemon, in UTC, to the second."""
    return str(value)[:19].replace("T", " ")


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


def _span(value: object) -> str:
    """Return a time left in its largest unit, rounded down."""
    if not isinstance(value, int | float):
        return "-"
    for unit, seconds in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= 2 * seconds:
            return f"{int(value / seconds)} {unit}"
    return f"{int(value)} s"
