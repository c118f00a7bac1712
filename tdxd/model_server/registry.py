"""The versions of all models, their states, and which one answers a request.

Source of states and texts: tensorflow_serving/apis/get_model_status.proto,
model_servers/get_model_status_impl.cc, model_servers/server_core.cc.
"""

from __future__ import annotations

import dataclasses
import enum
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc

from tdxd.model_server.failure import RpcFailure

TYPE_CHECKING = False  # numpy takes time that --version does not have
if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
else:
    Array = Any

__all__ = ["Array", "Registry", "Runner", "Servable", "State", "VersionState"]

Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""Executes one signature: inputs by alias to outputs by alias."""


class State(enum.IntEnum):
    """`ModelVersionStatus.State`."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Servable:
    """A loaded model: its SignatureDef messages and what executes each of them."""

    signatures: Mapping[str, Any]
    runners: Mapping[str, Runner]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """One version of a model; `error_code` is 0 unless its load failed for good."""

    version: int
    state: State
    error_code: int = 0
    error_text: str = ""
    servable: Servable | None = None

    @property
    def failed(self) -> bool:
        """Whether the load failed for good."""
        return self.error_code != 0


class Registry:
    """All models known to the server; safe to use from any thread.

    `labels` maps each model to its version labels.
    """

    def __init__(self, labels: Mapping[str, Mapping[str, int]]) -> None:
        self._labels = dict(labels)
        self._lock = threading.Lock()
        self._models: dict[str, dict[int, VersionState]] = {name: {} for name in labels}

    def configure(self, labels: Mapping[str, Mapping[str, int]]) -> None:
        """Replace the models and their labels; what is known of versions stays."""
        with self._lock:
            self._labels = dict(labels)
            for name in labels:
                self._models.setdefault(name, {})

    def labels(self, model: str) -> Mapping[str, int]:
        """Return a model's version labels."""
        return self._labels.get(model, {})

    def knows(self, model: str) -> bool:
        """Say whether a model is configured."""
        return model in self._labels

    def put(self, model: str, state: VersionState) -> None:
        """Enter or replace the state of one version."""
        with self._lock:
            self._models[model][state.version] = state

    def forget(self, model: str, version: int) -> None:
        """Remove a version, as if it had never been seen."""
        with self._lock:
            self._models[model].pop(version, None)

    def versions(self, model: str) -> dict[int, VersionState]:
        """Return the versions of a model, the highest first; empty for an unknown one."""
        with self._lock:
            known = self._models.get(model, {})
            return {version: known[version] for version in sorted(known, reverse=True)}

    def available(self, model: str) -> tuple[int, ...]:
        """Return the versions that answer requests, the highest first."""
        return tuple(
            version
            for version, state in self.versions(model).items()
            if state.state is State.AVAILABLE
        )

    def resolve(self, spec: Any) -> tuple[int, Servable]:
        """Return the version and model that a ModelSpec message means.

        Raises: RpcFailure with TensorFlow Serving's codes and texts.
        """
        if not spec.name:
            text = "ModelSpec has no name specified."
            raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, text)
        wanted = self._wanted_version(spec)
        for version, state in self.versions(spec.name).items():
            fits = wanted is None or version == wanted
            if fits and state.state is State.AVAILABLE and state.servable is not None:
                return version, state.servable
        which = f"Latest({spec.name})"
        if wanted is not None:
            which = f"Specific({spec.name}, {wanted})"
        text = f"Servable not found for request: {which}"
        raise RpcFailure(grpc.StatusCode.NOT_FOUND, text)

    def _wanted_version(self, spec: Any) -> int | None:
        choice = spec.WhichOneof("version_choice")
        if choice == "version":
            number: int = spec.version.value
            return number
        if choice == "version_label":
            known = self._labels.get(spec.name, {})
            if spec.version_label not in known:
                text = f"Unrecognized servable version label: {spec.version_label}"
                raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, text)
            return known[spec.version_label]
        return None

    def status(self, spec: Any) -> tuple[VersionState, ...]:
        """Return the states that a ModelSpec message asks for; its label is ignored.

        Raises: RpcFailure, NOT_FOUND.
        """
        states = self.versions(spec.name)
        if spec.WhichOneof("version_choice") == "version":
            version = spec.version.value
            if version not in states:
                text = f"Could not find version {version} of model {spec.name}"
                raise RpcFailure(grpc.StatusCode.NOT_FOUND, text)
            return (states[version],)
        if not states:
            text = f"Could not find any versions of model {spec.name}"
            raise RpcFailure(grpc.StatusCode.NOT_FOUND, text)
        return tuple(states.values())
