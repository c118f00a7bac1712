"""The verbs of tdx-keyd that show a decision: on a guest that was denied, and on files."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdxd.cli.keyd_verbs import add_verb, now_s, print_json

if TYPE_CHECKING:
    from tdxd.owner.appraisal.appraise import TrustedRoot
    from tdxd.owner.store.store import AuditRecord

__all__ = ["add_appraisal_verbs"]


def add_appraisal_verbs(verbs: Any) -> None:
    """Add `explain` and `appraise`."""
    explain = add_verb(verbs, "explain", _explain, "show every check of one denial")
    explain.add_argument("denial", metavar="DENIAL_ID")
    appraise = verbs.add_parser(
        "appraise",
        help="judge evidence from files as the server does",
        description="Judge a quote from files by the server's own checks, without a store. There "
        "is no request: report data is only compared where it is given, and collateral has no "
        "floors. Exit status 77: refused.",
        allow_abbrev=False,
    )
    appraise.set_defaults(verb=_appraise)
    for name, text in (
        ("--quote", "the quote"),
        ("--collateral", "collateral as JSON, in the form of dcap-qvl"),
        ("--policy", "a policy file"),
    ):
        appraise.add_argument(name, type=Path, metavar="FILE", required=True, help=text)
    for name, text in (
        ("--event-log", "CCEL data"),
        ("--runtime-log", "runtime log"),
        ("--root", "root CA of a simulated platform (default: Intel's)"),
    ):
        appraise.add_argument(name, type=Path, metavar="FILE", help=text)
    appraise.add_argument(
        "--report-data", metavar="HEX", help="64 bytes that the quote must carry"
    )
    appraise.add_argument(
        "--at",
        metavar="TIME",
        help="judge as of this time, unix seconds or 2026-11-30T00:00:00Z (default: now)",
    )
    appraise.add_argument("--json", action="store_true", help="print JSON")


def _explain(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_explain, keyd_tables
    from tdxd.errors import DataError
    from tdxd.owner.store.store import Store

    with Store.open(options.store) as store:
        record = store.denial(options.denial)
    if record is None:
        raise DataError(
            f"no denial {options.denial!r} in the audit log",
            hint=f"tdx-keyd audit show {options.store} --denied lists them",
        )
    if options.json:
        why = keyd_explain.conclusion(record.checks)
        words = {"conclusion": why.what, "to_do": why.todo} if why else {}
        return print_json({**words, **keyd_tables.audit_row(record)})
    _print_denial(record)
    return 0


def _print_denial(record: AuditRecord) -> None:
    from tdxd.cli import keyd_explain, keyd_tables

    why = keyd_explain.conclusion(record.checks)
    for line in why.lines("DENIED") if why else (f"DENIED: {record.reason}",):
        print(line)
    print()
    simulated = ", simulated platform" if record.simulated else ""
    when = keyd_tables.when(record.at_s)
    version = record.policy_version or "none"
    print(f"denial {record.denial_id} at {when} to {record.peer}{simulated}")
    print(f"volume {record.volume_id}, policy version {version}")
    print(f"reason {record.reason}")
    print()
    for line in keyd_explain.table(record.checks):
        print(line)


def _appraise(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_explain
    from tdxd.core.decode import plain
    from tdxd.core.policy import parse_policy
    from tdxd.errors import EX_NOPERM
    from tdxd.owner.appraisal.offline import OfflineEvidence, judge_offline
    from tdxd.owner.files import read_bytes, read_text

    policy = parse_policy(read_text(options.policy), source=str(options.policy))
    evidence = OfflineEvidence(
        quote=read_bytes(options.quote),
        collateral=read_text(options.collateral),
        event_log=read_bytes(options.event_log) if options.event_log else b"",
        runtime_log=read_bytes(options.runtime_log) if options.runtime_log else b"",
        report_data=_report_data(options.report_data),
    )
    at_s = now_s() if options.at is None else _time(options.at)
    checks = judge_offline(evidence, _root(options.root), policy, at_s)
    why = keyd_explain.conclusion(checks)
    if options.json:
        rows = plain(checks)
        words = {"conclusion": why.what, "to_do": why.todo} if why else {}
        print_json({"accepted": why is None, **words, "checks": rows})
    else:
        accepted = ("ACCEPTED: every check passed",)
        for line in why.lines("REFUSED") if why else accepted:
            print(line)
        print()
        for line in keyd_explain.table(checks):
            print(line)
    return EX_NOPERM if why else 0


def _root(path: Path | None) -> TrustedRoot:
    from tdxd.owner.appraisal.appraise import intel_root, load_root
    from tdxd.owner.files import read_bytes

    if path is None:
        return intel_root()
    return load_root(read_bytes(path), simulated=True, source=str(path))


def _report_data(text: str | None) -> bytes | None:
    from tdxd.errors import UsageError

    if text is None:
        return None
    if not re.fullmatch(r"[0-9a-fA-F]{128}", text):
        raise UsageError(f"--report-data {text[:40]!r} is not 64 bytes in hex")
    return bytes.fromhex(text)


def _time(text: str) -> int:
    from tdxd.core.showing import LATEST_S
    from tdxd.errors import UsageError

    if re.fullmatch(r"[0-9]{1,11}", text):  # up to the year 5138
        return int(text)
    moment = None
    with contextlib.suppress(ValueError):
        moment = dt.datetime.fromisoformat(text)
    if (
        moment is None
        or moment.utcoffset() is None
        or not 0 <= moment.timestamp() < LATEST_S
    ):
        hint = "unix seconds, or a time with its offset like 2026-11-30T00:00:00Z"
        raise UsageError(f"--at {text!r} is no moment", hint=hint)
    return int(moment.timestamp())
