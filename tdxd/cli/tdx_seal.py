"""Make and check sealed images; see tdx-seal(1)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tdxd import __version__
from tdxd.cli.boundary import Parser, run
from tdxd.cli.progress import progress_bar
from tdxd.core import luks2
from tdxd.core.bundle import SECRET_BYTES, KeyBundle, Manifest
from tdxd.core.sealed import PublicRecord
from tdxd.core.secret import Secret
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError, HostError, UsageError
from tdxd.owner.sealing import certs, check, seal

__all__ = ["main"]

_SMALL_BYTES = 1024 * 1024


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
    add("--force", action="store_true", help="overwrite existing files")


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    return _COMMANDS[args.verb](args)


def _create(args: argparse.Namespace) -> int:
    try:
        check_volume_id(args.id)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc
    if args.generation < 1:
        raise UsageError(f"generation {args.generation} is not 1 or more")
    secret = Secret(os.urandom(SECRET_BYTES))
    if args.secret_from is not None:
        secret = KeyBundle.parse(
            _read(args.secret_from), source=str(args.secret_from)
        ).secret
    request = seal.SealRequest(
        directory=args.directory,
        volume_id=args.id,
        generation=args.generation,
        image=args.output,
        bundle=args.bundle,
        secret=secret,
        recovery=args.recovery,
        force=args.force,
    )
    try:
        with progress_bar() as show:
            made = seal.seal_directory(request, show)
    finally:
        secret.wipe()
    print(f"{args.output}: {made.record.size_bytes} bytes, sha256 {made.record.sha256}")
    print(f"{args.bundle}: secret; give it to tdx-keyd add, then keep it offline")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    shown = _describe(args.file)
    if args.json:
        print(json.dumps(shown))
    else:
        width = max(len(key) for key in shown)
        for key, value in shown.items():
            print(f"{key:<{width}}  {value}")
    return 0


def _describe(path: Path) -> dict[str, object]:
    """Tell by the content what a file is, and what it says; never a secret."""
    data = _read(path)
    source = str(path)
    if data.startswith(luks2.MAGIC):
        header = luks2.read_header(data, source=source)
        shown: dict[str, object] = {
            "kind": "sealed image",
            "uuid": header.uuid,
            "cipher": header.cipher,
            "sector_bytes": header.sector_bytes,
            "payload_offset_bytes": header.payload_offset_bytes,
            "recovery_keyslot": header.keyslots > 0,
            "size_bytes": path.stat().st_size,
        }
        beside = path.with_name(path.name + ".json")
        if beside.exists():
            record = PublicRecord.parse(_read(beside), source=str(beside))
            shown |= {
                "id": record.id,
                "generation": record.generation,
                "sha256": record.sha256,
            }
        return shown
    if data.startswith(b"{"):
        record = PublicRecord.parse(data, source=source)
        return {"kind": "public record"} | {
            name: getattr(record, name)
            for name in ("id", "generation", "size_bytes", "sha256", "created")
        }
    with KeyBundle.parse(data, source=source).secret as secret:
        manifest = KeyBundle.parse(data, source=source).manifest
        return {
            "kind": "key bundle",
            **_manifest(manifest),
            "secret_bytes": len(secret),
        }


def _manifest(manifest: Manifest) -> dict[str, object]:
    return {
        "id": manifest.volume_id,
        "generation": manifest.generation,
        "fs": manifest.fs,
        "data_bytes": manifest.data_blocks * 4096,
        "payload_offset_bytes": manifest.payload_offset_bytes,
        "image_bytes": manifest.image_bytes,
        "root_hash": manifest.root_hash.hex(),
        "manifest_sha256": manifest.digest().hex(),
    }


def _verify(args: argparse.Namespace) -> int:
    with progress_bar() as bar:

        def show(done: int, whole: int) -> None:
            bar("verify", done, whole)

        if args.bundle is not None:
            bundle = KeyBundle.parse(_read(args.bundle), source=str(args.bundle))
            check.check_payload(args.image, bundle, show)
            manifest = bundle.manifest
            what = (
                f"every block of {manifest.volume_id} generation {manifest.generation}"
            )
        else:
            beside = args.image.with_name(args.image.name + ".json")
            record = PublicRecord.parse(_read(beside), source=str(beside))
            check.check_record(args.image, record, show)
            what = "size and SHA-256 of its public record"
    print(f"{args.image}: ok, {what}")
    return 0


def _cert(args: argparse.Namespace) -> int:
    private, public = certs.make_server_certificate(tuple(args.hostname))
    _write_new(args.output, private, 0o600)
    if args.cert_out is not None:
        _write_new(args.cert_out, public, 0o644)
    print(f"{args.output}: key and certificate for {', '.join(args.hostname)}")
    return 0


def _read(path: Path) -> bytes:
    """Read the first MiB of a file.

    Raises: HostError.
    """
    try:
        with path.open("rb") as file:
            return file.read(_SMALL_BYTES)
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc


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
    "cert": _cert,
}


if __name__ == "__main__":
    sys.exit(main())
