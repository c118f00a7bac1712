"""The verbs `secret` of tdx-keyd: contents that the server releases by themselves."""

from __future__ import annotations

import argparse
import datetime as dt
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdxd.cli.keyd_verbs import (
    add_kek,
    add_verb,
    now_s,
    print_json,
    warn,
    warn_of_readers,
)

if TYPE_CHECKING:
    from tdxd.core.named_secret import Content
    from tdxd.owner.secret_content import Checked
    from tdxd.owner.store.rows import GenerationRow

__all__ = ["add_secret_verbs"]

_STDIN = Path("-")


def add_secret_verbs(verbs: Any) -> None:
    """Add `secret`."""
    parser = verbs.add_parser(
        "secret", help="keep secrets of their own, such as a certificate"
    )
    secret = parser.add_subparsers(metavar="VERB", required=True)
    _add_put(secret)
    add_verb(secret, "list", _list, "list the secrets")
    remove = add_verb(
        secret, "remove", _remove, "remove a secret or one generation of it"
    )
    remove.add_argument("id", metavar="ID")
    remove.add_argument("--generation", type=int, metavar="N")
    add_kek(remove)


def _add_put(secret: Any) -> None:
    put = add_verb(
        secret, "put", _put, "add a secret, or the next generation of one that is there"
    )
    put.add_argument("id", metavar="ID")
    content = put.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("tls-pem", "a private key with its certificate and those that sign it"),
        ("client-ca", "the certificates that sign those of clients"),
        ("file", "any bytes, at most 64 KiB"),
    ):
        content.add_argument(
            f"--{name}",
            dest=name,
            type=Path,
            metavar="FILE",
            help=f"{text}; - is standard input",
        )
    policy = put.add_mutually_exclusive_group()
    policy.add_argument(
        "--policy", type=Path, metavar="FILE", help="set the policy, too"
    )
    policy.add_argument(
        "--like", metavar="VOLUME", help="set the policy that this volume has now, too"
    )
    add_kek(put)


def _put(options: argparse.Namespace) -> int:
    from tdxd.core.secret import Secret
    from tdxd.owner.store.admin import put_secret

    content, path = _chosen(options)
    with Secret(_read(path, content)) as data:
        checked = _check(content, data, path)
        row = put_secret(
            options.store,
            options.id,
            content,
            data,
            now_s(),
            policy=options.policy or options.like,
            kek_file=options.kek,
        )
    for text in checked.warnings:
        warn(text)
    version = _look_at_policy(options, row)
    if options.json:
        made = {"id": row.volume_id, "generation": row.generation, "content": content}
        return print_json({**made, "policy_version": version})
    print(f"put {row.volume_id} generation {row.generation}: {checked.summary}")
    return 0


def _chosen(options: argparse.Namespace) -> tuple[Content, Path]:
    given = vars(options)
    names: tuple[Content, ...] = ("tls-pem", "client-ca", "file")
    name = next(one for one in names if given[one] is not None)
    return name, given[name]


def _check(content: Content, data: Any, path: Path) -> Checked:
    from tdxd.owner.secret_content import check_content

    return check_content(
        content,
        data.reveal(),
        source="standard input" if path == _STDIN else str(path),
        now=dt.datetime.fromtimestamp(now_s(), dt.UTC),
    )


def _read(path: Path, content: Content) -> bytes:
    """Read a content, no more than tells that it is too much.

    Raises: HostError, ConfigError.
    """
    from tdxd.cli.passphrase import hide_memory
    from tdxd.core.named_secret import SECRET_CONTENT_MAX_BYTES
    from tdxd.owner.files import read_bytes

    hide_memory()
    if path == _STDIN:
        return sys.stdin.buffer.read(SECRET_CONTENT_MAX_BYTES + 1)
    if content != "client-ca":
        warn_of_readers(path)
    return read_bytes(path)


def _look_at_policy(options: argparse.Namespace, put: GenerationRow) -> int | None:
    """Return the version of the policy that stands, and warn if it is not what one expects."""
    from tdxd.core.policy import parse_policy
    from tdxd.owner.store.store import Store

    name = options.id
    with Store.open(options.store) as store:
        row = store.policy(name)
        present = [one.generation for one in store.generations(name)]
    if row is None:
        warn(f"{name} has no policy, so nobody gets it: tdx-keyd policy set")
        return None
    began_anew = put.generation > 1 and present == [put.generation]
    if began_anew and not (options.policy or options.like):
        warn(
            f"{name} was removed before, and its policy of then (version {row.version}) stands: "
            "tdx-keyd policy show"
        )
    served = parse_policy(row.text).release.generations.of(present)
    if served[:1] != (put.generation,):
        which = f"generation {served[0]}" if served else "none"
        warn(
            f"the policy of {name} lists generations, and releases {which}: "
            "tdx-keyd policy set"
        )
    return row.version


def _list(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.store.store import Store

    with Store.open(options.store) as store:
        found = [keyd_tables.secret(store, name) for name in store.volume_ids()]
    secrets = [one for one in found if one is not None]
    if options.json:
        return print_json(secrets)
    columns = ("id", "content", "generations", "policy_version", "added")
    keyd_tables.print_table(columns, secrets)
    return 0


def _remove(options: argparse.Namespace) -> int:
    from tdxd.owner.store.admin import remove_secret

    gone = remove_secret(
        options.store, options.id, options.generation, now_s(), kek_file=options.kek
    )
    if options.json:
        return print_json({"id": options.id, "generations_removed": gone})
    print(f"removed {options.id}: {gone} generation(s)")
    return 0
