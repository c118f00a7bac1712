"""How the doctor's findings are shown to a person; as slim as `tdxctl` itself."""

from __future__ import annotations

import sys

__all__ = ["show_findings"]

_COLOURS = {"ok": 32, "warn": 33, "fail": 31}


def show_findings(shown: dict[str, object], as_json: bool) -> int:  # noqa: FBT001 — the flag's value
    """Print a report of the doctor for a person, or as JSON; return its exit code."""
    if as_json:
        import json

        print(json.dumps(shown))
    else:
        _show(shown.get("findings"))
    code = shown.get("exit")
    return code if isinstance(code, int) else 0


def _show(value: object) -> None:
    items = value if isinstance(value, list) else []
    findings = [item for item in items if isinstance(item, dict)]
    width = max((len(str(one.get("name"))) for one in findings), default=0)
    for one in findings:
        level, name = str(one.get("level")), str(one.get("name"))
        print(f"{_paint(level)}{' ' * (4 - len(level))}  {name:{width}}  {one['text']}")
        if one.get("todo"):
            print(f"      {'':{width}}  -> {one['todo']}")
    count = {
        level: sum(one.get("level") == level for one in findings) for level in _COLOURS
    }
    print(f"{count['fail']} fail, {count['warn']} warn, {count['ok']} ok")


def _paint(level: str) -> str:
    """Colour a level, on a terminal only."""
    colour = _COLOURS.get(level)
    if colour is None or not sys.stdout.isatty():
        return level
    return f"\033[{colour}m{level}\033[0m"
