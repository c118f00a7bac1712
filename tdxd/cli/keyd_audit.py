"""The verbs of tdx-keyd about the audit log."""

from __future__ import annotations

import argparse
from typing import Any

from tdxd.cli.keyd_verbs import add_verb, print_json

__all__ = ["add_audit_verbs"]


def add_audit_verbs(verbs: Any) -> None:
    """Add `audit`."""
    audit = add_verb(verbs, "audit", _audit, "show what was released and denied")
    audit.add_argument("--denied", action="store_true", help="denials only")
    audit.add_argument("--limit", type=int, default=100, metavar="N")


def _audit(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.store import Store

    with Store.open(options.store) as store:
        records = store.audit(denied_only=options.denied, limit=options.limit)
    rows = [keyd_tables.audit_row(record) for record in records]
    if options.json:
        return print_json(rows)
    columns = ("seq", "at", "decision", "volume", "generation", "reason", "denial_id")
    keyd_tables.print_table((*columns, "simulated", "peer"), rows)
    return 0
