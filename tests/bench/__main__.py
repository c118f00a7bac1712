"""Run the benchmarks, each module in a process of its own, and print one table.

A module has `rows()`, which returns dicts with `name`, `measured`, `budget`, `ok` and `detail`. A
missed budget is shown, not punished: how fast a shared machine is today is no fault of a commit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

MODULES = {
    "daemon": "start of tdxd, run of tdxctl, memory of the daemon",
    "volume": "opening an image, throughput of the memory mapper",
    "sealing": "time and memory of tdx-seal create",
    "keyrelease": "the key server's processor time for a release",
    "keyrelease_load": "key releases by many guests at once",
    "serving": "tdx-infer bench and tdx-model-server, on ResNet50",
    "front": "what the front adds to a model server, on ResNet50, batch 1 and 8; needs root",
    "reload": "time and memory of a new generation, on ResNet50, in the whole system; needs root",
    "endpoint": "what tdx-infer --attest adds to a connection",
    "guest": "opening a volume with dm-crypt and dm-verity in a booted guest",
}
_TIMEOUT_S = 1800.0
_TITLES = ("WHAT", "BUDGET", "MEASURED", "RATIO", "")
_DETAIL_WIDTH = 96

Row = dict[str, Any]


def main() -> int:
    known = "".join(f"\n  {name:<16} {what}" for name, what in MODULES.items())
    parser = argparse.ArgumentParser(
        prog="tests.bench",
        description=__doc__,
        epilog=f"benchmarks:{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--module", choices=MODULES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.module:
        return _run_module(args.module)
    for name in args.names:
        if name not in MODULES:
            parser.error(f"no benchmark {name!r}; there are: {', '.join(MODULES)}")
    rows: list[Row] = []
    for name in args.names or MODULES:
        print(f"measuring: {name}", file=sys.stderr)
        rows += _rows(name)
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print(rows)
    return 0


def _run_module(name: str) -> int:
    """Measure in this process; what a module prints meanwhile is not part of the answer."""
    with contextlib.redirect_stdout(sys.stderr):
        rows = importlib.import_module(f"tests.bench.{name}").rows()
    print(json.dumps(rows))
    return 0


def _rows(name: str) -> list[Row]:
    """Run one module; if it cannot measure here, return a row with the reason."""
    if not (Path(__file__).parent / f"{name}.py").exists():
        return [_not_measured(name, "this benchmark is not written")]
    command = [sys.executable, "-m", "tests.bench", "--module", name]
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [_not_measured(name, f"not done after {_TIMEOUT_S:g} s")]
    if done.returncode == 0:
        rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
        return rows
    said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return [_not_measured(name, said[-1])]


def _not_measured(name: str, reason: str) -> Row:
    return {
        "name": name,
        "measured": None,
        "budget": None,
        "ok": None,
        "detail": reason,
    }


def _print(rows: list[Row]) -> None:
    lines = [_TITLES, *(_cells(row) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(_TITLES))]
    for line, row in zip(lines, [None, *rows], strict=True):
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())
        if row and row.get("detail"):
            for part in textwrap.wrap(str(row["detail"]), _DETAIL_WIDTH):
                print(f"    {part}")


def _cells(row: Row) -> tuple[str, ...]:
    measured, budget = row.get("measured"), row.get("budget")
    ratio = ""
    if isinstance(measured, int | float) and isinstance(budget, int | float) and budget:
        ratio = f"{measured / budget:.2f}"
    verdict = {None: "not measured", True: "ok", False: "MISSED"}[row.get("ok")]
    return str(row["name"]), _shown(budget), _shown(measured), ratio, verdict


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
