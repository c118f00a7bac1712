"""Loads a SavedModel in both ways that TensorFlow has; the text that an interpreter with it runs.

It may be another Python than ours, so nothing of this project is imported, and TensorFlow by name
only: it is not shipped along. Requests come as lines of JSON on standard input, answers go as lines
to what was standard output; what TensorFlow prints goes to standard error.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import sys
from typing import Any

TAGS = ["serve"]


class Checker:
    """Answers the requests; each method is one kind of them."""

    def __init__(self) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # guests have none
        self.tf: Any = importlib.import_module("tensorflow")
        self.np: Any = importlib.import_module("numpy")

    def hello(self) -> dict[str, Any]:
        """Say which TensorFlow this is."""
        return {"version": self.tf.__version__}

    def describe(self, path: str, tensors: list[str]) -> dict[str, Any]:
        """Return the type and shape of tensors in the graph of a SavedModel."""
        session, _ = self._session(path)
        found = {}
        for name in tensors:
            tensor = session.graph.get_tensor_by_name(name)
            known = tensor.shape.rank is not None
            found[name] = {
                "dtype": tensor.dtype.as_datatype_enum,
                "shape": tensor.shape.as_list() if known else None,
            }
        session.close()
        return {"tensors": found}

    def check(self, path: str, samples: dict[str, Any]) -> dict[str, Any]:
        """Load a SavedModel both ways and run each signature's sample; compare the answers.

        A sample is TensorProto messages in base64 by key, or null: load only. An answer is the
        greatest difference, or the output that differs, or why either loader could not run it.
        """
        functions = self.tf.saved_model.load(path, tags=TAGS).signatures
        session, signatures = self._session(path)
        answers: dict[str, Any] = {}
        for name, sample in samples.items():
            function, signature = functions[name], signatures[name]
            if sample is None:
                answers[name] = {}
                continue
            arrays = {key: self._array(text) for key, text in sample.items()}
            answers[name] = self._compare(function, session, signature, arrays)
        session.close()
        return {"signatures": answers}

    def _session(self, path: str) -> tuple[Any, Any]:
        """Load as TensorFlow Serving does; return the session and the signatures.

        The session's graph is not made the default: in it eager functions would not be eager.
        """
        v1 = self.tf.compat.v1
        session = v1.Session(graph=self.tf.Graph())
        loaded = v1.saved_model.load(session, TAGS, path)
        return session, loaded.signature_def

    def _array(self, text: str) -> Any:
        message = self.tf.make_tensor_proto(0)
        message.ParseFromString(base64.b64decode(text))
        return self.tf.make_ndarray(message)

    def _compare(
        self, function: Any, session: Any, signature: Any, arrays: dict[str, Any]
    ) -> dict[str, Any]:
        eager, why_eager = self._attempt(
            lambda: self._run_function(function, signature, arrays)
        )
        feeds = {signature.inputs[key].name: value for key, value in arrays.items()}
        fetches = {key: one.name for key, one in signature.outputs.items()}
        static, why_static = self._attempt(lambda: session.run(fetches, feeds))
        if eager is None or static is None:
            return {"eager": why_eager, "session": why_static}
        if set(eager) != set(static):
            return {"unequal": f"keys {sorted(eager)} and {sorted(static)}"}
        differences = [0.0]
        for key in static:
            difference = self._difference(eager[key], static[key])
            if difference is None:
                return {"unequal": key}
            differences.append(difference)
        return {"difference": max(differences)}

    def _attempt(self, call: Any) -> tuple[Any, str]:
        try:
            return call(), ""
        except (self.tf.errors.OpError, TypeError, ValueError) as exc:
            return None, str(exc).strip() or type(exc).__name__

    def _run_function(
        self, function: Any, signature: Any, arrays: dict[str, Any]
    ) -> Any:
        tensors = {
            key: self.tf.constant(value, dtype=signature.inputs[key].dtype)
            for key, value in arrays.items()
        }
        return {key: value.numpy() for key, value in function(**tensors).items()}

    def _difference(self, one: Any, other: Any) -> float | None:
        """Return the greatest difference, as a part of the greatest value; None if it is much."""
        one, other = self.np.asarray(one), self.np.asarray(other)
        if one.shape != other.shape or one.dtype != other.dtype:
            return None
        if self.np.array_equal(one, other):
            return 0.0
        part = 1e-4 if one.dtype.itemsize >= 4 else 1e-2
        if one.dtype.name == "bfloat16":  # no floating-point type in numpy's eyes
            one, other = one.astype("f4"), other.astype("f4")
        if not self.np.issubdtype(one.dtype, self.np.inexact):
            return None
        finite = other[self.np.isfinite(other)]
        scale = float(self.np.max(self.np.abs(finite), initial=0.0))
        if not self.np.allclose(
            one, other, rtol=part, atol=part * scale, equal_nan=True
        ):
            return None
        with self.np.errstate(invalid="ignore"):  # of infinities
            gaps = self.np.nan_to_num(self.np.abs(one - other))
        return float(self.np.max(gaps, initial=0.0)) / (scale or 1.0)


def main() -> int:
    """Answer until standard input ends."""
    if len(sys.argv) > 1:
        sys.path.insert(0, sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    checker: Checker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            checker = checker or Checker()
            answer = getattr(checker, request.pop("what"))(**request)
        except Exception as exc:  # noqa: BLE001 - TensorFlow has no error class of its own for loads
            answer = {"failed": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
