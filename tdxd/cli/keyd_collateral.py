"""The verbs of tdx-keyd about collateral: status, fetch, export, import."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tdxd.cli.keyd_verbs import add_kek, add_verb, now_s, print_json

__all__ = ["add_collateral_verbs"]

_COLUMNS = (
    "fmspc",
    "ca",
    "state",
    "fetched",
    "expires",
    "evaluation",
    "pck_crl",
    "root_crl",
    "source",
)


def add_collateral_verbs(verbs: Any) -> None:
    """Add `collateral` with its verbs."""
    parser = verbs.add_parser(
        "collateral", help="Intel's signed statements about platforms: see, get, carry"
    )
    group = parser.add_subparsers(metavar="VERB", required=True)
    status = add_verb(
        group, "status", _status, "show every set, its floors and its problem"
    )
    fetch = add_verb(group, "fetch", _fetch, "fetch one set now")
    fetch.add_argument(
        "--fmspc", required=True, metavar="HEX", help="family of platforms, 12 digits"
    )
    fetch.add_argument(
        "--ca", choices=("platform", "processor"), default="platform", help="PCK CA"
    )
    fetch.add_argument(
        "--root",
        metavar="FILE",
        help="another root, as keyd.toml names its file (default: Intel's)",
    )
    export = add_verb(group, "export", _export, "write all valid sets to a new file")
    export.add_argument("file", metavar="FILE", type=Path)
    taking = add_verb(group, "import", _import, "verify a file of sets and keep them")
    taking.add_argument("file", metavar="FILE", type=Path)
    for verb in (status, fetch, export, taking):
        add_kek(verb)


def _status(options: argparse.Namespace) -> int:
    from tdxd.owner.collateral.admin import collateral_status

    rows = collateral_status(options.store, now_s(), kek_file=options.kek)
    if options.json:
        return print_json([_plain(row) for row in rows])
    if not rows:
        print("no collateral yet: it is fetched with the first quote, or imported")
        return 0
    _print_rows(rows)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from tdxd.owner.appraisal.appraise import INTEL_ROOT_KEY_SHA384, load_root
    from tdxd.owner.collateral.admin import fetch_set
    from tdxd.owner.files import read_bytes

    root = INTEL_ROOT_KEY_SHA384
    if options.root is not None:
        path = options.store / options.root
        named = load_root(read_bytes(path), simulated=True, source=str(path))
        root = named.key_sha384
    row = fetch_set(
        options.store,
        options.fmspc.upper(),
        options.ca,
        root,
        now_s(),
        kek_file=options.kek,
    )
    if options.json:
        return print_json(_plain(row))
    _print_rows((row,))
    return 0


def _export(options: argparse.Namespace) -> int:
    from tdxd.owner.collateral.admin import export_bundle

    sets = export_bundle(options.store, options.file, now_s(), kek_file=options.kek)
    if options.json:
        return print_json([{"fmspc": one.fmspc, "ca": one.ca} for one in sets])
    print(f"exported {len(sets)} set(s) to {options.file}")
    return 0


def _import(options: argparse.Namespace) -> int:
    from tdxd.cli.keyd_tables import when
    from tdxd.owner.collateral.admin import import_bundle

    rows = import_bundle(options.store, options.file, now_s(), kek_file=options.kek)
    if options.json:
        return print_json(
            [
                {**dataclasses.asdict(row), "expires": when(row.expires_s)}
                for row in rows
            ]
        )
    for row in rows:
        done = "imported" if row.taken else "a later set is there:"
        print(f"{done} {row.fmspc} {row.ca}, expires {when(row.expires_s)}")
    return 0


def _plain(row: Any) -> dict[str, object]:
    """Return a status as plain values, times as ISO 8601."""
    from tdxd.cli.keyd_tables import when

    values = dataclasses.asdict(row)
    plain: dict[str, object] = {}
    for name, value in values.items():
        if name.endswith("_s"):
            plain[name.removesuffix("_s")] = None if value is None else when(value)
        else:
            plain[name] = value
    return plain


def _print_rows(rows: Any) -> None:
    from tdxd.cli.keyd_tables import print_table

    print_table(_COLUMNS, [_cells(row) for row in rows])
    for row in rows:
        if not row.problem and not row.hint:
            continue
        since = f" ({_plain(row)['problem_at']})" if row.problem_at_s else ""
        print(f"\n{row.fmspc} {row.ca}: {row.problem or 'no set'}{since}")
        if row.hint:
            print(f"  hint: {row.hint}")


def _cells(row: Any) -> dict[str, object]:
    plain = _plain(row)
    floors = {name.partition("/")[0]: value for name, value in row.floors.items()}

    def number(value: int | None, floor: str) -> str:
        if value is None:
            return ""
        least = floors.get(floor)
        return str(value) if least in (None, value) else f"{value} (floor {least})"

    tcb = number(row.tcb_evaluation, "tcb-evaluation")
    qe = number(row.qe_evaluation, "qe-evaluation")
    return {
        **plain,
        "evaluation": f"tcb {tcb}, qe {qe}" if tcb else "",
        "pck_crl": _crl(number(row.pck_crl_number, "pck-crl"), plain["pck_crl_issued"]),
        "root_crl": _crl(
            number(row.root_crl_number, "root-crl"), plain["root_crl_issued"]
        ),
        "source": row.source + (" simulated" if row.simulated else ""),
    }


def _crl(number: str, issued: object) -> str:
    return f"{number} of {str(issued)[:10]}" if number else ""
