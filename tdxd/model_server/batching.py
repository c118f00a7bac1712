"""Merges concurrent requests into batches, executes each batch once, and shares out the answer.

As TensorFlow Serving's, but here no request pays for its neighbours: only requests whose tensors
fit together are merged, a signature that cannot be batched is executed request by request instead
of failing every one, and when a batch fails each of its requests is executed alone.

Source of parameters, limits and texts: tensorflow_serving/batching/batching_session.cc,
servables/tensorflow/session_bundle_config.proto, tensorflow/core/kernels/batching_util/
shared_batch_scheduler.h.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures

import grpc
import numpy as np

from tdxd.model_server.failure import RpcFailure
from tdxd.model_server.flags import StartError
from tdxd.model_server.registry import Array, Runner
from tdxd.model_server.small_messages import BatchingParameters

__all__ = [
    "BatchLimits",
    "BatchScheduler",
    "batchable",
    "batched",
    "parse_batching",
]

_KNOWN_POSITIVE = ("max_batch_size", "max_enqueued_batches", "num_batch_threads")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Of one model's batches: rows, waiting time, length of the queue, sizes that are padded to."""

    max_rows: int = 1000
    timeout_s: float = 0.0
    max_waiting: int = 10
    threads: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    sizes: tuple[int, ...] = ()

    def padded(self, rows: int) -> int:
        """Return the next allowed size."""
        return next((size for size in self.sizes if size >= rows), rows)


def parse_batching(text: str, *, source: str) -> BatchLimits:
    """Parse BatchingParameters in protobuf's text format.

    Raises: StartError.
    """
    from google.protobuf import text_format

    message = BatchingParameters()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as exc:
        raise StartError(f"{source}: {exc}") from exc
    given = {name: getattr(message, name).value for name in _KNOWN_POSITIVE}
    for name, value in given.items():
        if message.HasField(name) and value < 1:
            raise StartError(f"{source}: {name} is {value}, expected 1 or more")
    timeout_us = message.batch_timeout_micros.value
    if timeout_us < 0:
        raise StartError(f"{source}: batch_timeout_micros is {timeout_us}")
    if message.pad_variable_length_inputs:
        text = f"{source}: pad_variable_length_inputs is not supported"
        raise StartError(text, hint="pad in the model: padding changes its answers")
    usual = BatchLimits()
    limits = BatchLimits(
        max_rows=given["max_batch_size"] or usual.max_rows,
        timeout_s=timeout_us / 1e6,
        max_waiting=given["max_enqueued_batches"] or usual.max_waiting,
        threads=given["num_batch_threads"] or usual.threads,
        sizes=tuple(message.allowed_batch_sizes),
    )
    ascending = list(limits.sizes) == sorted(
        {size for size in limits.sizes if size > 0}
    )
    if limits.sizes and (not ascending or limits.sizes[-1] != limits.max_rows):
        raise StartError(
            f"{source}: allowed_batch_sizes are {list(limits.sizes)}; expected ascending, "
            f"the last equal to max_batch_size, {limits.max_rows}"
        )
    return limits


def batchable(signature: object) -> bool:
    """Say whether requests of a SignatureDef can be merged: rows in, as many rows out."""
    tensors = [*signature.inputs.values(), *signature.outputs.values()]  # type: ignore[attr-defined]
    return bool(tensors) and all(
        info.tensor_shape.unknown_rank
        or (info.tensor_shape.dim and info.tensor_shape.dim[0].size < 0)
        for info in tensors
    )


@dataclasses.dataclass(eq=False, slots=True)
class _Task:
    """One request that waits for its part of a batch's answer."""

    inputs: Mapping[str, Array]
    rows: int
    answer: futures.Future[Mapping[str, Array]] = dataclasses.field(
        default_factory=futures.Future
    )


@dataclasses.dataclass(eq=False, slots=True)
class _Batch:
    """Requests whose tensors fit together. `due_s`: when it runs though it is not full."""

    key: object
    run: Callable[[Sequence[_Task]], None]
    due_s: float
    max_rows: int
    tasks: list[_Task] = dataclasses.field(default_factory=list)
    rows: int = 0

    def add(self, task: _Task) -> None:
        self.tasks.append(task)
        self.rows += task.rows

    def ready(self, now_s: float) -> bool:
        return self.rows >= self.max_rows or self.due_s <= now_s


