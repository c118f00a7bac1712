"""Brings the loaded versions in line with the directories, one step at a time.

No clock, no threads, no TensorFlow: whoever steps it passes the time and brings the loader.
Source: aspired_versions_manager.cc, availability_preserving_policy.cc, loader_harness.cc.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

from tdxd.model_server.failure import RpcFailure, code_number
from tdxd.model_server.model_config import ModelConfig
from tdxd.model_server.registry import Registry, Servable, State, VersionState
from tdxd.model_server.versions import choose, index_versions

__all__ = ["Lifecycle", "RetryPolicy"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a load that failed is tried again, and after how long."""

    retries: int
    interval_s: float


@dataclasses.dataclass(slots=True)
class _Attempt:
    """A load that has not succeeded yet."""

    path: str
    failures: int = 0
    due_s: float = 0.0


class Lifecycle:
    """Loads new versions, then unloads old ones; a version that fails harms no other.

    `list_names` lists a directory and raises OSError; `load` raises RpcFailure.
    """

    def __init__(
        self,
        *,
        models: Sequence[ModelConfig],
        registry: Registry,
        retry: RetryPolicy,
        list_names: Callable[[str], list[str]],
        load: Callable[[str], Servable],
        log: Callable[[str], None],
    ) -> None:
        self._models = models
        self._registry = registry
        self._retry = retry
        self._list_names = list_names
        self._load = load
        self._log = log
        self._wanted: dict[str, tuple[int, ...]] = {}
        self._attempts: dict[tuple[str, int], _Attempt] = {}
        self._complaints: dict[str, str] = {}

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """The models to serve."""
        return tuple(self._models)

    def reconfigure(self, models: Sequence[ModelConfig]) -> None:
        """Serve these models instead, from the next look at the directories on."""
        kept = {model.name for model in models}
        for gone in {model.name for model in self._models} - kept:
            self._wanted[gone] = ()
            self._complaints.pop(gone, None)
            for version, seen in self._registry.versions(gone).items():
                self._attempts.pop((gone, version), None)
                if seen.state is State.LOADING:
                    self._registry.forget(gone, version)
        self._models = tuple(models)
        self._registry.configure({model.name: model.labels for model in models})

    def missing_versions(self, model: ModelConfig) -> str:
        """Return why nothing of a model could be loaded now; empty if there is a version."""
        try:
            found = index_versions(self._list_names(model.base_path))
        except OSError as exc:
            return _no_path(model, exc)
        return "" if found else _no_versions(model)

    def scan(self) -> None:
        """Look at the directories; note what is to be loaded, and forget failures that left."""
        for model in self._models:
            try:
                found = index_versions(self._list_names(model.base_path))
            except OSError as exc:
                # What was loaded goes on serving: the path may come back.
                self._complain(model.name, _no_path(model, exc))
                continue
            if found:
                self._complaints.pop(model.name, None)
            else:
                self._complain(model.name, _no_versions(model))
            self._want(model, found)

    def _want(self, model: ModelConfig, found: Mapping[int, str]) -> None:
        wanted = choose(model.policy, found)
        self._wanted[model.name] = wanted
        known = self._registry.versions(model.name)
        for version, seen in known.items():
            if version not in found and (seen.failed or seen.state is State.LOADING):
                self._attempts.pop((model.name, version), None)
                self._registry.forget(model.name, version)
        for version in wanted:
            state = known.get(version)
            ended = state and state.state is State.END and not state.failed
            if state is None or ended:
                path = f"{model.base_path}/{found[version]}"
                self._attempts[model.name, version] = _Attempt(path=path)
                self._enter(model.name, version, State.LOADING)

    def _complain(self, model: str, text: str) -> None:
        """Log what is wrong with a directory once, not in every poll."""
        if self._complaints.get(model) != text:
            self._complaints[model] = text
            self._log(text)

    def step(self, now_s: float) -> None:
        """Try the loads that are due, then unload what is no longer wanted."""
        for (model, version), attempt in list(self._attempts.items()):
            if attempt.due_s <= now_s:
                self._try_load(model, version, attempt, now_s)
        for model, wanted in self._wanted.items():
            available = self._registry.available(model)
            replaced = not wanted or any(version in wanted for version in available)
            for version in available:
                if replaced and version not in wanted:
                    self._enter(model, version, State.END)
                    self._log(f"Unloaded servable version {_id(model, version)}")

    def _try_load(
        self, model: str, version: int, attempt: _Attempt, now_s: float
    ) -> None:
        self._log(f"Loading servable: {_id(model, version)}")
        try:
            servable = self._load(attempt.path)
        except RpcFailure as exc:
            self._load_failed(model, version, attempt, exc, now_s)
            return
        del self._attempts[model, version]
        self._enter(model, version, State.AVAILABLE, servable=servable)
        self._log(f"Successfully loaded servable version {_id(model, version)}")

    def _load_failed(
        self,
        model: str,
        version: int,
        attempt: _Attempt,
        exc: RpcFailure,
        now_s: float,
    ) -> None:
        attempt.failures += 1
        self._log(f"Loading servable: {_id(model, version)} failed: {exc.text}")
        if attempt.failures <= self._retry.retries:
            attempt.due_s = now_s + self._retry.interval_s
            return
        del self._attempts[model, version]
        self._enter(
            model,
            version,
            State.END,
            error_code=code_number(exc.code),
            error_text=exc.text,
        )
        self._log(f"Servable {_id(model, version)} cannot be loaded: {exc.text}")

    def _enter(
        self,
        model: str,
        version: int,
        state: State,
        *,
        servable: Servable | None = None,
        error_code: int = 0,
        error_text: str = "",
    ) -> None:
        self._registry.put(
            model,
            VersionState(
                version=version,
                state=state,
                servable=servable,
                error_code=error_code,
                error_text=error_text,
            ),
        )

    def next_due_s(self) -> float | None:
        """Return when the next load is due; None if none is waiting."""
        return min((one.due_s for one in self._attempts.values()), default=None)

    def complete(self) -> bool:
        """Say whether every model has an available version."""
        return all(self._registry.available(model.name) for model in self._models)

    def boot_failure(self) -> str:
        """Return why the server cannot start, in TensorFlow Serving's words; empty if it can."""
        names = [model.name for model in self._models]
        return self.failure(names, what="servable(s)")

    def failure(self, names: Iterable[str], *, what: str) -> str:
        """Return which of these models have no available version and one that failed."""
        failed = [
            f"{{{_id(name, state.version)} due to error: {state.error_text}}}, "
            for name in names
            if not self._registry.available(name)
            for state in self._registry.versions(name).values()
            if state.failed
        ]
        if not failed:
            return ""
        return f"{len(failed)} {what} did not become available: {{{''.join(failed)}}}"


def _no_path(model: ModelConfig, exc: OSError) -> str:
    return (
        f"Could not find base path {model.base_path} for servable {model.name} with "
        f"error {exc.strerror}"
    )


def _no_versions(model: ModelConfig) -> str:
    return (
        f"No versions of servable {model.name} found under base path {model.base_path}. "
        "Did you forget to name your leaf directory as a number (eg. '/1/')?"
    )


def _id(model: str, version: int) -> str:
    return f"{{name: {model} version: {version}}}"
