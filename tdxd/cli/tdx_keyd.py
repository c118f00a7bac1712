"""tdx-keyd: the owner's key server, and the verbs that change its store."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdxd.cli.boundary import Parser, run

__all__ = ["main", "run_command"]

PROG = "tdx-keyd"


def main() -> int:
    """Run the program on the command line; return its exit code."""
    return run(PROG, run_command)


def run_command(argv: Sequence[str]) -> int:
    """Run one verb; the exit code is 0 unless an error is raised."""
    options = _parser().parse_args(argv)
    verb: Any = options.verb
    return int(verb(options))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG,
        description="Release model keys to guests that prove themselves by a TDX quote. "
        "STORE is the directory that `init` makes; every verb works on it directly, "
        "also while a server runs.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _add_init(verbs)
    _add_volume_verbs(verbs)
    _add_policy(verbs)
    explain = _verb(verbs, "explain", _explain, "show every check of one denial")
    explain.add_argument("denial", metavar="DENIAL_ID")
    audit = _verb(verbs, "audit", _audit, "show what was released and denied")
    audit.add_argument("--denied", action="store_true", help="denials only")
    audit.add_argument("--limit", type=int, default=100, metavar="N")
    serve = _verb(verbs, "serve", _serve, "answer guests until SIGTERM", json_too=False)
    serve.add_argument(
        "--share-port",
        action="store_true",
        help="let several of these processes listen on one port",
    )
    return parser


def _verb(
    verbs: Any, name: str, function: Any, help_text: str, *, json_too: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=help_text, description=help_text, allow_abbrev=False
    )
    parser.set_defaults(verb=function)
    parser.add_argument("store", metavar="STORE", type=Path)
    if json_too:
        parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_init(verbs: Any) -> None:
    init = _verb(verbs, "init", _init, "make a store with all its keys")
    init.add_argument(
        "--name",
        dest="names",
        nargs="+",
        required=True,
        metavar="HOST",
        help="names and addresses under which guests reach the server",
    )
    init.add_argument("--listen", default="0.0.0.0:50051", metavar="HOST:PORT")
    init.add_argument(
        "--collateral-url", metavar="URL", help="a PCS or PCCS (default: Intel's PCS)"
    )
    init.add_argument(
        "--simulated-root",
        type=Path,
        metavar="FILE",
        help="root CA of a simulated platform; its quotes open only volumes whose policy "
        "says simulated = true",
    )
    init.add_argument(
        "--simulated-collateral-url",
        metavar="URL",
        help="its collateral (default: --collateral-url)",
    )


def _add_volume_verbs(verbs: Any) -> None:
    add = _verb(verbs, "add", _add, "add the key bundle of a sealed image")
    add.add_argument("bundle", metavar="BUNDLE", type=Path)
    add.add_argument("--policy", type=Path, metavar="FILE", help="set the policy, too")
    _verb(verbs, "list", _list, "list the volumes")
    show = _verb(verbs, "show", _show, "show one volume")
    show.add_argument("id", metavar="ID")
    remove = _verb(verbs, "remove", _remove, "remove a volume or one generation of it")
    remove.add_argument("id", metavar="ID")
    remove.add_argument("--generation", type=int, metavar="N")


def _add_policy(verbs: Any) -> None:
    parser = verbs.add_parser("policy", help="set, show and check policies")
    policy = parser.add_subparsers(metavar="VERB", required=True)
    setter = _verb(policy, "set", _policy_set, "set the policy of a volume")
    setter.add_argument("id", metavar="ID")
    setter.add_argument("file", metavar="FILE", type=Path)
    show = _verb(policy, "show", _policy_show, "print the policy of a volume")
    show.add_argument("id", metavar="ID")
    check = policy.add_parser("check", help="check a policy file", allow_abbrev=False)
    check.set_defaults(verb=_policy_check)
    check.add_argument("file", metavar="FILE", type=Path)


# --- the verbs ----------------------------------------------------------------


def _init(options: argparse.Namespace) -> int:
    from tdxd.owner.keyd_init import InitOptions, init_store
    from tdxd.owner.pcs import INTEL_PCS_URL

    given = InitOptions(
        names=tuple(options.names),
        listen=options.listen,
        collateral_url=options.collateral_url or INTEL_PCS_URL,
        simulated_root=options.simulated_root,
        simulated_collateral_url=options.simulated_collateral_url,
    )
    pin = init_store(options.store, given, os.urandom)
    if options.json:
        return _print_json(
            {"ca": pin.ca, "signing_key": pin.signing_key, "servers": pin.servers}
        )
    servers = ", ".join(f'"{server}"' for server in pin.servers)
    print("# for /etc/tdxd/tdxd.toml of the guests; copy the CA file there")
    print("[key_release]")
    print(f"servers = [{servers}]")
    print(f'ca = "{pin.ca}"')
    print(f'signing_key = "{pin.signing_key}"')
    return 0


def _add(options: argparse.Namespace) -> int:
    from tdxd.owner.admin import add_bundle

    row = add_bundle(options.store, options.bundle, options.policy, _now_s())
    if options.json:
        return _print_json(
            {
                "id": row.volume_id,
                "generation": row.generation,
                "manifest_sha256": row.manifest_sha256,
            }
        )
    print(f"added {row.volume_id} generation {row.generation}")
    return 0


def _list(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.store import Store

    with Store.open(options.store) as store:
        volumes = [keyd_tables.volume(store, name) for name in store.volume_ids()]
    if options.json:
        return _print_json(volumes)
    keyd_tables.print_table(("id", "generations", "policy_version"), volumes)
    return 0


def _show(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.admin import known_volume
    from tdxd.owner.store import Store

    with Store.open(options.store) as store:
        known_volume(store, options.id)
        volume = keyd_tables.volume(store, options.id)
        generations = [
            {
                "generation": row.generation,
                "manifest_sha256": row.manifest_sha256,
                "added": keyd_tables.when(row.added_at_s),
            }
            for row in store.generations(options.id)
        ]
    if options.json:
        return _print_json({**volume, "generations": generations})
    print(f"{options.id}: policy version {volume['policy_version'] or 'none'}")
    keyd_tables.print_table(("generation", "manifest_sha256", "added"), generations)
    return 0


def _remove(options: argparse.Namespace) -> int:
    from tdxd.owner.admin import remove_volume

    gone = remove_volume(options.store, options.id, options.generation)
    if options.json:
        return _print_json({"id": options.id, "generations_removed": gone})
    print(f"removed {options.id}: {gone} generation(s)")
    return 0


def _policy_set(options: argparse.Namespace) -> int:
    from tdxd.owner.admin import set_policy

    version = set_policy(options.store, options.id, options.file, _now_s())
    if options.json:
        return _print_json({"id": options.id, "policy_version": version})
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
        return _print_json(
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
            hint=f"{PROG} audit {options.store} --denied lists them",
        )
    if options.json:
        return _print_json(keyd_tables.audit_row(record))
    keyd_tables.print_denial(record)
    return 0


def _audit(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.store import Store

    with Store.open(options.store) as store:
        records = store.audit(denied_only=options.denied, limit=options.limit)
    rows = [keyd_tables.audit_row(record) for record in records]
    if options.json:
        return _print_json(rows)
    columns = ("seq", "at", "decision", "volume", "generation", "reason", "denial_id")
    keyd_tables.print_table((*columns, "simulated", "peer"), rows)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from tdxd.host import machine
    from tdxd.host.log import configure
    from tdxd.owner.keyd_serve import serve

    machine.harden()
    configure()
    return serve(options.store, share_port=options.share_port)


def _print_json(value: object) -> int:
    print(json.dumps(value, indent=2))
    return 0


def _now_s() -> int:
    return int(time.time())


if __name__ == "__main__":
    sys.exit(main())
