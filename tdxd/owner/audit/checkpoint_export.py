"""Sends checkpoints out of a store: to a file, a command and an address, in time and in order.

A failure does not stop releases; it is logged as an error, shown by `audit verify` (how far the
exported checkpoints lag behind) and tried again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tdxd.errors import HostError, TdxdError, UnavailableError
from tdxd.owner.audit.checkpoint import (
    CHECKPOINT_MAX_BYTES,
    Checkpoint,
    read_checkpoint,
)
from tdxd.owner.audit.config import AuditConfig
from tdxd.owner.audit.deliver import post, run_command
from tdxd.owner.files import read_bytes, replace_public
from tdxd.owner.store.seal import Seal
from tdxd.owner.store.store import Store

__all__ = ["CheckpointExporter", "Exports"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_LOOK_S = 1.0
_STOP_S = 10.0
_TYPE = "application/msgpack"


class Exports:
    """Exports checkpoints of one store, one process at a time."""

    def __init__(
        self,
        store: Store,
        directory: Path,
        config: AuditConfig,
        *,
        keys: Callable[[], Sequence[Ed25519PrivateKey]],
        deployment: bytes,
    ) -> None:
        """`keys` returns the signing keys of the moment, first the one that signs.

        They are asked for each time: another process may rotate them, and what a retired key
        signed would keep the store from serving. The others may have signed the file that is there.
        """
        self._keys = keys
        self._store = store
        self._directory = directory
        self._config = config
        self._deployment = deployment

    def current(self, now_s: int) -> tuple[Seal, Checkpoint, bytes]:
        """Make the checkpoint of this moment, and sign it.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        seal, state = self._store.sealed()
        made = Checkpoint.of(seal, state, deployment=self._deployment, now_s=now_s)
        return seal, made, made.sign(self._keys()[0])

    def pending(self) -> tuple[Seal, int]:
        """Return the seal and how many audit records no checkpoint covers.

        A change of the state without a record counts as `checkpoint_records`.

        Raises: StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        seal = self._store.seal()
        if seal.revision != seal.exported_revision:
            return seal, max(
                self._config.checkpoint_records, seal.seq - seal.exported_seq
            )
        return seal, seal.seq - seal.exported_seq

    def export(self, now_s: int) -> None:
        """Export the checkpoint of this moment to every target, if there is anything new.

        Raises: TdxdError; what could be told is told, and the next attempt tells all again.
        """
        with _locked(self._directory):
            if not self.pending()[1]:
                return
            seal, made, data = self.current(now_s)
            troubles = [text for text in self._send(made, data) if text]
            if troubles:
                raise UnavailableError(
                    f"checkpoint of audit record {seal.seq}: {'; '.join(troubles)}"
                )
            with self._store.transaction() as change:
                change.mark_exported(seal, now_s)

    def _send(self, made: Checkpoint, data: bytes) -> Iterator[str]:
        config = self._config
        if config.checkpoint_file is not None:
            path = Path(config.checkpoint_file)
            yield _tried(lambda: self._write(path, made, data))
        if config.checkpoint_command:
            argv = config.checkpoint_command
            yield _tried(lambda: run_command(argv, data, config.hook_timeout_s))
        url = config.checkpoint_url
        if url is not None:
            yield _tried(lambda: post(url, data, _TYPE, config.hook_timeout_s))

    def write_current(
        self, path: Path, now_s: int, *, then: Callable[[], None] = lambda: None
    ) -> Seal:
        """Write the checkpoint of this moment to a file, and do something before another export.

        Raises: UnavailableError if the file holds a newer one, DataError if it is none of this
        store's, StoreIntegrityError, ConfigError, BusyError, HostError.
        """
        with _locked(self._directory):
            seal, made, data = self.current(now_s)
            self._write(path, made, data)
            then()
        return seal

    def _write(self, path: Path, made: Checkpoint, data: bytes) -> None:
        """Replace a checkpoint file by a newer one, atomically."""
        if os.path.lexists(path):
            found = read_bytes(path, max_bytes=CHECKPOINT_MAX_BYTES)
            keys = [key.public_key().public_bytes_raw() for key in self._keys()]
            held = read_checkpoint(found, keys, source=str(path))
            if (made.seq, made.revision) < (held.seq, held.revision):
                raise UnavailableError(
                    f"{path} holds the checkpoint of audit record {held.seq}, revision "
                    f"{held.revision}; this store is at {made.seq}, {made.revision}",
                    hint="is the store an older copy? tdx-keyd audit verify",
                )
        replace_public(path, data)


class CheckpointExporter:
    """Exports in a thread of its own while a server runs, and once more at the end."""

    def __init__(
        self, exports: Exports, config: AuditConfig, clock: Callable[[], float]
    ) -> None:
        self._exports = exports
        self._config = config
        self._clock = clock
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints")
        self._thread.daemon = True
        self._pending_since_s: float | None = None
        self.trouble = ""
        """Why the last export failed; empty after one that did not."""

    def __enter__(self) -> Self:
        if self._config.exports:
            self._thread.start()
        else:
            _log.warning(
                "checkpoint.not_configured",
                hint="a restored backup of the whole store goes unnoticed: set "
                "[audit] checkpoint_file",
            )
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        if self._config.exports:
            self._thread.join(_STOP_S)
            self._export()

    def _run(self) -> None:
        retry_at_s = 0.0
        while not self._stop.wait(_LOOK_S):
            now_s = self._clock()
            if (not self.trouble or now_s >= retry_at_s) and self._due(now_s):
                self._export()
                retry_at_s = now_s + min(self._config.checkpoint_s, 60.0)

    def _due(self, now_s: float) -> bool:
        try:
            _, pending = self._exports.pending()
        except TdxdError as exc:
            self._failed(exc)
            return False
        if not pending:
            self._pending_since_s = None
            return False
        if self._pending_since_s is None:
            self._pending_since_s = now_s
        waited_s = now_s - self._pending_since_s
        late = not 0 <= waited_s < self._config.checkpoint_s
        return late or pending >= self._config.checkpoint_records

    def _export(self) -> None:
        try:
            self._exports.export(int(self._clock()))
        except TdxdError as exc:
            self._failed(exc)
        else:
            self.trouble = ""
            self._pending_since_s = None

    def _failed(self, exc: TdxdError) -> None:
        self.trouble = exc.message
        _log.error("checkpoint.export_failed", error=exc.message, hint=exc.hint)


def _tried(deliver: Callable[[], None]) -> str:
    """Deliver; return why that failed, or an empty text."""
    try:
        deliver()
    except TdxdError as exc:
        return exc.message
    return ""


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of all processes that export this store's checkpoints: on its directory."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise HostError.of("lock", str(directory), exc) from exc
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)  # held for some hook_timeout_s at most
        yield
    finally:
        os.close(fd)
