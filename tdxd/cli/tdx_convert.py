"""Turn frozen graphs into SavedModels; see tdx-convert(1)."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tdxd import __version__
from tdxd.cli.boundary import Parser, run
from tdxd.core.frozen_graph import TensorRef, shape_text
from tdxd.core.signature import Endpoint, Signature, SignatureRequest, TensorRequest
from tdxd.errors import UsageError
from tdxd.host.tf_messages import type_name
from tdxd.owner.convert.convert import Converted, ConvertRequest, Run, convert, describe
from tdxd.owner.convert.tensorflow_check import find_tensorflow

__all__ = ["main"]

_REFERENCE_DIRECTORY = Path("/tmp")  # noqa: S108 - where model_graph_to_saved_model.py writes
_REFERENCE_KEYS = {"inputs": "input", "outputs": "predict"}
_MAX_VERSION = 2**63 - 1


def main() -> int:
    """Run the program; the entry point."""
    return run("tdx-convert", _main)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tdx-convert", description="Turn a frozen graph into a SavedModel."
    )
    add = parser.add_argument
    add("--version", action="version", version=f"tdx-convert {__version__}")
    add("graph", type=Path, nargs="?", help="the frozen graph, .pb (or .pbtxt)")
    add("directory", type=Path, nargs="?", help="the model: DIRECTORY/VERSION is made")
    text = "its number; default: 1"
    add(
        "--model-version",
        "--model_version",
        type=int,
        default=1,
        metavar="N",
        help=text,
    )
    text = "begin a signature; what follows is its own; default: serving_default"
    add("--signature", action=_InOrder, dest="parts", metavar="NAME", help=text)
    text = "an input; default: the placeholders that the outputs need"
    add(
        "--input",
        action=_InOrder,
        dest="parts",
        metavar="[KEY=]TENSOR[SHAPE]",
        help=text,
    )
    text = "an output; default: what nothing in the graph uses"
    add("--output", action=_InOrder, dest="parts", metavar="[KEY=]TENSOR", help=text)
    _add_check(parser)
    add("--show", action="store_true", help="show inputs and outputs, write nothing")
    add("--json", action="store_true", help="print JSON")
    _add_reference(parser)
    return parser


def _add_check(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    text = "check and warm up with this .npy file (or one string's bytes)"
    add("--sample", action="append", default=[], metavar="KEY=FILE", help=text)
    add("--no-warmup", action="store_true", help="write no warm-up record")
    text = "do not let TensorFlow load and run the model"
    add("--no-check", action="store_true", help=text)
    add(
        "--python",
        metavar="PROGRAM",
        help="a Python that has TensorFlow, for the check",
    )


def _add_reference(parser: argparse.ArgumentParser) -> None:
    reference = parser.add_argument_group("as model_graph_to_saved_model.py has them")
    add = reference.add_argument
    add("--import_path", type=Path, metavar="GRAPH", help="the frozen graph")
    add("--export_dir", type=Path, metavar="DIRECTORY", help="default: /tmp")
    add("--inputs", metavar="NODE[,NODE]", help="default: input; its key is input")
    add("--outputs", metavar="NODE[,NODE]", help="default: predict; its key is predict")
    add("--dtypes", metavar="TYPE", help="no effect: types are the graph's own")


class _InOrder(argparse.Action):
    """Keeps options of several kinds in the order that they came in."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Append (option, value)."""
        del parser
        parts = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*parts, (option_string, values)])


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(_double_dashes(argv))
    request = _request(args)
    if args.show:
        shown = describe(request.graph, request.signatures)
        _print(args, {"signatures": _as_json(shown)}, _lines(shown))
        return 0
    if args.no_check and args.python:
        raise UsageError("--python and --no-check exclude each other")
    signal.signal(signal.SIGTERM, _stop)
    command = None if args.no_check else find_tensorflow(args.python)
    made = convert(request, command)
    _print(args, _report(made), [_head(made), *_lines(made.signatures), *_tail(made)])
    return 0


def _stop(number: int, _frame: FrameType | None) -> None:
    """Unwind, so that nothing half-made stays."""
    sys.exit(128 + number)


def _double_dashes(argv: Sequence[str]) -> list[str]:
    """Return arguments with `-name` as `--name`, which the reference allows."""
    return [re.sub(r"^-(?=[a-z]+_[a-z])", "--", one) for one in argv]


# --- what is asked for --------------------------------------------------------


def _request(args: argparse.Namespace) -> ConvertRequest:
    if not 1 <= args.model_version <= _MAX_VERSION:
        raise UsageError(f"--model-version {args.model_version}: not 1 or more")
    graph, directory = _paths(args)
    return ConvertRequest(
        graph=graph,
        directory=directory,
        version=args.model_version,
        signatures=_signatures(args),
        samples=dict(_sample(one) for one in args.sample),
        warmup=not args.no_warmup,
    )


