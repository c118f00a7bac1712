"""Backups: one tar file with a consistent copy of the database, the config and public files.

The copy is taken while servers write (SQLite's online backup). Key files go along only when asked
for: a backup with them is the store itself, and everybody who reads it has all secrets.
A checkpoint of the same moment goes along, so that a restored store is known to be whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from tdxd.errors import ConfigError, DataError, HostError
from tdxd.owner.audit.checkpoint import Checkpoint
from tdxd.owner.audit.guard import load_checkpoint, make_exports, public_keys
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.config import CONFIG_NAME, KeydConfig, read_config
from tdxd.owner.store.database import DATABASE_NAME, converted
from tdxd.owner.store.kek import PRIVATE_NAME
from tdxd.owner.store.rotation_lock import rotation_locked
from tdxd.owner.store.store import Store

__all__ = ["Restored", "make_backup", "restore_backup"]

_CHECKPOINT = "checkpoint"
_KEY_SUFFIXES = (".key", ".private")
_PUBLIC_SUFFIXES = (".pem", ".der", ".public")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SMALL_MAX_BYTES = 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_NEEDED = (_CHECKPOINT, DATABASE_NAME, CONFIG_NAME)
_KEYS_NEEDED = ("ca.key", "server.key", "signing.key", PRIVATE_NAME)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """What a backup held: `checkpoint` is of its moment, None where no key could check it.

    `missing` are key files that must be put beside it before it can serve.
    """

    records: int
    missing: tuple[str, ...]
    checkpoint: Checkpoint | None


def make_backup(
    directory: Path,
    file: Path,
    now_s: int,
    *,
    with_keys: bool,
    kek_file: Path | None = None,
) -> Checkpoint:
    """Write a backup, mode 0600; return the checkpoint of its moment. Never overwrites.

    Raises: StoreIntegrityError for a store that is not whole, ConfigError, HostError.
    """
    if os.path.lexists(file):
        raise ConfigError(f"{file} exists already", hint="name a new file")
    config = read_config(directory)
    with _beside(file) as work, rotation_locked(directory, exclusive=False):
        _copy_database(directory / DATABASE_NAME, work / DATABASE_NAME)
        with Store.open(work, kek_file or directory / PRIVATE_NAME) as copy:
            _, made, signed = make_exports(directory, config, copy).current(now_s)
        _fold(work / DATABASE_NAME)
        (work / _CHECKPOINT).write_bytes(signed)
        chosen = [work / _CHECKPOINT, work / DATABASE_NAME]
        chosen += _files(directory, config, with_keys=with_keys)
        archive = work / "archive"
        with _io("write", file), archive.open("xb") as out:
            os.fchmod(out.fileno(), 0o600)
            _write_tar(out, chosen, now_s)
            out.flush()
            os.fsync(out.fileno())
        with _io("create", file):
            os.link(archive, file)
    return made


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Make a private directory on the file system of a path, for as long as it is needed."""
    try:
        made = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    except OSError as exc:
        raise HostError.of("make directory beside", str(path), exc) from exc
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextlib.contextmanager
def _io(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise HostError.of(what, str(path), exc) from exc


def _copy_database(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ConfigError(
            f"{source.parent} is no key server store: {source.name} is missing"
        )
    with (
        converted(source),
        contextlib.closing(sqlite3.connect(source)) as one,
        contextlib.closing(sqlite3.connect(target)) as other,
    ):
        one.backup(other)
    target.chmod(0o600)


def _fold(path: Path) -> None:
    """Put everything into the one file of the database."""
    with converted(path), contextlib.closing(sqlite3.connect(path)) as sqlite:
        sqlite.execute("PRAGMA journal_mode = DELETE").fetchall()


def _files(directory: Path, config: KeydConfig, *, with_keys: bool) -> list[Path]:
    suffixes = (*_PUBLIC_SUFFIXES, *(_KEY_SUFFIXES if with_keys else ()))
    names = {CONFIG_NAME, *(root.file for root in config.root)}
    with _io("read", directory):
        names |= {name for name in os.listdir(directory) if name.endswith(suffixes)}
    return [
        directory / name
        for name in sorted(names)
        if _NAME.fullmatch(name) and (directory / name).is_file()
    ]


def _write_tar(out: IO[bytes], files: Sequence[Path], now_s: int) -> None:
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in files:
            with path.open("rb") as content:
                entry = tarfile.TarInfo(path.name)
                entry.size = os.fstat(content.fileno()).st_size
                entry.mtime = now_s
                entry.mode = _mode(path.name)
                archive.addfile(entry, content)


def _mode(name: str) -> int:
    public = name.endswith((*_PUBLIC_SUFFIXES, CONFIG_NAME))
    return 0o644 if public else 0o600


def restore_backup(
    file: Path, directory: Path, *, kek_file: Path | None = None
) -> Restored:
    """Make a store directory of a backup, and check it; the directory must be new or empty.

    Raises: DataError for a file that is no whole backup, StoreIntegrityError, ConfigError,
    HostError; the directory is then as it was.
    """
    if os.path.lexists(directory) and not _is_empty(directory):
        raise ConfigError(
            f"{directory} is not empty", hint="restore into a new directory"
        )
    with _io("read", file), file.open("rb") as archive, _beside(directory) as work:
        made = work / "store"
        made.mkdir(0o700)
        _unpack(archive, str(file), made)
        restored = _checked(made, kek_file)
        with _io("make", directory):
            os.replace(made, directory)
    return restored


def _is_empty(directory: Path) -> bool:
    with _io("read", directory):
        return directory.is_dir() and not os.listdir(directory)


def _unpack(archive: IO[bytes], source: str, directory: Path) -> None:
    """Write the members of a backup, which may be anybody's file: nothing but plain ones."""
    seen = set()
    try:
        with tarfile.open(fileobj=archive, mode="r:") as tar:
            for entry in tar:
                name = entry.name
                database = name == DATABASE_NAME
                fits = database or entry.size <= _SMALL_MAX_BYTES
                if (
                    not entry.isreg()
                    or not _NAME.fullmatch(name)
                    # SQLite would play a journal back, and remove files that it names.
                    or (name.startswith(DATABASE_NAME) and not database)
                    or name in seen
                    or not fits
                ):
                    raise DataError(f"{source}: member {name[:100]!r} is none of ours")
                seen.add(name)
                content = tar.extractfile(entry)
                _write(directory / name, content or io.BytesIO())
    except (tarfile.TarError, EOFError, ValueError) as exc:
        raise DataError(f"{source} is no backup: {exc}") from exc
    missing = [name for name in _NEEDED if name not in seen]
    if missing:
        raise DataError(f"{source} is no backup: {missing[0]} is missing")


def _write(path: Path, content: IO[bytes]) -> None:
    with path.open("xb") as out:
        os.fchmod(out.fileno(), _mode(path.name))
        shutil.copyfileobj(content, out, _CHUNK_BYTES)
        out.flush()
        os.fsync(out.fileno())


def _checked(directory: Path, kek_file: Path | None) -> Restored:
    """Check an unpacked store, as far as there are keys to do it with."""
    with (
        converted(directory / DATABASE_NAME),
        contextlib.closing(sqlite3.connect(directory / DATABASE_NAME)) as sqlite,
    ):
        (said,) = sqlite.execute("PRAGMA integrity_check(1)").fetchone()
    if said != "ok":
        raise DataError(f"the database of the backup is damaged: {said}")
    config = read_config(directory)
    missing = tuple(name for name in _KEYS_NEEDED if not (directory / name).exists())
    kek_file = kek_file or directory / PRIVATE_NAME
    checkpoint = None
    if "signing.key" not in missing:
        checkpoint = load_checkpoint(directory / _CHECKPOINT, public_keys(directory))
    with Store.open(directory, kek_file) as store:
        found = verify(
            store,
            checkpoint,
            deployment=bytes.fromhex(config.deployment),
            authenticated=kek_file.exists(),
        )
    if found.troubles:
        raise DataError(
            f"the backup is not whole: {found.troubles[0]}",
            hint="use an older backup; or, if tdx-keyd rotate-kek ran after it, name the "
            "key-encryption key of its time: --kek FILE",
        )
    (directory / _CHECKPOINT).unlink()
    return Restored(records=found.records, missing=missing, checkpoint=checkpoint)
