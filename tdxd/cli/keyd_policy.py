"""The verbs of tdx-keyd about policies, and the explanation of a denial."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tdxd.cli.keyd_verbs import add_verb, now_s, print_json

__all__ = ["add_policy_verbs"]


def add_policy_verbs(verbs: Any) -> None:
    """Add `policy` and `explain`."""
    parser = verbs.add_parser("policy", help="set, show and check policies")
    policy = parser.add_subparsers(metavar="VERB", required=True)
    setter = add_verb(policy, "set", _policy_set, "set the policy of a volume")
    setter.add_argument("id", metavar="ID")
    setter.add_argument("file", metavar="FILE", type=Path)
    show = add_verb(policy, "show", _policy_show, "print the policy of a volume")
    show.add_argument("id", metavar="ID")
    check = policy.add_parser("check", help="check a policy file", allow_abbrev=False)
    check.set_defaults(verb=_policy_check)
    check.add_argument("file", metavar="FILE", type=Path)
    explain = add_verb(verbs, "explain", _explain, "show every check of one denial")
    explain.add_argument("denial", metavar="DENIAL_ID")


def _policy_set(options: argparse.Namespace) -> int:
    from tdxd.owner.admin import set_policy

    version = set_policy(options.store, options.id, options.file, now_s())
    if options.json:
        return print_json({"id": options.id, "policy_version": version})
    print(f"policy of {options.id} is now version {version}")
    return 0


def _policy_show(options: argparse.Namespace) -> int:
    from tdxd.errors import DataError
    from tdxd.owner.store import Store

    with Store.open(options.store) as store:
        row = store.policy(options.id)
    if row is None:
        raise DataError(f"volume {options.id!r} has no policy")
    if options.json:
        return print_json(
            {"id": row.volume_id, "version": row.version, "text": row.text}
        )
    print(row.text, end="" if row.text.endswith("\n") else "\n")
    return 0


def _policy_check(options: argparse.Namespace) -> int:
    from tdxd.core.policy import parse_policy
    from tdxd.owner.files import read_text

    parse_policy(read_text(options.file), source=str(options.file))
    print(f"{options.file}: valid")
    return 0


def _explain(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.errors import DataError
    from tdxd.owner.store import Store

    with Store.open(options.store) as store:
        record = store.denial(options.denial)
    if record is None:
        raise DataError(
            f"no denial {options.denial!r} in the audit log",
            hint=f"tdx-keyd audit {options.store} --denied lists them",
        )
    if options.json:
        return print_json(keyd_tables.audit_row(record))
    keyd_tables.print_denial(record)
    return 0
