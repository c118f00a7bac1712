"""tdx-keyd: the owner's key server, and the verbs that change its store."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tdxd.cli.boundary import Parser, run
from tdxd.cli.keyd_add import add_add_verb
from tdxd.cli.keyd_audit import add_audit_verbs, add_backup_verbs
from tdxd.cli.keyd_collateral import add_collateral_verbs
from tdxd.cli.keyd_keys import add_keys_verbs
from tdxd.cli.keyd_policy import add_policy_verbs
from tdxd.cli.keyd_secret import add_secret_verbs
from tdxd.cli.keyd_verbs import add_kek, add_verb, now_s, print_json

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
    add_secret_verbs(verbs)
    add_policy_verbs(verbs)
    add_collateral_verbs(verbs)
    add_audit_verbs(verbs)
    add_keys_verbs(verbs)
    add_backup_verbs(verbs)
    add_kek(
        add_verb(verbs, "serve", _serve, "answer guests until SIGTERM", json_too=False)
    )
    return parser


def _add_init(verbs: Any) -> None:
    init = add_verb(verbs, "init", _init, "make a store with all its keys")
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
    add_add_verb(verbs)
    add_verb(verbs, "list", _list, "list the volumes and secrets")
    show = add_verb(verbs, "show", _show, "show one volume or secret")
    show.add_argument("id", metavar="ID")
    remove = add_verb(
        verbs, "remove", _remove, "remove a volume or secret, or one generation of it"
    )
    remove.add_argument("id", metavar="ID")
    remove.add_argument("--generation", type=int, metavar="N")
    add_kek(remove)


# --- the verbs ----------------------------------------------------------------


def _init(options: argparse.Namespace) -> int:
    from tdxd.owner.collateral.pcs import INTEL_PCS_URL
    from tdxd.owner.server.init import InitOptions, init_store

    given = InitOptions(
        names=tuple(options.names),
        listen=options.listen,
        collateral_url=options.collateral_url or INTEL_PCS_URL,
        simulated_root=options.simulated_root,
        simulated_collateral_url=options.simulated_collateral_url,
    )
    pin = init_store(options.store, given, os.urandom)
    if options.json:
        return print_json(
            {"ca": pin.ca, "signing_key": pin.signing_key, "servers": pin.servers}
        )
    servers = ", ".join(f'"{server}"' for server in pin.servers)
    print("# for /etc/tdxd/tdxd.toml of the guests; copy the CA file there")
    print("[key_release]")
    print(f"servers = [{servers}]")
    print(f'ca = "{pin.ca}"')
    print(f'signing_key = "{pin.signing_key}"')
    return 0


def _list(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.store.store import Store

    with Store.open(options.store) as store:
        volumes = [keyd_tables.volume(store, name) for name in store.volume_ids()]
    if options.json:
        return print_json(volumes)
    keyd_tables.print_table(("id", "kind", "generations", "policy_version"), volumes)
    return 0


def _show(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.store.admin import known_volume
    from tdxd.owner.store.store import Store

    with Store.open(options.store) as store:
        known_volume(store, options.id)
        volume = keyd_tables.volume(store, options.id)
        generations = [
            {
                "generation": row.generation,
                "manifest_sha256": row.manifest_sha256,
                "added": keyd_tables.when(row.added_at_s),
                "header": keyd_tables.header(row),
            }
            for row in store.generations(options.id)
        ]
    if options.json:
        return print_json({**volume, "generations": generations})
    version = volume["policy_version"] or "none"
    print(f"{options.id}: {volume['kind']}, policy version {version}")
    columns = ["generation", "manifest_sha256", "added"]
    if volume["kind"] == "luks2":
        columns.append("header")
    keyd_tables.print_table(columns, generations)
    return 0


def _remove(options: argparse.Namespace) -> int:
    from tdxd.owner.store.admin import remove_volume

    gone = remove_volume(
        options.store, options.id, options.generation, now_s(), kek_file=options.kek
    )
    if options.json:
        return print_json({"id": options.id, "generations_removed": gone})
    print(f"removed {options.id}: {gone} generation(s)")
    return 0


def _serve(options: argparse.Namespace) -> int:
    from tdxd.owner.server.serve import serve

    return serve(options.store, options.kek)


if __name__ == "__main__":
    sys.exit(main())
