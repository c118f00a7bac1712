"""What the numbers of a classifier's answer are called, and which are the greatest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tdxd.errors import DataError, HostError

__all__ = ["Ranked", "read_labels", "top_k"]

_HINT = "one label a line, or JSON: a list, or an object from the index to the label"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One class of an answer: its index, its score, its label if there are labels."""

    index: int
    score: float
    label: str | None = None


def read_labels(path: str) -> list[str]:
    """Read the classes' names in order: lines, or JSON as Keras has it, too.

    Raises: HostError, DataError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: not UTF-8 text", hint=_HINT) from exc
    labels = (
        _of_json(path, text) if path.endswith(".json") else text.rstrip().splitlines()
    )
    if not labels:
        raise DataError(f"{path}: no labels in it", hint=_HINT)
    return [label.strip() for label in labels]


def _of_json(path: str, text: str) -> list[str]:
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            value = [value[str(index)] for index in range(len(value))]
        # Keras' imagenet_class_index.json: {"0": ["n01440764", "tench"], …}
        labels = [one[-1] if isinstance(one, list) else one for one in value]
        if not all(isinstance(one, str) for one in labels):
            raise TypeError
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as exc:
        raise DataError(f"{path}: not a list of labels", hint=_HINT) from exc
    return labels


def top_k(
    name: str,
    scores: npt.NDArray[Any],
    count: int,
    labels: Sequence[str] | None = None,
) -> list[list[Ranked]]:
    """Return the `count` greatest scores of each row, greatest first; equal ones by index.

    `scores` is the output called `name`: [classes] or [rows, classes]. Nan comes last.

    Raises: DataError for any other shape or type, and if there are more or fewer labels.
    """
    if scores.ndim not in (1, 2) or scores.dtype.kind not in "fiuV":
        text = f"output {name} of shape {list(scores.shape)} is no list of scores"
        raise DataError(text, hint="[rows, classes] of numbers has a greatest one")
    rows = np.atleast_2d(scores)
    classes = rows.shape[1]
    if labels is not None and len(labels) != classes:
        text = (
            f"output {name} has {classes} classes, but there are {len(labels)} labels"
        )
        raise DataError(text, hint="the labels must be those of this very model")
    # In double, so that -x is right for unsigned ones; nan sorts to the end by itself.
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    return [
        [
            Ranked(
                index=int(index),
                score=float(row[index]),
                label=labels[index] if labels else None,
            )
            for index in indices
        ]
        for row, indices in zip(rows, order, strict=True)
    ]
