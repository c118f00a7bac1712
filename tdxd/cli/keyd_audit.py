"""The verbs of tdx-keyd about the audit log, its checkpoints, and backups."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdxd.cli.keyd_verbs import add_kek, add_verb, now_s, print_json

if TYPE_CHECKING:
    from tdxd.owner.audit.verify import Verified

__all__ = ["add_audit_verbs", "add_backup_verbs"]


def add_audit_verbs(verbs: Any) -> None:
    """Add `audit`."""
    parser = verbs.add_parser("audit", help="show and verify what was decided")
    audit = parser.add_subparsers(metavar="VERB", required=True)
    show = add_verb(audit, "show", _show, "show what was released and denied")
    show.add_argument("--denied", action="store_true", help="denials only")
    show.add_argument("--limit", type=int, default=100, metavar="N")
    check = add_verb(
        audit,
        "verify",
        _verify,
        "find out whether anything was edited, cut or put back",
    )
    check.add_argument("--checkpoint", type=Path, metavar="FILE")
    check.add_argument(
        "--signing-key",
        metavar="ed25519:BASE64",
        help="whose checkpoint it must be (default: the store's own keys)",
    )
    add_kek(check)
    export = add_verb(
        audit, "export", _export, "print every record as a line of JSON", json_too=False
    )
    export.add_argument("--after", type=int, default=0, metavar="SEQ")
    make = add_verb(audit, "checkpoint", _checkpoint, "write a signed checkpoint")
    make.add_argument("file", metavar="FILE", type=Path)
    add_kek(make)
    accept = add_verb(
        audit,
        "accept-rollback",
        _accept,
        "go on with a store that is older than its newest checkpoint",
    )
    accept.add_argument("file", metavar="CHECKPOINT", type=Path)
    add_kek(accept)


def add_backup_verbs(verbs: Any) -> None:
    """Add `backup` and `restore`."""
    backup = add_verb(verbs, "backup", _backup, "copy the store, also while it serves")
    backup.add_argument("file", metavar="FILE", type=Path)
    backup.add_argument(
        "--with-keys",
        action="store_true",
        help="put the secret keys in, too: who reads the file has everything",
    )
    add_kek(backup)
    restore = verbs.add_parser(
        "restore",
        help="make a store of a backup",
        description="make a store of a backup",
        allow_abbrev=False,
    )
    restore.set_defaults(verb=_restore)
    restore.add_argument("file", metavar="FILE", type=Path)
    restore.add_argument("store", metavar="STORE", type=Path)
    restore.add_argument("--json", action="store_true", help="print JSON")
    add_kek(restore)


# --- the verbs ----------------------------------------------------------------


def _show(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.store.store import Store

    with Store.open(options.store) as store:
        records = store.audit(denied_only=options.denied, limit=options.limit)
    rows = [keyd_tables.audit_row(record) for record in records]
    if options.json:
        return print_json(rows)
    columns = ("seq", "at", "decision", "volume", "generation", "reason", "denial_id")
    keyd_tables.print_table((*columns, "simulated", "peer"), rows)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from tdxd.core.config import parse_signing_key
    from tdxd.errors import DataError, UsageError
    from tdxd.owner.audit.guard import behind_hint, load_checkpoint, public_keys
    from tdxd.owner.audit.verify import verify
    from tdxd.owner.server.config import read_config
    from tdxd.owner.store.store import Store

    config = read_config(options.store)
    path = options.checkpoint
    if path is None and config.audit.checkpoint_file is not None:
        path = Path(config.audit.checkpoint_file)
    try:
        keys = (
            (parse_signing_key(options.signing_key),)
            if options.signing_key
            else public_keys(options.store)
        )
    except ValueError as exc:
        raise UsageError(f"--signing-key: {exc}") from exc
    checkpoint = None if path is None else load_checkpoint(path, keys)
    with Store.open(options.store, options.kek) as store:
        found = verify(store, checkpoint, deployment=bytes.fromhex(config.deployment))
    _print_verified(options, found, None if path is None else str(path))
    if found.troubles:
        hint = "a backup made before can be restored: tdx-keyd restore FILE NEW_STORE"
        if found.troubles == found.behind:
            hint = behind_hint(options.store, path)
        raise DataError(
            f"{options.store} is not as tdx-keyd left it: {found.troubles[0]}",
            hint=hint,
        )
    return 0


def _print_verified(
    options: argparse.Namespace, found: Verified, checkpoint: str | None
) -> None:
    from tdxd.cli.keyd_tables import when

    seal = found.seal
    if options.json:
        print_json(
            {
                "ok": not found.troubles,
                "records": found.records,
                "seq": seal.seq,
                "head": seal.head.hex(),
                "revision": seal.revision,
                "exported_seq": seal.exported_seq,
                "exported_at": when(seal.exported_at_s) if seal.exported_at_s else None,
                "checkpoint": checkpoint,
                "troubles": list(found.troubles),
            }
        )
        return
    for trouble in found.troubles:
        print(f"FAIL  {trouble}")
    if not found.troubles:
        print(f"ok    {found.records} audit records, the newest is {seal.seq}")
        print(f"ok    head {seal.head.hex()}")
        print(f"ok    state of revision {seal.revision}")
    if checkpoint is None:
        print("note  compared with no checkpoint: the whole store may be an older copy")
    elif not found.troubles:
        print(f"ok    not behind {checkpoint}")
    if seal.exported_at_s:
        print(
            f"note  checkpoints were exported up to record {seal.exported_seq}, "
            f"{when(seal.exported_at_s)}"
        )


def _export(options: argparse.Namespace) -> int:
    from tdxd.owner.store.store import Store

    with Store.open(options.store) as store:
        for line in store.audit_lines(options.after):
            print(json.dumps(line, separators=(",", ":")))
    return 0


def _checkpoint(options: argparse.Namespace) -> int:
    from tdxd.owner.audit.guard import make_exports
    from tdxd.owner.server.config import read_config
    from tdxd.owner.store.store import Store

    with Store.open(options.store, options.kek) as store:
        exports = make_exports(options.store, read_config(options.store), store)
        seal = exports.write_current(options.file, now_s())
    if options.json:
        return print_json(
            {"seq": seal.seq, "head": seal.head.hex(), "revision": seal.revision}
        )
    print(f"{options.file}: audit record {seal.seq}, revision {seal.revision}")
    return 0


def _accept(options: argparse.Namespace) -> int:
    from tdxd.owner.audit.guard import (
        export_after_change,
        load_checkpoint,
        public_keys,
    )
    from tdxd.owner.audit.rollback import accept_rollback
    from tdxd.owner.store.store import Store

    checkpoint = load_checkpoint(options.file, public_keys(options.store))
    with Store.open(options.store, options.kek) as store:
        number = accept_rollback(options.store, store, checkpoint, now_s())
        record = store.audit(limit=1)[0]
    export_after_change(options.store, options.kek, now_s())
    lost = [one for one in record.checks if not one.ok]
    if options.json:
        return print_json(
            {
                "seq": number,
                "lost": [
                    {"name": one.name, "checkpoint": one.expected, "store": one.actual}
                    for one in lost
                ],
            }
        )
    print(f"accepted in audit record {number}; what is lost:")
    for one in lost:
        print(f"{one.name}: {one.actual}, the checkpoint has {one.expected}")
    return 0


def _backup(options: argparse.Namespace) -> int:
    from tdxd.owner.store.backup import make_backup

    made = make_backup(
        options.store,
        options.file,
        now_s(),
        with_keys=options.with_keys,
        kek_file=options.kek,
    )
    if options.json:
        return print_json(
            {"seq": made.seq, "revision": made.revision, "keys": options.with_keys}
        )
    keys = "with the secret keys" if options.with_keys else "without keys"
    print(f"{options.file}: audit record {made.seq}, {keys}")
    return 0


def _restore(options: argparse.Namespace) -> int:
    from tdxd.owner.store.backup import restore_backup

    made = restore_backup(options.file, options.store, kek_file=options.kek)
    if options.json:
        return print_json(
            {
                "records": made.records,
                "seq": made.checkpoint.seq if made.checkpoint else None,
                "missing": list(made.missing),
            }
        )
    print(f"{options.store}: {made.records} audit records")
    if made.missing:
        print(f"put these key files there before it serves: {' '.join(made.missing)}")
    print(
        f"what the newest checkpoint has and this backup has not: tdx-keyd audit verify "
        f"{options.store} --checkpoint FILE"
    )
    return 0
