"""`tdx-infer predict` and `show`: one question, and its answer for a person or a program."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from tdxd.cli.infer_options import (
    add_common,
    add_inputs,
    count,
    endpoint_of,
    given_inputs,
    model_of,
)
from tdxd.errors import EX_OK, DataError, HostError, UsageError

if TYPE_CHECKING:
    from tdxd.user.infer import Prediction
    from tdxd.user.labels import Ranked
    from tdxd.user.signature import TensorSpec

__all__ = ["add_predict", "add_show"]

_TOP = 5


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options, and the verb itself."""
    add_common(parser)
    add_inputs(parser)
    add = parser.add_argument
    add(
        "--output",
        metavar="[NAME=]FILE.npy",
        action="append",
        default=[],
        help="write an output to a file instead",
    )
    text = "names of an output's classes: one a line, or JSON"
    add("--labels", metavar="[NAME=]FILE", help=text)
    text = f"show the K greatest of each row ({_TOP}, with --labels)"
    add("--top", type=count, metavar="K", help=text)
    parser.set_defaults(verb=_predict)


def add_show(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options, and the verb itself."""
    add_common(parser)
    parser.set_defaults(verb=_show)


def _predict(arguments: argparse.Namespace) -> int:
    from tdxd.user.infer import predict

    endpoint, model = endpoint_of(arguments), model_of(arguments)
    labels = _labels(arguments)
    given = given_inputs(arguments)
    if not given:
        raise UsageError("--input FILE is missing", hint="or --image FILE")
    prediction = predict(endpoint, model, given)
    for target in arguments.output:
        _write_output(target, prediction)
    ranked = _ranked(arguments, prediction, labels)
    if arguments.json:
        shown = _as_json(prediction, ranked, values=not (arguments.output or ranked))
        print(json.dumps(shown))
    else:
        _print(prediction, ranked, values=not arguments.output)
    return EX_OK


_Ranks = dict[str, list[list["Ranked"]]]


def _labels(arguments: argparse.Namespace) -> tuple[str | None, list[str]] | None:
    if arguments.labels is None:
        return None
    from tdxd.user.labels import read_labels

    name, separator, path = arguments.labels.partition("=")
    return (name, read_labels(path)) if separator else (None, read_labels(name))


def _ranked(
    arguments: argparse.Namespace,
    prediction: Prediction,
    labels: tuple[str | None, list[str]] | None,
) -> _Ranks:
    """Return the greatest scores of the outputs that are meant."""
    from tdxd.user.labels import top_k

    most = arguments.top or _TOP
    if labels is not None:
        name, array = _chosen(labels[0], prediction, "--labels NAME=FILE")
        return {name: top_k(name, array, most, labels[1])}
    if arguments.top is None:
        return {}
    return {
        name: top_k(name, array, most) for name, array in prediction.outputs.items()
    }


def _chosen(name: str | None, prediction: Prediction, hint: str) -> tuple[str, Any]:
    """Return an output by its name, or the only one."""
    known = ", ".join(prediction.outputs)
    if name is None:
        if len(prediction.outputs) != 1:
            text = f"the answer has {len(prediction.outputs)} outputs ({known})"
            raise UsageError(text, hint=f"name it: {hint}")
        name = next(iter(prediction.outputs))
    if name not in prediction.outputs:
        raise UsageError(f"no output {name!r} in the answer", hint=f"it has: {known}")
    return name, prediction.outputs[name]


def _print(prediction: Prediction, ranked: _Ranks, *, values: bool) -> None:
    from tdxd.user.inputs import type_name

    for name, array in prediction.outputs.items():
        head = f"{name}: {type_name(array)} {list(array.shape)}"
        if name in ranked:
            print(head)
            for number, row in enumerate(ranked[name]):
                print(f"row {number}")
                for one in row:
                    label = f"  {one.label}" if one.label is not None else ""
                    print(f"  {one.score:<12.6g} {one.index:>5}{label}")
        elif values:
            print(f"{head}\n{array}")


def _as_json(prediction: Prediction, ranked: _Ranks, *, values: bool) -> dict[str, Any]:
    from tdxd.user.inputs import json_value, type_name

    outputs: dict[str, dict[str, Any]] = {}
    for name, array in prediction.outputs.items():
        outputs[name] = {"dtype": type_name(array), "shape": list(array.shape)}
        if values:
            outputs[name]["values"] = json_value(array)
        if name in ranked:
            outputs[name]["top"] = [
                [_without_none(dataclasses.asdict(one)) for one in row]
                for row in ranked[name]
            ]
    return {
        "model": prediction.model,
        "version": prediction.version,
        "signature": prediction.signature,
        "outputs": outputs,
    }


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _write_output(target: str, prediction: Prediction) -> None:
    import numpy as np

    name, separator, path = target.partition("=")
    wanted = name if separator else None
    name, array = _chosen(wanted, prediction, "--output NAME=FILE.npy")
    if array.dtype.kind == "O":
        text = f"output {name} holds strings, which a .npy file would have to pickle"
        raise DataError(text, hint="use --json")
    path = path if separator else target
    try:
        with open(path, "wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    except OSError as exc:
        raise HostError.of("write", path, exc) from exc


# --- show ---------------------------------------------------------------------


def _show(arguments: argparse.Namespace) -> int:
    from tdxd.user.endpoint import open_channel
    from tdxd.user.infer import fetch_signatures
    from tdxd.user.signature import input_specs, output_specs

    endpoint, model = endpoint_of(arguments), model_of(arguments)
    with open_channel(endpoint) as channel:
        signatures, version = fetch_signatures(channel, endpoint, model)
    shown = {
        name: {
            "inputs": input_specs(signatures[name]),
            "outputs": output_specs(signatures[name]),
        }
        for name in sorted(signatures)
        if not name.startswith("__")  # TensorFlow's own, which nobody calls
    }
    if arguments.json:
        made = {"model": model.name, "version": version, "signatures": _plain(shown)}
        print(json.dumps(made))
        return EX_OK
    print(f"model {model.name}, version {version}")
    for name, sides in shown.items():
        print(f"signature {name}")
        for side, specs in sides.items():
            for spec in specs.values():
                print(f"  {side[:-1]:<7} {spec.name}: {spec}")
    return EX_OK


def _plain(shown: dict[str, dict[str, dict[str, TensorSpec]]]) -> dict[str, Any]:
    from tdxd.core.tensors import dtype_name

    return {
        name: {
            side: {
                spec.name: {
                    "dtype": dtype_name(spec.dtype),
                    "shape": None if spec.shape is None else list(spec.shape),
                }
                for spec in specs.values()
            }
            for side, specs in sides.items()
        }
        for name, sides in shown.items()
    }
