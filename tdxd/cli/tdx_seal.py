"""Make and check sealed images; see tdx-seal(1)."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tdxd import __version__
from tdxd.cli.boundary import Parser, run
from tdxd.cli.progress import progress_bar
from tdxd.cli.seal_files import describe, read_bundle, read_record
from tdxd.core.bundle import SECRET_BYTES, KeyBundle
from tdxd.core.secret import Secret
from tdxd.core.showing import shown
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError, HostError, UsageError
from tdxd.owner.sealing import certs, check, extract, rekey, seal
from tdxd.owner.sealing.image import Sealed, record_beside

__all__ = ["main"]


def main() -> int:
    """Run the program; the entry point."""
    return run("tdx-seal", _main)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tdx-seal", description="Seal models into an encrypted image.")
    parser.add_argument(
        "--version", action="version", version=f"tdx-seal {__version__}"
    )
    commands = parser.add_subparsers(dest="verb", required=True, metavar="COMMAND")
    _add_create(commands.add_parser("create", help="seal a directory"))

    inspect = commands.add_parser(
        "inspect", help="show an image, a bundle or a public record"
    )
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = commands.add_parser("verify", help="check an image")
    verify.add_argument("image", type=Path)
    verify.add_argument("--bundle", type=Path, help="decrypt and verify every block")
    verify.add_argument(
        "--record", type=Path, help="public record; default: IMAGE.json"
    )

    opened = commands.add_parser("open", help="list or extract what an image holds")
    opened.add_argument("image", type=Path)
    opened.add_argument("--bundle", type=Path, required=True, help="its key bundle")
    opened.add_argument("--extract", type=Path, metavar="DIR", help="a new directory")
    opened.add_argument("--json", action="store_true", help="list as JSON")

    _add_rekey(commands.add_parser("rekey", help="seal again under a new secret"))

    cert = commands.add_parser("cert", help="make the server's key and certificate")
    cert.add_argument("hostname", nargs="+", help="host names and IP addresses")
    text = "key and certificate; default: server.pem"
    cert.add_argument(
        "-o", "--output", type=Path, default=Path("server.pem"), help=text
    )
    cert.add_argument("--cert-out", type=Path, help="the certificate alone, for users")
    return parser


def _add_create(create: argparse.ArgumentParser) -> None:
    add = create.add_argument
    add("directory", type=Path, help="holds models/NAME/VERSION/…, tls/server.pem")
    add("--id", required=True, help="volume id: 1 to 64 of a-z 0-9 . _ -")
    add("--generation", required=True, type=int, help="counts up from 1")
    add("-o", "--output", required=True, type=Path, help="the image, NAME.img")
    add("--bundle", required=True, type=Path, help="the secret key bundle")
    text = "add a keyslot; write its passphrase here"
    add("--recovery", type=Path, metavar="FILE", help=text)
    text = "seal again under this bundle's secret"
    add("--secret-from", type=Path, metavar="BUNDLE", help=text)
    _add_outputs(create)


def _add_rekey(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("image", type=Path, help="the old image; it stays as it is")
    add("--bundle", required=True, type=Path, help="the old image's key bundle")
    text = "above the old one; default: the next"
    add("--generation", type=int, help=text)
    add("-o", "--output", required=True, type=Path, help="the new image")
    add("--new-bundle", required=True, type=Path, help="the new secret key bundle")
    text = "add a keyslot; write its passphrase here"
    add("--recovery", type=Path, metavar="FILE", help=text)
    _add_outputs(parser)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "public record; default: IMAGE.json; needed for a block device"
    add("--record", type=Path, metavar="FILE", help=text)
    text = "overwrite existing files, and a block device"
    add("--force", action="store_true", help=text)


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    # So that what is half done is cleared away, as after Ctrl-C.
    signal.signal(signal.SIGTERM, _terminated)
    return _COMMANDS[args.verb](args)


def _terminated(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def _create(args: argparse.Namespace) -> int:
    try:
        check_volume_id(args.id)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    if args.generation < 1:
        raise UsageError(f"generation {args.generation} is not 1 or more")
    _check_outputs(args)
    secret = Secret(os.urandom(SECRET_BYTES))
    if args.secret_from is not None:
        secret = read_bundle(args.secret_from).secret
    request = seal.SealRequest(
        directory=args.directory,
        volume_id=args.id,
        generation=args.generation,
        image=args.output,
        bundle=args.bundle,
        secret=secret,
        recovery=args.recovery,
        record=args.record,
        force=args.force,
    )
    try:
        with progress_bar() as show:
            made = seal.seal_directory(request, show)
    finally:
        secret.wipe()
    _print_made(made, args.output, args.bundle)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    if args.output.is_block_device() and args.record is None:
        hint = "add --record NAME.img.json"
        raise UsageError(f"{args.output} is a block device", hint=hint)


def _print_made(made: Sealed, image: Path, bundle: Path) -> None:
    print(f"{image}: {made.record.size_bytes} bytes, sha256 {made.record.sha256}")
    print(f"{bundle}: secret; give it to tdx-keyd add, then keep it offline")


def _rekey(args: argparse.Namespace) -> int:
    _check_outputs(args)
    for new, old in ((args.output, args.image), (args.new_bundle, args.bundle)):
        if _is_same(new, old):
            # Between two renames, one of them without the other would be worth nothing.
            hint = "name a new one; remove the old once the new one is served"
            raise UsageError(f"{new} would replace the old one", hint=hint)
    old = read_bundle(args.bundle)
    manifest = old.manifest
    generation = manifest.generation + 1
    request = rekey.RekeyRequest(
        old_image=args.image,
        old_bundle=old,
        volume_id=manifest.volume_id,
        generation=generation if args.generation is None else args.generation,
        image=args.output,
        bundle=args.new_bundle,
        secret=Secret(os.urandom(SECRET_BYTES)),
        recovery=args.recovery,
        record=args.record,
        force=args.force,
    )
    try:
        with progress_bar() as show:
            made = rekey.rekey_image(request, show)
    finally:
        request.secret.wipe()
        old.secret.wipe()
    _print_made(made, args.output, args.new_bundle)
    name, number = manifest.volume_id, manifest.generation
    print(
        f"generation {number} still opens every copy of {args.image}: once guests serve"
    )
    print(f"the new one, tdx-keyd remove STORE {name} --generation {number}")
    return 0


def _is_same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)


def _open(args: argparse.Namespace) -> int:
    bundle = read_bundle(args.bundle)
    with bundle.secret, _showing("extract") as show:
        if args.extract is None:
            _list(args.image, bundle, as_json=args.json)
            return 0
        count, size = extract.extract(args.image, bundle, args.extract, show)
    print(f"{args.extract}: {count} files, {size} bytes, every one verified")
    return 0


def _list(image: Path, bundle: KeyBundle, *, as_json: bool) -> None:
    found = sorted(extract.files(image, bundle), key=lambda one: one.path)
    if as_json:
        listed = [
            {
                "path": one.path,
                "mode": f"{stat.S_IMODE(one.inode.mode):04o}",
                "kind": "directory" if stat.S_ISDIR(one.inode.mode) else "file",
                "size_bytes": one.inode.size_bytes,
            }
            for one in found
        ]
        print(json.dumps(listed))
        return
    for one in found:
        mode, size = stat.filemode(one.inode.mode), one.inode.size_bytes
        print(f"{mode} {size:>14} {shown(one.path, 4096)}")


def _inspect(args: argparse.Namespace) -> int:
    told = describe(args.file)
    if args.json:
        print(json.dumps(told))
    else:
        width = max(len(key) for key in told)
        for key, value in told.items():
            print(f"{key:<{width}}  {_line(value)}")
    return 0


def _line(value: object) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value)


def _verify(args: argparse.Namespace) -> int:
    with _showing("verify") as show:
        if args.bundle is not None:
            bundle = read_bundle(args.bundle)
            check.check_payload(args.image, bundle, show)
            manifest = bundle.manifest
            what = (
                f"every block of {manifest.volume_id} generation {manifest.generation}"
            )
        else:
            record = read_record(args.record or record_beside(args.image))
            check.check_record(args.image, record, show)
            what = f"size and SHA-256 of {record.id} generation {record.generation}"
    print(f"{args.image}: ok, {what}")
    return 0


@contextlib.contextmanager
def _showing(step: str) -> Iterator[Callable[[int, int], None]]:
    with progress_bar() as bar:
        yield lambda done, whole: bar(step, done, whole)


def _cert(args: argparse.Namespace) -> int:
    private, public = certs.make_server_certificate(tuple(args.hostname))
    _write_new(args.output, private, 0o600)
    if args.cert_out is not None:
        _write_new(args.cert_out, public, 0o644)
    print(f"{args.output}: key and certificate for {', '.join(args.hostname)}")
    return 0


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Write a file that must not exist.

    Raises: DataError, HostError.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as exc:
        raise DataError(
            f"{path} exists already", hint="name another, or remove it"
        ) from exc
    except OSError as exc:
        raise HostError.of("create", str(path), exc) from exc
    with os.fdopen(fd, "wb") as file:
        file.write(data)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "create": _create,
    "inspect": _inspect,
    "verify": _verify,
    "open": _open,
    "rekey": _rekey,
    "cert": _cert,
}


if __name__ == "__main__":
    sys.exit(main())
