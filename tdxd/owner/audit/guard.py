"""What keeps a serving store honest: a check before it serves, checkpoints and hooks meanwhile."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import structlog

from tdxd.errors import ConfigError, DataError, HostError, TdxdError
from tdxd.owner.audit.checkpoint import (
    CHECKPOINT_MAX_BYTES,
    Checkpoint,
    read_checkpoint,
)
from tdxd.owner.audit.checkpoint_export import CheckpointExporter, Exports
from tdxd.owner.audit.config import AuditConfig
from tdxd.owner.audit.hooks import DenialHooks
from tdxd.owner.audit.verify import Verified, verify
from tdxd.owner.files import read_bytes
from tdxd.owner.server.config import KeydConfig, read_config
from tdxd.owner.server.signing_keys import read_signing_keys, retire_previous
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import Store

__all__ = [
    "behind_hint",
    "check_for_change",
    "check_for_serving",
    "export_after_change",
    "load_checkpoint",
    "make_exports",
    "opened_audit",
    "public_keys",
    "retire_signing_key",
]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@contextlib.contextmanager
def opened_audit(
    directory: Path,
    config: KeydConfig,
    store: Store,
    *,
    clock: Callable[[], float] = time.time,
) -> Iterator[DenialHooks]:
    """Check a store, then keep its checkpoints going; yields the hooks to tell denials to.

    Every worker process may do this: they export by turns.

    Raises: StoreIntegrityError for a store that must not serve, ConfigError, HostError.
    """
    check_for_serving(directory, config, store)
    exports = make_exports(directory, config, store)
    with (
        CheckpointExporter(exports, config.audit, clock),
        DenialHooks(config.audit) as hooks,
    ):
        yield hooks


def make_exports(directory: Path, config: KeydConfig, store: Store) -> Exports:
    """Make what exports the checkpoints of a store directory.

    Raises: ConfigError, HostError.
    """
    return Exports(
        store,
        directory,
        config.audit,
        keys=lambda: [key.private for key in read_signing_keys(directory)],
        deployment=bytes.fromhex(config.deployment),
    )


def public_keys(directory: Path) -> tuple[bytes, ...]:
    """Return the raw public halves of the signing keys of a store directory.

    Raises: ConfigError, HostError.
    """
    return tuple(
        key.private.public_key().public_bytes_raw()
        for key in read_signing_keys(directory)
    )


def load_checkpoint(path: Path, keys: Sequence[bytes]) -> Checkpoint:
    """Read a checkpoint file that one of the keys signed.

    Raises: DataError, ConfigError, HostError.
    """
    data = read_bytes(path, max_bytes=CHECKPOINT_MAX_BYTES)
    return read_checkpoint(data, keys, source=str(path))


def check_for_serving(directory: Path, config: KeydConfig, store: Store) -> None:
    """Refuse a store that is not as tdx-keyd left it, or behind its newest checkpoint.

    Raises: StoreIntegrityError, naming what is wrong and what to do; ConfigError, HostError.
    """
    found = _compared(directory, config, store)
    if found.troubles == found.behind:
        _refuse_behind(directory, config, found)
        return
    raise StoreIntegrityError(
        f"{directory}: {_first(found.troubles)}",
        hint=f"everything that is wrong: tdx-keyd audit verify {directory}; a backup made "
        "before it can be restored",
    )


def check_for_change(directory: Path, config: KeydConfig, store: Store) -> None:
    """Refuse to change a store behind its newest checkpoint: that would pass for progress.

    What else may be wrong with it keeps nobody from mending it.

    Raises: StoreIntegrityError, ConfigError, HostError.
    """
    _refuse_behind(directory, config, _compared(directory, config, store))


def _compared(directory: Path, config: KeydConfig, store: Store) -> Verified:
    return verify(
        store,
        _newest(directory, config.audit, store),
        deployment=bytes.fromhex(config.deployment),
        thorough=False,
    )


def _refuse_behind(directory: Path, config: KeydConfig, found: Verified) -> None:
    if found.behind:
        raise StoreIntegrityError(
            f"{directory} is behind its newest checkpoint: {_first(found.behind)}",
            hint=behind_hint(directory, config.audit.checkpoint_file),
        )


def _first(troubles: Sequence[str]) -> str:
    more = len(troubles) - 1
    return troubles[0] + (f", and {more} more" if more else "")


def behind_hint(directory: Path, checkpoint: Path | str | None) -> str:
    """Say how to go on with a store that is whole and older than a checkpoint."""
    return (
        "put the newest backup back; or give up what is lost: tdx-keyd audit "
        f"accept-rollback {directory} {checkpoint}"
    )


def _newest(directory: Path, config: AuditConfig, store: Store) -> Checkpoint | None:
    if config.checkpoint_file is None:
        return None
    path = Path(config.checkpoint_file)
    if path.is_relative_to(directory.resolve()):
        _log.warning(
            "checkpoint.beside_the_store",
            file=str(path),
            hint="who puts the whole directory back puts it back, too",
        )
    try:
        return load_checkpoint(path, public_keys(directory))
    except HostError as exc:
        if exc.errno != errno.ENOENT:
            raise
    except DataError as exc:
        raise StoreIntegrityError(
            exc.message, hint=exc.hint or _renew(directory, path)
        ) from exc
    seal = store.seal()
    if seal.exported_seq or seal.exported_revision:
        raise ConfigError(
            f"{path} is missing, but a checkpoint of audit record {seal.exported_seq} was "
            "exported",
            hint=_renew(directory, path),
        )
    return None


def _renew(directory: Path, path: Path) -> str:
    return (
        "put it back; or, if you know why it is gone and that the store is the newest, "
        f"make one: tdx-keyd audit checkpoint {directory} {path}"
    )


def export_after_change(directory: Path, kek_file: Path | None, now_s: int) -> None:
    """Export the checkpoint of a change that an owner just made, where that is configured.

    Raises: TdxdError; the change stands nevertheless, and a running server exports it.
    """
    config = read_config(directory)
    if config.audit.exports:
        with Store.open(directory, kek_file) as store:
            make_exports(directory, config, store).export(now_s)


def retire_signing_key(directory: Path, kek_file: Path | None, now_s: int) -> None:
    """Destroy the previous signing key; the checkpoint file is signed by the current one first.

    A file that is signed by no key of the store keeps it from serving.

    Raises: DataError if there is no previous key; ConfigError if the checkpoint cannot be signed
    anew, or the store could not serve with it: then the key is kept; HostError.
    """
    config = read_config(directory)
    roles = {key.role for key in read_signing_keys(directory)}
    if config.audit.checkpoint_file is None or "previous" not in roles:
        retire_previous(directory)
        return
    path = Path(config.audit.checkpoint_file)
    try:
        with Store.open(directory, kek_file) as store:
            check_for_serving(directory, config, store)
            exports = make_exports(directory, config, store)
            exports.write_current(path, now_s, then=lambda: retire_previous(directory))
    except TdxdError as exc:
        raise ConfigError(
            f"the previous signing key is kept: {exc.message}",
            hint=exc.hint
            or f"mend that: the current key must sign {path} first, or the store does not serve",
        ) from exc
