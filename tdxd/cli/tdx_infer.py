"""tdx-infer: ask a model for answers over TLS, or measure how fast it gives them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from tdxd.cli.boundary import Parser, run
from tdxd.cli.infer_attest_verb import add_attest
from tdxd.cli.infer_bench import add_bench, with_verb
from tdxd.cli.infer_predict import add_predict, add_show

__all__ = ["main"]

PROG = "tdx-infer"


def main() -> int:
    """Run the program; the entry point."""
    return run(PROG, _run)


def _run(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(with_verb(argv))
    # What grpc would log of a failed handshake is in our own message.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    code: int = arguments.verb(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    text = "Ask a served model for predictions, over TLS with a pinned certificate."
    parser = Parser(prog=PROG, description=text)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(
        name: str, text: str, add: Callable[[argparse.ArgumentParser], None]
    ) -> None:
        add(verbs.add_parser(name, help=text, description=text))

    verb("predict", "Send one request and show the answer.", add_predict)
    text = "Send the same request again and again; show latencies."
    verb("bench", text, add_bench)
    verb("show", "Show the inputs and outputs of a model.", add_show)
    text = "Have an endpoint prove itself, and show every check."
    verb("attest", text, add_attest)
    return parser


if __name__ == "__main__":
    sys.exit(main())
