"""The verb `add` of tdx-keyd: bundles of sealed images, and passphrases of foreign ones."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
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
from tdxd.errors import DataError, UsageError

if TYPE_CHECKING:
    from tdxd.core.foreign import PassphraseBundle
    from tdxd.core.secret import Secret
    from tdxd.owner.store.rows import GenerationRow

__all__ = ["add_add_verb"]

_SHORT_BYTES = 20
"""Below: not what a generator makes, and the host may guess for ever."""


def add_add_verb(verbs: Any) -> None:
    """Add `add`."""
    parser = add_verb(
        verbs,
        "add",
        _add,
        "add the key bundle of a sealed image, or the passphrase of a LUKS2 image",
    )
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", type=Path, nargs="?")
    add("--policy", type=Path, metavar="FILE", help="set the policy, too")
    add("--luks2", metavar="ID", help="add the passphrase of a foreign LUKS2 image")
    add(
        "--from-secret-json",
        type=Path,
        metavar="FILE",
        help="add the passphrases of another key service: its APP_IDs become volume ids",
    )
    add(
        "--id",
        action="append",
        default=[],
        dest="ids",
        metavar="APP_ID[=ID]",
        help="this one of FILE only, for the volume ID; may be given again",
    )
    add("--generation", type=int, metavar="N", help="of a passphrase; default: 1")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--passphrase-fd", type=int, metavar="N", help="read it from a descriptor"
    )
    source.add_argument(
        "--passphrase-file", type=Path, metavar="FILE", help="read it from a file"
    )
    add(
        "--image",
        type=Path,
        metavar="IMAGE",
        help="try the passphrase on this image, and pin its header",
    )
    add_kek(parser)


def _add(options: argparse.Namespace) -> int:
    _check(options)
    if options.bundle is not None:
        from tdxd.owner.store.admin import add_bundle

        row = add_bundle(
            options.store, options.bundle, options.policy, now_s(), kek_file=options.kek
        )
        return _tell([row], options, one=True)
    from tdxd.owner.store.admin import add_bundles

    with contextlib.ExitStack() as wiped:
        bundles = []
        for bundle in _passphrases(options):
            wiped.enter_context(bundle.secret)
            bundles.append(bundle)
        rows = add_bundles(
            options.store, bundles, options.policy, now_s(), kek_file=options.kek
        )
    return _tell(list(rows), options, one=options.luks2 is not None)


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not belong together.

    Raises: UsageError.
    """
    asked = (options.passphrase_fd, options.passphrase_file)
    given = [options.bundle, options.luks2, options.from_secret_json]
    if sum(one is not None for one in given) != 1:
        text = "name one of BUNDLE, --luks2 ID and --from-secret-json FILE"
        raise UsageError(text, hint="tdx-keyd add --help")
    if options.luks2 is None and asked != (None, None):
        raise UsageError("a passphrase is for --luks2 ID alone")
    if options.from_secret_json is None and options.ids:
        raise UsageError("--id is for --from-secret-json FILE alone")
    if options.bundle is not None and (options.generation, options.image) != (
        None,
        None,
    ):
        text = "a bundle has its generation, and knows its image"
        raise UsageError(text, hint="--generation and --image are for passphrases")


# --- passphrases --------------------------------------------------------------


def _passphrases(options: argparse.Namespace) -> Iterator[PassphraseBundle]:
    generation = 1 if options.generation is None else options.generation
    if options.luks2 is not None:
        _check_id(options.luks2)
        secret = _read_passphrase(options)
        yield _bundle(options.luks2, generation, secret, options.image)
        return
    from tdxd.owner.files import read_bytes
    from tdxd.owner.foreign.secret_json import chosen, parse_secret_json

    file = options.from_secret_json
    warn_of_readers(file)
    found = parse_secret_json(read_bytes(file), source=str(file))
    wanted = chosen(found, options.ids, source=str(file))
    if options.image is not None and len(wanted) != 1:
        text = f"--image is for one passphrase, {file} gives {len(wanted)}"
        raise UsageError(text, hint="choose it by --id APP_ID")
    for volume_id, one in wanted.items():
        if one.shortened and options.image is None:
            warn(
                f"{volume_id}: the reference's mount script shortens such a value; the image "
                "may have been made with what it leaves: try it with --image"
            )
        yield _bundle(volume_id, generation, one.passphrase, options.image)


def _bundle(
    volume_id: str, generation: int, secret: Secret, image: Path | None
) -> PassphraseBundle:
    from tdxd.core.foreign import ForeignManifest, PassphraseBundle

    if image is None:
        digest = b""
        warn(
            f"{volume_id}: the header is not pinned: any LUKS2 header that this passphrase opens "
            "will do; --image IMAGE pins it"
        )
    else:
        from tdxd.owner.foreign.image import pin_header

        digest = pin_header(image, secret)
    if len(secret) < _SHORT_BYTES:
        warn(
            f"{volume_id}: the passphrase has fewer than {_SHORT_BYTES} bytes: the host has the "
            "image, and may guess at it for ever"
        )
    try:
        manifest = ForeignManifest(
            volume_id=volume_id, generation=generation, header_sha256=digest
        )
        return PassphraseBundle(manifest=manifest, secret=secret)
    except ValueError as exc:
        raise UsageError(f"{volume_id}: {exc}") from exc


def _check_id(volume_id: str) -> None:
    from tdxd.core.volume_id import check_volume_id

    try:
        check_volume_id(volume_id)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc


def _read_passphrase(options: argparse.Namespace) -> Secret:
    """Take the passphrase from where the command line says; as it is, newlines included.

    Raises: UsageError, DataError, HostError.
    """
    from tdxd.cli import passphrase
    from tdxd.core.secret import Secret

    if options.passphrase_fd is not None:
        return Secret(passphrase.from_fd(options.passphrase_fd))
    if options.passphrase_file is not None:
        warn_of_readers(options.passphrase_file)
        return Secret(passphrase.from_file(str(options.passphrase_file)))
    if not passphrase.has_terminal():
        hint = "use --passphrase-fd or --passphrase-file"
        raise UsageError("no terminal to ask for a passphrase on", hint=hint)
    typed = Secret(passphrase.asked_on_terminal(options.luks2))
    if options.image is None:  # nothing else would show a slip
        with Secret(passphrase.asked_on_terminal(f"{options.luks2}, again")) as again:
            if not typed.matches(again):
                typed.wipe()
                raise DataError("the two passphrases differ")
    return typed


# --- what was added -----------------------------------------------------------


def _tell(rows: list[GenerationRow], options: argparse.Namespace, *, one: bool) -> int:
    from tdxd.cli.keyd_tables import header

    if options.json:
        made = [
            {
                "id": row.volume_id,
                "generation": row.generation,
                "manifest_sha256": row.manifest_sha256,
                "kind": row.kind,
                "header": header(row),
            }
            for row in rows
        ]
        return print_json(made[0] if one else made)
    for row in rows:
        print(f"added {row.volume_id} generation {row.generation}")
    return 0
