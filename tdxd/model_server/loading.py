"""What happens to a version before it answers: it is loaded, checked, warmed up, made to batch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import grpc

from tdxd.model_server.batching import (
    BatchLimits,
    BatchScheduler,
    batchable,
    batched,
    parse_batching,
)
from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.flags import Flags, StartError
from tdxd.model_server.registry import Servable

__all__ = ["Loading", "read_file"]

_PER_MODEL_FILE = "batching_params.pbtxt"


class Loading:
    """Makes servables; the threads of batches, if there are any, are shared by all of them."""

    def __init__(self, flags: Flags, log: Callable[[str], None]) -> None:
        self._flags, self._log = flags, log
        self._limits = BatchLimits()
        self._scheduler: BatchScheduler | None = None
        if not flags.batching:
            return
        path = flags.batching_parameters_file
        if path:
            self._limits = parse_batching(
                read_file(path, "--batching_parameters_file"), source=path
            )
        self._scheduler = BatchScheduler(self._limits.threads)

    def load(self, path: str) -> Servable:
        """Load the version in a directory.

        Raises: RpcFailure.
        """
        from tdxd.model_server.loader import load_saved_model
        from tdxd.model_server.warmup import warm_up

        limits = self._limits_of(path)
        servable = load_saved_model(path, tags=self._flags.saved_model_tags)
        warm_up(servable, path, rounds=self._flags.warmup_rounds, log=self._log)
        if self._scheduler is None or limits is None:
            return servable
        runners = dict(servable.runners)
        for key, runner in servable.runners.items():
            if batchable(servable.signatures[key]):
                runners[key] = batched(runner, self._scheduler, limits, self._log)
        return dataclasses.replace(servable, runners=runners)

    def drain(self) -> None:
        """Let no request wait for others any more."""
        if self._scheduler is not None:
            self._scheduler.drain()

    def _limits_of(self, path: str) -> BatchLimits | None:
        """Return a model's limits; None if it has a file of its own to bring, and does not."""
        if not self._flags.batching_per_model:
            return self._limits
        own = os.path.join(path, _PER_MODEL_FILE)
        if not os.path.exists(own):
            return None
        try:
            return parse_batching(read_file(own, _PER_MODEL_FILE), source=own)
        except StartError as exc:
            raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, exc.message) from exc


def read_file(path: str, what: str) -> str:
    """Return a text file's content.

    Raises: StartError.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as exc:
        raise StartError(f"{what}: {exc}") from exc
