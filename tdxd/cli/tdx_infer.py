"""tdx-infer: ask a model for answers over TLS, or measure how fast it gives them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tdxd.cli.boundary import Parser, run
from tdxd.errors import EX_OK, EX_TEMPFAIL, DataError, HostError, UsageError

if TYPE_CHECKING:
    from tdxd.user.bench import Load, Query
    from tdxd.user.endpoint import Endpoint
    from tdxd.user.infer import Model, Prediction
    from tdxd.user.inputs import Array

__all__ = ["main"]

PROG = "tdx-infer"


def main() -> int:
    """Run the program; the entry point."""
    return run(PROG, _run)


def _run(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    # What grpc would log of a failed handshake is in our own message.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    code: int = arguments.verb(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    text = "Ask a served model for predictions, over TLS with a pinned certificate."
    parser = Parser(prog=PROG, description=text)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text)
        _add_common(one)
        return one

    predict = verb("predict", "Send one request and show the answer.")
    predict.add_argument(
        "--output",
        metavar="[NAME=]FILE.npy",
        action="append",
        default=[],
        help="write an output to a file instead",
    )
    predict.set_defaults(verb=_predict)
    bench = verb("bench", "Send the same request again and again; show latencies.")
    _add_load(bench)
    bench.set_defaults(verb=_bench)
    return parser


def _add_load(bench: argparse.ArgumentParser) -> None:
    bench.add_argument(
        "--batch", type=_count, metavar="B", help="rows per request; default: as given"
    )
    bench.add_argument(
        "--cnum", type=_count, default=16, metavar="N", help="clients (%(default)s)"
    )
    bench.add_argument(
        "--loop",
        type=_count,
        default=200,
        metavar="N",
        help="requests of each client (%(default)s)",
    )
    bench.add_argument(
        "--warm-up",
        type=_count,
        default=5,
        metavar="N",
        help="unmeasured requests of each client before (%(default)s)",
    )
    bench.add_argument("--quiet", action="store_true", help="no line for each query")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("address", metavar="ADDRESS", help="HOST:PORT of the server")
    add(
        "--ca", metavar="FILE", required=True, help="PEM: whose certificates to believe"
    )
    add("--server-name", metavar="NAME", help="name in the certificate, if not HOST")
    add("--model", metavar="NAME", required=True)
    add("--version", metavar="N", type=int, help="default: the latest")
    add("--signature", metavar="NAME", default="serving_default")
    add(
        "--input",
        metavar="[NAME=]FILE",
        action="append",
        required=True,
        help="FILE.npy, or JSON (- reads it from standard input)",
    )
    add(
        "--timeout",
        metavar="S",
        type=float,
        default=60.0,
        help="deadline of one call (%(default)g s)",
    )
    add("--json", action="store_true", help="print JSON")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _endpoint(arguments: argparse.Namespace) -> Endpoint:
    from tdxd.user.endpoint import Endpoint, read_ca

    return Endpoint(
        address=arguments.address,
        ca_pem=read_ca(arguments.ca),
        server_name=arguments.server_name,
        timeout_s=arguments.timeout,
    )


def _model(arguments: argparse.Namespace) -> Model:
    from tdxd.user.infer import Model

    return Model(
        name=arguments.model,
        version=arguments.version,
        signature=arguments.signature,
    )


def _given(arguments: argparse.Namespace) -> dict[str | None, Any]:
    from tdxd.user.inputs import read_input

    given: dict[str | None, Any] = {}
    for argument in arguments.input:
        for name, value in read_input(argument, sys.stdin).items():
            if name in given:
                which = "without a name" if name is None else name
                raise UsageError(f"input {which} is given twice")
            given[name] = value
    return given


def _predict(arguments: argparse.Namespace) -> int:
    from tdxd.user.infer import predict

    prediction = predict(_endpoint(arguments), _model(arguments), _given(arguments))
    for target in arguments.output:
        _write_output(target, prediction)
    if arguments.json:
        print(json.dumps(_as_json(prediction, values=not arguments.output)))
    elif not arguments.output:
        from tdxd.user.inputs import type_name

        for name, array in prediction.outputs.items():
            print(f"{name}: {type_name(array)} {list(array.shape)}\n{array}")
    return EX_OK


def _as_json(prediction: Prediction, *, values: bool) -> dict[str, Any]:
    from tdxd.user.inputs import json_value, type_name

    outputs = {}
    for name, array in prediction.outputs.items():
        outputs[name] = {"dtype": type_name(array), "shape": list(array.shape)}
        if values:
            outputs[name]["values"] = json_value(array)
    return {
        "model": prediction.model,
        "version": prediction.version,
        "signature": prediction.signature,
        "outputs": outputs,
    }


def _write_output(target: str, prediction: Prediction) -> None:
    import numpy as np

    name, separator, path = target.partition("=")
    if not separator:
        path = target
        if len(prediction.outputs) != 1:
            known = ", ".join(prediction.outputs)
            text = f"the answer has {len(prediction.outputs)} outputs ({known})"
            raise UsageError(text, hint="name it: --output NAME=FILE.npy")
        name = next(iter(prediction.outputs))
    array = prediction.outputs.get(name)
    if array is None:
        known = ", ".join(prediction.outputs)
        raise UsageError(f"no output {name!r} in the answer", hint=f"it has: {known}")
    if array.dtype.kind == "O":
        text = f"output {name} holds strings, which a .npy file would have to pickle"
        raise DataError(text, hint="use --json")
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    except OSError as exc:
        raise HostError.of("write", path, exc) from exc


def _bench(arguments: argparse.Namespace) -> int:
    from tdxd.user.bench import Load, run_bench
    from tdxd.user.endpoint import open_channel
    from tdxd.user.infer import encode_request, resolve_inputs

    endpoint, model = _endpoint(arguments), _model(arguments)
    with open_channel(endpoint) as channel:
        inputs = resolve_inputs(channel, endpoint, model, _given(arguments))
    inputs, batch = _batched(inputs, arguments.batch)
    load = Load(
        clients=arguments.cnum,
        loops=arguments.loop,
        batch=batch,
        warm_up=arguments.warm_up,
    )
    show = _Show(load, queries=not (arguments.quiet or arguments.json))
    report = run_bench(
        endpoint,
        load,
        encode_request(model, inputs),
        on_query=show.query,
        on_warm=_ignore if arguments.json else show.warm,
    )
    if arguments.json:
        print(json.dumps(report.as_json()))
    else:
        print("\n".join(report.lines()))
    return EX_TEMPFAIL if report.errors else EX_OK


class _Show:
    """Prints a run while it lasts, in the reference's form."""

    def __init__(self, load: Load, *, queries: bool) -> None:
        self._load = load
        self._queries = queries

    def query(self, query: Query) -> None:
        if self._queries:
            failed = "" if query.code == "OK" else f", failed: {query.code}"
            print(query.line(self._load.batch) + failed)

    def warm(self, elapsed_s: float) -> None:
        count = self._load.clients * self._load.warm_up
        print(f"warm-up: requests {count}, time(s) {elapsed_s:.3f}")


def _ignore(_elapsed_s: float) -> None:
    """Print nothing."""


def _batched(
    inputs: dict[str, Array], batch: int | None
) -> tuple[dict[str, Array], int]:
    from tdxd.user.inputs import as_batch

    if batch is not None:
        return {name: as_batch(array, batch) for name, array in inputs.items()}, batch
    sizes = {len(array) for array in inputs.values() if array.ndim}
    return inputs, sizes.pop() if len(sizes) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
