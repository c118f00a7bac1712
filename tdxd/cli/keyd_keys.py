"""The verbs of tdx-keyd about the server's own keys: which there are, and how they rotate."""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

from tdxd.cli.keyd_verbs import add_kek, add_verb, now_s, print_json

__all__ = ["add_keys_verbs"]

_RELOAD = "a running server takes it at its next reload: systemctl reload tdx-keyd"


def add_keys_verbs(verbs: Any) -> None:
    """Add `keys`, `rotate-kek` and `reload`."""
    parser = verbs.add_parser("keys", help="show and rotate the server's own keys")
    keys = parser.add_subparsers(metavar="VERB", required=True)
    add_kek(
        add_verb(
            keys, "list", _list, "list the keys of answers and of challenge tokens"
        )
    )
    add_kek(
        add_verb(
            keys,
            "rotate-token",
            _rotate_token,
            "make a new key for challenge tokens now",
        )
    )
    signing = add_verb(
        keys, "rotate-signing", _rotate_signing, "change the key that signs answers"
    )
    step = signing.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("publish", "make the next key and print its line, for every guest to pin"),
        ("use", "sign with the next key; the one before still answers who asked it"),
        ("retire", "destroy the key before"),
    ):
        step.add_argument(
            f"--{name}", dest="step", action="store_const", const=name, help=text
        )
    add_kek(signing)

    _add_rotate_kek_and_reload(verbs)


def _add_rotate_kek_and_reload(verbs: Any) -> None:
    add_kek(
        add_verb(
            verbs,
            "rotate-kek",
            _rotate_kek,
            "make a new key-encryption key, put the whole store under it, destroy the old",
        )
    )
    reload_parser = verbs.add_parser(
        "reload",
        help="let a running server read its configuration and keys again",
        allow_abbrev=False,
    )
    reload_parser.set_defaults(verb=_reload)
    reload_parser.add_argument("pid", metavar="PID", help="its main process")


def _reload(options: argparse.Namespace) -> int:
    from tdxd.errors import HostError, UsageError

    if not options.pid.isdecimal() or int(options.pid) < 2:
        raise UsageError(f"PID {options.pid!r} is not the number of a process")
    try:
        os.kill(int(options.pid), signal.SIGHUP)
    except OverflowError as exc:
        raise UsageError(f"PID {options.pid} is too large") from exc
    except OSError as exc:
        raise HostError.of("signal", f"process {options.pid}", exc) from exc
    return 0


def _list(options: argparse.Namespace) -> int:
    from tdxd.cli import keyd_tables
    from tdxd.owner.server.signing_keys import pin_line, read_signing_keys
    from tdxd.owner.store.store import Store

    with Store.open(options.store, options.kek) as store:
        tokens = [
            {"key_id": row.key_id.hex(), "made": keyd_tables.when(row.made_at_s)}
            for row in store.token_keys()
        ]
    signing = [
        {
            "role": key.role,
            "signing_key": pin_line(key),
            "sha256": key.key_id.hex(),
        }
        for key in read_signing_keys(options.store)
    ]
    if options.json:
        return print_json({"signing_keys": signing, "token_keys": tokens})
    keyd_tables.print_table(("role", "signing_key"), signing)
    print()
    keyd_tables.print_table(("key_id", "made"), tokens)
    return 0


def _rotate_token(options: argparse.Namespace) -> int:
    from tdxd.owner.server.token_keys import PUBLISH_S, rotate_token_key
    from tdxd.owner.store.store import Store

    with Store.open(options.store, options.kek) as store:
        key_id = rotate_token_key(options.store, store, now_s(), os.urandom)
    if options.json:
        return print_json({"key_id": key_id.hex()})
    print(f"made token key {key_id.hex()}; every server seals with it in {PUBLISH_S} s")
    return 0


def _rotate_kek(options: argparse.Namespace) -> int:
    from tdxd.owner.store.rotation import rotate_kek

    done = rotate_kek(options.store, now_s(), os.urandom, kek_file=options.kek)
    if options.json:
        return print_json(
            {
                "kek_sha256": done.key_id,
                "finished": done.finished,
                "scrubbed": done.scrubbed,
            }
        )
    if done.finished:
        print("finished the rotation that was cut short; run it again for another key")
    print(f"the store is under the key-encryption key sha256:{done.key_id}")
    print("a running server answers nobody until: systemctl reload tdx-keyd")
    if not done.scrubbed:
        print("the database's log still has old rows: it is emptied when nobody reads")
    return 0


def _rotate_signing(options: argparse.Namespace) -> int:
    from tdxd.owner.audit.guard import retire_signing_key
    from tdxd.owner.server.signing_keys import pin_line, publish_next, use_next

    if options.step == "retire":
        retire_signing_key(options.store, options.kek, now_s())
        if options.json:
            return print_json({"step": options.step})
        print(f"destroyed the previous signing key; {_RELOAD}")
        return 0
    if options.step == "publish":
        key = publish_next(options.store, os.urandom)
        text = "pin this in `signing_keys` of every guest before --use:"
    else:
        key = use_next(options.store)
        text = f"answers will be signed with this key; {_RELOAD}"
    if options.json:
        return print_json({"step": options.step, "signing_key": pin_line(key)})
    print(text)
    print(pin_line(key))
    return 0
