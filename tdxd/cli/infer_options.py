"""What the verbs of tdx-infer take: where to call, whom to believe, which model, which inputs."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tdxd.cli.infer_attest import add_attest_options, attested, refuse_alone
from tdxd.errors import UsageError
from tdxd.user.image_options import FITS, PIXELS, ImageOptions

if TYPE_CHECKING:
    from tdxd.user.endpoint import Endpoint
    from tdxd.user.infer import Model

__all__ = [
    "add_common",
    "add_connection",
    "add_inputs",
    "count",
    "endpoint_of",
    "given_inputs",
    "model_of",
]


def add_common(parser: argparse.ArgumentParser, *, address: str | None = None) -> None:
    """Add what every verb that asks a model needs; `address` as for `add_connection`."""
    add_connection(parser, address=address)
    add = parser.add_argument
    add("--model", metavar="NAME")
    add("--version", metavar="N", type=int, help="default: the latest")
    add("--version-label", metavar="LABEL", help="the version with this label")
    add("--signature", metavar="NAME", default="serving_default")


def add_connection(
    parser: argparse.ArgumentParser, *, address: str | None = None
) -> None:
    """Add what every verb needs; `address` "?" if another option may stand for it."""
    add = parser.add_argument
    add("address", metavar="ADDRESS", nargs=address, help="HOST:PORT of the server")
    add("--ca", metavar="FILE", help="PEM: whose certificates to believe")
    add("--server-name", metavar="NAME", help="name in the certificate, if not HOST")
    add("--cert", metavar="FILE", help="PEM: our certificate, if the server wants one")
    add("--key", metavar="FILE", help="PEM: the key to it; default: in the same file")
    add(
        "--plaintext",
        action="store_true",
        help="no TLS: anybody between may read and change everything",
    )
    add(
        "--timeout",
        metavar="S",
        type=float,
        default=60.0,
        help="deadline of one call (%(default)g s)",
    )
    add("--json", action="store_true", help="print JSON")
    add_attest_options(parser)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add what a request is made of."""
    add = parser.add_argument
    text = "FILE.npy, JSON (- reads it from standard input), or an image by its ending"
    add("--input", metavar="[NAME=]FILE", action="append", default=[], help=text)
    add(
        "--image",
        "--img",
        metavar="[NAME=]FILE",
        action="append",
        default=[],
        help="an image; several for one input are its rows",
    )
    add("--fit", choices=FITS, default="crop", help="to the model's size (%(default)s)")
    add("--pixels", choices=PIXELS, default="raw", help="their scale (%(default)s)")
    text = "of images, where the model takes any"
    add("--size", metavar="WIDTHxHEIGHT", type=_size, help=text)


def count(text: str) -> int:
    """Parse a number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _size(text: str) -> tuple[int, int]:
    width, separator, height = text.partition("x")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return count(width), count(height)


def endpoint_of(arguments: argparse.Namespace, *, prove: bool = True) -> Endpoint:
    """Return where to call; reads the certificate files, and has it prove itself if asked to.

    Raises: UsageError, HostError, DataError; with `--attest` also as `infer_attest.attested`.
    """
    from tdxd.user.credentials import read_ca, read_identity
    from tdxd.user.endpoint import Endpoint

    if arguments.address is None:
        raise UsageError("ADDRESS is missing", hint="for example localhost:8500")
    if arguments.plaintext:
        for name in ("ca", "cert", "key", "server_name", "attest"):
            if getattr(arguments, name) is not None:
                option = name.replace("_", "-")
                raise UsageError(f"--plaintext and --{option} exclude each other")
    elif arguments.ca is None and arguments.attest is None:
        hint = "--attest POLICY does without, --plaintext proves and hides nothing"
        raise UsageError("--ca FILE is missing: whom to believe", hint=hint)
    if arguments.key is not None and arguments.cert is None:
        raise UsageError("--key without --cert", hint="--cert FILE --key FILE")
    identity = arguments.cert and read_identity(arguments.cert, arguments.key)
    endpoint = Endpoint(
        address=arguments.address,
        ca_pem=None if arguments.ca is None else read_ca(arguments.ca),
        server_name=arguments.server_name,
        timeout_s=arguments.timeout,
        identity=identity,
    )
    if arguments.attest is None:
        refuse_alone(arguments)
    elif prove:
        return attested(endpoint, arguments)
    return endpoint


def model_of(arguments: argparse.Namespace) -> Model:
    """Return which model to ask.

    Raises: UsageError.
    """
    from tdxd.user.infer import Model

    if arguments.model is None:
        raise UsageError("--model NAME is missing")
    if arguments.version is not None and arguments.version_label is not None:
        raise UsageError("--version and --version-label exclude each other")
    return Model(
        name=arguments.model,
        version=arguments.version,
        signature=arguments.signature,
        label=arguments.version_label,
    )


def given_inputs(arguments: argparse.Namespace) -> dict[str | None, Any]:
    """Read the inputs.

    Raises: UsageError, HostError, DataError.
    """
    from tdxd.user.inputs import read_inputs

    options = ImageOptions(
        fit=arguments.fit, pixels=arguments.pixels, size=arguments.size
    )
    return read_inputs(arguments.input, arguments.image, sys.stdin, options)
