"""The thread that loads models: looks at directories and the config file, and takes reloads.

Source of what a reload may do, and of its texts: tensorflow_serving/model_servers/server_core.cc
(ReloadConfig, UpdateModelVersionLabelMap), model_service_impl.cc. One thing differs: a new model
without a version is refused before anything changes; the original waits for it for ever, with every
later reload behind it.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.flags import StartError
from tdxd.model_server.health import Health
from tdxd.model_server.lifecycle import Lifecycle
from tdxd.model_server.model_config import ModelConfig, read_model_list
from tdxd.model_server.registry import Registry

__all__ = ["ConfigFile", "LoadLoop"]

_IDLE_S = 3600.0
_LOOK_S = 0.2
"""How often a reload that waits looks whether its caller still does."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """The file of models, read again every `poll_wait_s`; 0: only at the start.

    `text` is what it held at the start; `read` returns what it holds, `parse` the models in that;
    both raise StartError.
    """

    text: str
    poll_wait_s: int
    read: Callable[[], str]
    parse: Callable[[str], tuple[ModelConfig, ...]]


@dataclasses.dataclass(eq=False, slots=True)
class _Reload:
    """A reload on its way: `names` are the new models that it waits for, once it was taken."""

    models: tuple[ModelConfig, ...]
    names: frozenset[str] | None = None
    failure: RpcFailure | None = None
    done: threading.Event = dataclasses.field(default_factory=threading.Event)

    def end(self, failure: RpcFailure | None = None) -> None:
        self.failure = failure
        self.done.set()


class LoadLoop:
    """Keeps the lifecycle going; `run` belongs to one thread, all else to any.

    `spread_labels`: a label may name a version that is not there yet.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        registry: Registry,
        health: Health,
        *,
        poll_wait_s: int,
        spread_labels: bool,
        log: Callable[[str], None],
        config_file: ConfigFile | None = None,
    ) -> None:
        self._lifecycle, self._registry, self._health = lifecycle, registry, health
        self._poll_wait_s = poll_wait_s
        self._spread_labels = spread_labels
        self._log = log
        self._config_file = config_file
        self._config_text = config_file.text if config_file else ""
        self._turn = threading.Condition()
        self._asked: deque[_Reload] = deque()
        self._waiting: list[_Reload] = []
        self._stopped = False

    def stop(self) -> None:
        """Let `run` return when its step is done."""
        with self._turn:
            self._stopped = True
            self._turn.notify_all()

    def reload(self, config: Any, caller_waits: Callable[[], bool]) -> None:
        """Serve the models of a ModelServerConfig instead; return when new ones are available.

        Raises: RpcFailure.
        """
        if config.WhichOneof("config") != "model_config_list":
            raise RpcFailure(
                grpc.StatusCode.INVALID_ARGUMENT,
                "ServerModelConfig type not supported by HandleReloadConfigRequest. Only "
                "ModelConfigList is currently supported",
            )
        try:
            one = _Reload(read_model_list(config.model_config_list))
        except StartError as exc:
            code = grpc.StatusCode.INVALID_ARGUMENT
            raise RpcFailure(code, exc.message) from exc
        with self._turn:
            self._asked.append(one)
            self._turn.notify_all()
        while not one.done.wait(_LOOK_S):
            if not caller_waits() or self._stopped:
                raise RpcFailure(
                    grpc.StatusCode.CANCELLED, "nobody waits for this reload any more"
                )
        if one.failure:
            self._log(f"ReloadConfig failed: {one.failure.text}")
            raise one.failure

    def run(self, on_ready: Callable[[], None]) -> str:
        """Return why the server could not start, or nothing once told to stop."""
        ready = False
        now_s = time.monotonic()
        scan_s = now_s if self._poll_wait_s >= 0 else None
        read_s = self._next_read_s(now_s)
        while not self._stopped:
            now_s = time.monotonic()
            if read_s is not None and read_s <= now_s:
                self._read_again()
                read_s = self._next_read_s(now_s)
            scan = self._take_reloads() or (scan_s is not None and scan_s <= now_s)
            if scan:
                self._lifecycle.scan()
                scan_s = now_s + self._poll_wait_s if self._poll_wait_s > 0 else None
            self._lifecycle.step(now_s)
            self._answer_reloads()
            complete = self._lifecycle.complete()
            self._health.put(ready=complete)
            if not ready and complete:
                ready = True
                on_ready()
            if not ready and self._lifecycle.boot_failure():
                return self._lifecycle.boot_failure()
            self._rest([scan_s, read_s, self._lifecycle.next_due_s()])
        return ""

    def _rest(self, due: Sequence[float | None]) -> None:
        until_s = min(
            (when for when in due if when), default=time.monotonic() + _IDLE_S
        )
        with self._turn:
            if not (self._stopped or self._asked):
                self._turn.wait(max(until_s - time.monotonic(), 0.0))

    # --- reloads --------------------------------------------------------------

    def _take_reloads(self) -> bool:
        """Apply what was asked for; return whether the directories are to be looked at."""
        taken = False
        while self._asked:
            one = self._asked.popleft()
            try:
                one.names = self._apply(one.models)
            except RpcFailure as exc:
                one.end(exc)
                continue
            self._waiting.append(one)
            taken = True
        return taken

    def _apply(self, models: tuple[ModelConfig, ...]) -> frozenset[str]:
        """Change to these models; return the names of new ones.

        Raises: RpcFailure, and nothing has changed.
        """
        before = {model.name for model in self._lifecycle.models}
        for model in models:
            self._check_labels(model)
            missing = (
                "" if model.name in before else self._lifecycle.missing_versions(model)
            )
            if missing:
                raise RpcFailure(grpc.StatusCode.NOT_FOUND, missing)
        self._lifecycle.reconfigure(models)
        return frozenset(model.name for model in models) - before

    def _check_labels(self, model: ModelConfig) -> None:
        available = self._registry.available(model.name)
        for label, version in model.labels.items():
            old = self._registry.labels(model.name).get(label, version)
            spread = self._spread_labels and old == version
            if version not in available and not spread:
                raise RpcFailure(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    f"Request to assign label to version {version} of model {model.name}, "
                    "which is not currently available for inference",
                )

    def _answer_reloads(self) -> None:
        for one in list(self._waiting):
            names = one.names or frozenset()
            failed = self._lifecycle.failure(sorted(names), what="model(s)")
            if failed:
                one.end(RpcFailure(grpc.StatusCode.UNKNOWN, failed))
            elif all(self._registry.available(name) for name in names):
                one.end()
            else:
                continue
            self._waiting.remove(one)

    # --- the config file ------------------------------------------------------

    def _next_read_s(self, now_s: float) -> float | None:
        file = self._config_file
        return now_s + file.poll_wait_s if file and file.poll_wait_s > 0 else None

    def _read_again(self) -> None:
        assert self._config_file is not None
        try:
            text = self._config_file.read()
            if text == self._config_text:
                return
            self._config_text = text
            models = self._config_file.parse(text)
        except StartError as exc:
            self._log(f"the models stay as they are: {exc.message}")
            return
        self._asked.append(_Reload(models))
