"""The hostile model of the guest's volume, as a user on the other side of the network calls it."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
import pytest

from tdxd.host import tf_messages
from tdxd.user.infer import Model, decode_answer, encode_request

__all__ = ["Hostile"]


class Hostile:
    """The model, called from outside: the request says what it tries."""

    def __init__(self, channel: Any) -> None:
        self._predict = channel.unary_unary(tf_messages.PREDICT_METHOD)

    def start(self, signature: str, **inputs: object) -> Any:
        """Begin a call; return its future."""
        arrays = {
            name: np.array(value.encode(), dtype=object)
            if isinstance(value, str)
            else np.array(value, dtype=np.int32)
            for name, value in inputs.items()
        }
        model = Model(name="hostile", signature=signature)
        return self._predict.future(encode_request(model, arrays), timeout=60)

    def outputs(self, signature: str, **inputs: object) -> Any:
        return decode_answer(self.start(signature, **inputs).result()).outputs

    def refusal(self, signature: str, **inputs: object) -> str:
        """Return the code of a call that must fail."""
        with pytest.raises(grpc.RpcError) as caught:
            self.outputs(signature, **inputs)
        error: Any = caught.value
        return str(error.code().name)
