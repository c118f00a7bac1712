"""JSON bodies of the REST API: parsing within limits, and values as error texts show them.

Source of texts: tensorflow_serving/util/json_tensor.cc. What follows `JSON Parse error:` is this
parser's own.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

import grpc

from tdxd.model_server.failure import RpcFailure

__all__ = [
    "base64_bytes",
    "is_base64",
    "json_type",
    "lossy_refusal",
    "parse_body",
    "refusal",
    "shown",
    "signature_name",
]

_MAX_LISTS = 2_000_000
"""Lists and objects in a body: each costs 20 times its two bytes while it is read."""


def parse_body(body: bytes) -> dict[str, Any]:
    """Parse a request's body, a JSON object; NaN and Infinity are numbers.

    Raises: RpcFailure.
    """
    if not body:
        raise refusal("JSON Parse error: The document is empty")
    if body.count(b"[") + body.count(b"{") > _MAX_LISTS:
        raise refusal(f"JSON Parse error: more than {_MAX_LISTS} lists and objects")
    try:
        made = json.loads(body.decode())
    except UnicodeDecodeError as exc:
        raise refusal(
            f"JSON Parse error: Invalid encoding in string. at offset: {exc.start}"
        ) from exc
    except json.JSONDecodeError as exc:
        raise refusal(f"JSON Parse error: {exc.msg} at offset: {exc.pos}") from exc
    except (RecursionError, ValueError) as exc:
        raise refusal(f"JSON Parse error: {exc}") from exc
    if not isinstance(made, dict):
        raise refusal(f"JSON Value: {shown(made)} Is not object")
    return made


def signature_name(document: Mapping[str, Any]) -> str:
    """Return the signature that a request asks for; empty: the default one.

    Raises: RpcFailure.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise refusal(
            f"JSON Value: {shown(document)} not formatted correctly. 'signature_name' key "
            "must be a string value."
        )
    return name


def base64_bytes(item: dict[str, Any]) -> bytes:
    """Return what an object with the one key `b64` stands for.

    Raises: RpcFailure.
    """
    if not is_base64(item):
        raise refusal(
            f"JSON Value: {shown(item)} not formatted correctly for base64 data"
        )
    try:
        return base64.b64decode(item["b64"], validate=True)
    except (binascii.Error, ValueError) as exc:
        raise refusal("Unable to base64 decode") from exc


def is_base64(value: Any) -> bool:
    """Say whether a value stands for bytes."""
    return (
        isinstance(value, dict)
        and len(value) == 1
        and isinstance(value.get("b64"), str)
    )


def json_type(value: Any) -> str:
    """Return the name of a value's type."""
    if isinstance(value, bool):
        return str(value)
    names = {dict: "Object", list: "Array", str: "String", int: "Number"}
    return {**names, float: "Number"}.get(type(value), "Null")


def shown(value: Any) -> str:
    """Return a value as JSON, cut to what fits into an error's text."""
    # An object's first 1,024 characters are made of at most as many of its items.
    encoder = json.JSONEncoder(indent=4, ensure_ascii=False)
    text = ""
    for part in encoder.iterencode(value):
        text += part
        if len(text) > 1024:
            break
    return text


def refusal(text: str) -> RpcFailure:
    """Return the error of a request that means nothing."""
    return RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, text)


def lossy_refusal(value: Any, target: str) -> RpcFailure:
    """Return the error of a number that its type does not hold."""
    text = f"Cannot convert JSON value: {shown(value)} to {target} without loss"
    return refusal(f"{text} of precision.")