class BatchScheduler:
    """The threads that execute batches, shared by all models, and the batches that wait for one."""

    def __init__(self, threads: int) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Batch] = []
        self._draining = False
        for number in range(threads):
            name = f"batch_{number}"
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(
        self,
        key: tuple[object, object],
        task: _Task,
        run: Callable[[Sequence[_Task]], None],
        limits: BatchLimits,
    ) -> None:
        """Add a request to a batch of its `key`, whose first part is the queue that it counts for.

        Raises: RpcFailure, UNAVAILABLE if too many batches wait.
        """
        with self._changed:
            own = [batch for batch in self._waiting if batch.key == key]
            if own and own[-1].rows + task.rows <= limits.max_rows:
                own[-1].add(task)
            else:
                queued = sum(batch.key[0] is key[0] for batch in self._waiting)  # type: ignore[index]
                if queued >= limits.max_waiting:
                    text = "The batch scheduling queue to which this task was submitted"
                    raise RpcFailure(grpc.StatusCode.UNAVAILABLE, f"{text} is full")
                due_s = time.monotonic() + limits.timeout_s
                batch = _Batch(key, run, due_s, limits.max_rows)
                batch.add(task)
                self._waiting.append(batch)
            self._changed.notify()

    def drain(self) -> None:
        """Let no batch wait to become full any more."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            batch = self._next()
            try:
                batch.run(batch.tasks)
            except BaseException as exc:  # noqa: BLE001 - whatever it is, callers wait
                for task in batch.tasks:
                    if not task.answer.done():
                        task.answer.set_exception(exc)

    def _next(self) -> _Batch:
        with self._changed:
            while True:
                now_s = time.monotonic()
                for place, batch in enumerate(self._waiting):
                    if self._draining or batch.ready(now_s):
                        return self._waiting.pop(place)
                due_s = min((batch.due_s for batch in self._waiting), default=None)
                self._changed.wait(None if due_s is None else due_s - now_s)


def batched(
    runner: Runner,
    scheduler: BatchScheduler,
    limits: BatchLimits,
    log: Callable[[str], None],
) -> Runner:
    """Return a runner that answers as `runner` does, but merges what is asked at the same time.

    Raises (the runner): RpcFailure.
    """
    one = _Signature(runner, scheduler, limits, log)
    return one.answer


class _Signature:
    """One signature's batches; `mergeable` until an answer has other rows than asked for."""

    def __init__(
        self,
        runner: Runner,
        scheduler: BatchScheduler,
        limits: BatchLimits,
        log: Callable[[str], None],
    ) -> None:
        self._runner, self._scheduler = runner, scheduler
        self._limits, self._log = limits, log
        self._mergeable = True

    def answer(self, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        if not self._mergeable:
            return self._runner(inputs)
        rows = _rows(inputs)
        if rows > self._limits.max_rows:
            raise RpcFailure(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Task size {rows} is larger than maximum input batch size "
                f"{self._limits.max_rows}",
            )
        task = _Task(inputs, rows)
        kinds = tuple(
            (name, array.dtype.str, array.shape[1:])
            for name, array in sorted(inputs.items())
        )
        self._scheduler.submit((self, kinds), task, self._run, self._limits)
        return task.answer.result()

    def _run(self, tasks: Sequence[_Task]) -> None:
        parts = self._merged(tasks)
        for number, task in enumerate(tasks):
            if parts is not None:
                task.answer.set_result(parts[number])
                continue
            try:
                task.answer.set_result(self._runner(task.inputs))
            except RpcFailure as exc:
                task.answer.set_exception(exc)

    def _merged(self, tasks: Sequence[_Task]) -> list[Mapping[str, Array]] | None:
        """Return each request's part of one answer; None if it takes an execution for each."""
        rows = sum(task.rows for task in tasks)
        padding = self._limits.padded(rows) - rows
        if not rows or (len(tasks) == 1 and not padding) or not self._mergeable:
            return None
        inputs = {name: _joined(tasks, name, padding) for name in tasks[0].inputs}
        try:
            outputs = self._runner(inputs)
        except RpcFailure:
            return (
                None  # one of them is at fault: alone, each gets an answer of its own
            )
        for name, array in outputs.items():
            if array.ndim == 0 or array.shape[0] != rows + padding:
                self._mergeable = False
                self._log(
                    f"No batching from here on: output {name} of a batch of {rows + padding} "
                    f"has the shape {list(array.shape)}"
                )
                return None
        ends = np.cumsum([task.rows for task in tasks]).tolist()
        return [
            {name: array[end - task.rows : end] for name, array in outputs.items()}
            for task, end in zip(tasks, ends, strict=True)
        ]


def _rows(inputs: Mapping[str, Array]) -> int:
    sizes = {array.shape[0] if array.ndim else None for array in inputs.values()}
    if None in sizes:
        text = "Batching Run() input tensors must have at least one dimension"
        raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, text)
    if len(sizes) != 1:
        text = "Batching Run() input tensors must have equal 0th-dimension size"
        raise RpcFailure(grpc.StatusCode.INVALID_ARGUMENT, text)
    return int(sizes.pop() or 0)


def _joined(tasks: Sequence[_Task], name: str, padding: int) -> Array:
    arrays = [task.inputs[name] for task in tasks]
    if padding:
        # A row of a real request: whatever the model takes, it takes this.
        first = next(array for array in arrays if array.shape[0])[:1]
        arrays.append(np.repeat(first, padding, axis=0))
    joined: Array = np.concatenate(arrays)
    return joined
