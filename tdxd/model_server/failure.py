"""Why a call or a load failed: a gRPC status code and TensorFlow Serving's words."""

from __future__ import annotations

import grpc

__all__ = ["RpcFailure", "code_number", "truncated"]

_LIMIT = 1024


class RpcFailure(Exception):  # noqa: N818 - it is a status, and gRPC has an RpcError
    """A status other than OK, to be sent to the caller."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def code_number(code: grpc.StatusCode) -> int:
    """Return the number of a code, as `StatusProto.error_code` holds it."""
    number: int = code.value[0]
    return number


def truncated(text: str) -> str:
    """Cut a status text as TensorFlow Serving does: it travels in an HTTP/2 header."""
    return text if len(text) <= _LIMIT else text[:_LIMIT] + "...TRUNCATED"
