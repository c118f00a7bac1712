"""Tells a command or an address of each denial, from a thread of its own.

A hook never delays or fails an answer: denials wait in a queue of bounded length, and what does not
fit is dropped and counted in the log. The audit log has them all.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable
from typing import Self

import structlog

from tdxd.errors import TdxdError
from tdxd.owner.audit.config import AuditConfig
from tdxd.owner.audit.deliver import post, run_command
from tdxd.owner.audit.record import AuditRecord

__all__ = ["DenialHooks", "denial_json"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_QUEUE_MAX = 256
_STOP_S = 5.0
_JSON = "application/json"


def denial_json(record: AuditRecord) -> bytes:
    """Return what a hook is told of one denial: JSON, one object, the failed checks only."""
    told = {
        "event": "key.denied",
        "at_s": record.at_s,
        "volume": record.volume_id,
        "reason": record.reason,
        "denial_id": record.denial_id,
        "request_id": record.request_id,
        "peer": record.peer,
        "simulated": record.simulated,
        "policy_version": record.policy_version,
        "failed": [
            {"name": one.name, "expected": one.expected, "actual": one.actual}
            for one in record.checks
            if not one.ok
        ],
    }
    return json.dumps(told).encode() + b"\n"


class DenialHooks:
    """The hooks of a running server; a context: the thread ends with it."""

    def __init__(self, config: AuditConfig) -> None:
        self._config = config
        self._waiting: queue.Queue[AuditRecord | None] = queue.Queue(_QUEUE_MAX)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="hooks", daemon=True)

    def __enter__(self) -> Self:
        if self._config.hooks:
            self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._config.hooks:
            return
        try:
            self._waiting.put(None, timeout=_STOP_S)
        except queue.Full:
            _log.warning("hook.dropped", count=self._waiting.qsize())
        self._thread.join(_STOP_S)

    def tell(self, records: Iterable[AuditRecord]) -> None:
        """Queue the denials among some records; returns at once, raises nothing."""
        if not self._config.hooks:
            return
        for record in records:
            if record.denial_id is None:
                continue
            try:
                self._waiting.put_nowait(record)
            except queue.Full:
                self._dropped += 1

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                _log.warning("hook.dropped", count=dropped)
            try:
                self._deliver(denial_json(record))
            except TdxdError as exc:
                _log.error("hook.failed", denial=record.denial_id, error=exc.message)

    def _deliver(self, data: bytes) -> None:
        config = self._config
        try:
            if config.on_denial_command:
                run_command(config.on_denial_command, data, config.hook_timeout_s)
        finally:
            if config.on_denial_url is not None:
                post(config.on_denial_url, data, _JSON, config.hook_timeout_s)
