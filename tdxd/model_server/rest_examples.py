"""Classify and Regress requests of the REST API: JSON to tf.Example messages.

Source of forms and texts: tensorflow_serving/util/json_tensor.cc.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tdxd.model_server.json_values import (
    base64_bytes,
    is_base64,
    json_type,
    lossy_refusal,
    refusal,
    shown,
)

__all__ = ["fill_examples"]


def fill_examples(document: Mapping[str, Any], target: Any) -> None:
    """Fill an Input message from a Classify or Regress request.

    Raises: RpcFailure.
    """
    context = document.get("context")
    if "context" in document:
        _fill_example(context, target.example_list_with_context.context)
        target.example_list_with_context.context.SetInParent()
    if "examples" not in document:
        raise refusal(
            f"JSON Value: {shown(document)} When method is classify, key 'examples' is "
            "expected and was not found"
        )
    examples = document["examples"]
    if not isinstance(examples, list):
        text = "Expecting 'examples' value to be an list/array"
        raise refusal(f"JSON Value: {shown(document)} {text}")
    if not examples:
        raise refusal(
            f"JSON Value: {shown(document)} 'examples' value is an empty array"
        )
    listed = (
        target.example_list_with_context
        if "context" in document
        else target.example_list
    )
    for example in examples:
        _fill_example(example, listed.examples.add())


def _fill_example(value: Any, target: Any) -> None:
    if not isinstance(value, dict):
        raise refusal(f"Example must be JSON object but got JSON {json_type(value)}")
    for name, content in value.items():
        feature = target.features.feature[name]
        for item in content if isinstance(content, list) else [content]:
            _add_to_feature(item, name, feature)


def _add_to_feature(item: Any, name: str, feature: Any) -> None:
    kind, value = _feature_value(item, name)
    has = feature.WhichOneof("kind")
    if has not in (None, f"{kind}_list"):
        has_kind = has.removesuffix("_list")
        raise refusal(
            f"Unexpected element type in feature: {name} expecting type: {has_kind}"
        )
    getattr(feature, f"{kind}_list").value.append(value)


def _feature_value(item: Any, name: str) -> tuple[str, int | float | bytes]:
    if isinstance(item, bool | int):
        if not -(2**63) <= item < 2**63:
            text = f"Feature: {name} has uint64 element. Only int64 is supported."
            raise refusal(text)
        return "int64", int(item)
    if isinstance(item, float):
        if math.isfinite(item) and abs(item) > float(np.finfo(np.float32).max):
            raise lossy_refusal(item, "float")
        return "float", item
    if isinstance(item, str):
        return "bytes", item.encode("utf-8", "surrogatepass")
    if is_base64(item):
        return "bytes", base64_bytes(item)
    text = f"Feature: {name} has element with unexpected JSON type: {json_type(item)}"
    raise refusal(text)