def _paths(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return graph and directory, whichever way they were named."""
    named = [one for one in (args.graph, args.directory) if one is not None]
    graph = args.import_path or (named.pop(0) if named else None)
    directory = args.export_dir or (named.pop(0) if named else None)
    if named:
        raise UsageError(f"{named[0]}: there is another path already")
    if graph is None:
        raise UsageError("no graph is named", hint="tdx-convert GRAPH.pb DIRECTORY")
    if directory is None and args.import_path is None and not args.show:
        hint = "tdx-convert GRAPH.pb models/NAME, which makes models/NAME/1"
        raise UsageError("no directory is named", hint=hint)
    return graph, directory or _REFERENCE_DIRECTORY


def _signatures(args: argparse.Namespace) -> tuple[SignatureRequest, ...]:
    of_reference = args.import_path or args.inputs or args.outputs
    if of_reference:
        if args.parts:
            hint = "use --signature, --input and --output, or --inputs and --outputs"
            raise UsageError(f"{args.parts[0][0]} does not go with these", hint=hint)
        return (
            SignatureRequest(
                inputs=_reference_tensors(args, "inputs"),
                outputs=_reference_tensors(args, "outputs"),
            ),
        )
    found: dict[str, SignatureRequest] = {}
    name = SignatureRequest().name
    for option, value in args.parts or [("--signature", name)]:
        if option == "--signature":
            name = value
            if name in found:
                raise UsageError(f"signature {name} is begun twice")
        one = found.setdefault(name, SignatureRequest(name=name))
        if option == "--input":
            found[name] = one.with_input(value)
        elif option == "--output":
            found[name] = one.with_output(value)
    return tuple(found.values())


def _reference_tensors(
    args: argparse.Namespace, field: str
) -> tuple[TensorRequest, ...]:
    """Read `--inputs` or `--outputs`; the key of a single one is the reference's."""
    key = _REFERENCE_KEYS[field]
    names = (getattr(args, field) or key).split(",")
    if len(names) == 1:
        return (TensorRequest(ref=TensorRef.parse(names[0]), key=key),)
    return tuple(TensorRequest.parse(name) for name in names)


def _sample(text: str) -> tuple[str, Path]:
    key, equals, path = text.partition("=")
    if not equals or not key or not path:
        raise UsageError(f"--sample {text}: no key and file", hint="KEY=FILE.npy")
    return key, Path(path)


# --- what is said -------------------------------------------------------------


def _print(args: argparse.Namespace, shown: object, lines: Sequence[str]) -> None:
    print(json.dumps(shown) if args.json else "\n".join(lines))


def _head(made: Converted) -> str:
    return f"{made.path}: {made.size_bytes} bytes, sha256 {made.sha256}"


def _lines(signatures: Sequence[Signature]) -> list[str]:
    lines = []
    for one in signatures:
        lines.append(f"signature {one.name}")
        lines += [f"  in   {_endpoint(each)}" for each in one.inputs]
        lines += [f"  out  {_endpoint(each)}" for each in one.outputs]
    return lines


def _endpoint(one: Endpoint) -> str:
    kind = type_name(one.dtype) if one.dtype else "?"
    return f"{one.key}: {kind} {shape_text(one.shape)}, {one.ref}"


def _tail(made: Converted) -> list[str]:
    if not made.tensorflow:
        lines = ["not checked: no TensorFlow has loaded it"]
    else:
        lines = [f"loaded by TensorFlow {made.tensorflow}, eagerly and in a Session"]
        lines += [f"  {name}: {_ran(one)}" for name, one in made.runs.items()]
    lines.append(f"warm-up requests: {made.warmup_requests}")
    return lines


def _ran(one: Run) -> str:
    if one.difference is None:
        return f"not run, give an input with --sample: {one.reason}"
    return f"run both ways, greatest difference of the answers {one.difference:.2g}"


def _report(made: Converted) -> dict[str, object]:
    return {
        "path": str(made.path),
        "size_bytes": made.size_bytes,
        "sha256": made.sha256,
        "signatures": _as_json(made.signatures),
        "tensorflow": made.tensorflow or None,
        "runs": {
            name: {"difference": one.difference, "reason": one.reason or None}
            for name, one in made.runs.items()
        },
        "warmup_requests": made.warmup_requests,
    }


def _as_json(signatures: Sequence[Signature]) -> dict[str, object]:
    return {
        one.name: {
            role: {
                each.key: {
                    "tensor": str(each.ref),
                    "dtype": type_name(each.dtype) if each.dtype else None,
                    "shape": each.shape,
                }
                for each in endpoints
            }
            for role, endpoints in (("inputs", one.inputs), ("outputs", one.outputs))
        }
        for one in signatures
    }


if __name__ == "__main__":
    sys.exit(main())
