"""Another key-encryption key for a store: all secrets wrapped anew, all rows and the seal remade.

The next key lies beside the old one before anything depends on it; one transaction puts the whole
store under it; then its file takes the old one's place, which destroys that. At every moment the
database says which of the two it needs (`Store.kek`), so a rotation that is cut short anywhere
leaves a store that serves, and running it again finishes it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from tdxd.core import hpke
from tdxd.core.check import Check
from tdxd.core.keyrelease import TOKEN_KEY_BYTES
from tdxd.core.secret import Secret
from tdxd.errors import HostError
from tdxd.owner.audit.guard import check_for_serving
from tdxd.owner.audit.record import AuditRecord
from tdxd.owner.files import replace_public, write_private
from tdxd.owner.server.config import read_config
from tdxd.owner.server.token_keys import open_token_key, wrap_token_key
from tdxd.owner.store.admin import export_change
from tdxd.owner.store.changes import Transaction
from tdxd.owner.store.kek import (
    PRIVATE_NAME,
    PUBLIC_NAME,
    Kek,
    next_path,
    read_kek,
    read_public,
    unwrap,
    wrap,
)
from tdxd.owner.store.rotation_lock import rotation_locked
from tdxd.owner.store.rows import GenerationRow, PolicyRow, Row, TokenKeyRow
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import Store

__all__ = ["KEK_ROTATED", "Rotated", "rotate_kek"]

KEK_ROTATED = "kek-rotated"
"""The `decision` of the record that a rotation leaves in the audit log."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rotated:
    """What a rotation did.

    `finished`: it only ended one that was cut short. `scrubbed`: no page of the database's files
    has a state under the old key any more; another process that reads all the time prevents it.
    """

    key_id: str
    finished: bool
    scrubbed: bool


def rotate_kek(
    directory: Path,
    now_s: int,
    random_bytes: Callable[[int], bytes],
    *,
    kek_file: Path | None = None,
) -> Rotated:
    """Make a new key-encryption key, or finish what an earlier call began.

    Raises: StoreIntegrityError for a store that is not whole, ConfigError, BusyError, HostError;
    UnavailableError if it is done and its checkpoint could not be exported.
    """
    path = Path(os.path.realpath(kek_file or directory / PRIVATE_NAME))
    with rotation_locked(directory, exclusive=True):
        with Store.open(directory, kek_file) as store:
            kek = store.kek()
            finished = kek.unfinished
            if not finished:
                check_for_serving(directory, read_config(directory), store)
                read_public(directory, kek)
                kek = _make_next(path, random_bytes)
                with store.transaction() as change:
                    _rewrap(change, store.kek(), kek, now_s)
                    # Who has the old key may know the token keys: the next one follows at once.
                    token_key = random_bytes(TOKEN_KEY_BYTES)
                    change.add_token_key(wrap_token_key(kek.public, token_key, now_s))
        # Opened again, this time by the next key: nothing is destroyed before it is seen to fit.
        with Store.open(directory, kek_file) as store:
            if store.kek().public != kek.public or not store.kek().unfinished:
                raise StoreIntegrityError(f"{directory} is not under its next key")
            store.seal()
            scrubbed = store.scrub()
        replace_public(directory / PUBLIC_NAME, kek.public)
        _take_its_place(path)
    export_change(directory, kek_file, now_s)
    return Rotated(key_id=kek.key_id, finished=finished, scrubbed=scrubbed)


# --- the files ----------------------------------------------------------------


def _make_next(path: Path, random_bytes: Callable[[int], bytes]) -> Kek:
    """Put the next key beside the old one, down to the disk, its owner's like the old one.

    One that lies there was made by a rotation that did not come to its transaction: nothing was
    ever sealed to it.
    """
    following = next_path(path)
    with _io("make", following):
        following.unlink(missing_ok=True)
    with Secret(random_bytes(hpke.SEED_BYTES)) as seed:
        write_private(following, seed.reveal())
    with _io("make", following):
        old, new = path.stat(), following.stat()
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.chown(following, old.st_uid, old.st_gid)
        _sync(following.parent)
    return read_kek(following)


def _take_its_place(path: Path) -> None:
    """Replace the old key by the next: whoever opens the file gets the one or the other."""
    with _io("replace", path):
        os.rename(next_path(path), path)
        _sync(path.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _io(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise HostError.of(what, str(path), exc) from exc


# --- the rows -----------------------------------------------------------------


def _rewrap(change: Transaction, old: Kek, new: Kek, now_s: int) -> None:
    """Put the whole store under another key.

    Raises: StoreIntegrityError for a row that is not as it was sealed, DataError for a secret that
    does not open.
    """
    rows = [_under(row, old, new) for row in change.rows()]
    change.remake(rows, new.store_key)
    change.record([_record(rows, old, new, now_s)])


def _under(row: Row, old: Kek, new: Kek) -> Row:
    """Return a row whose secret, if it has one, is wrapped under the new key."""
    if isinstance(row, PolicyRow):
        return row
    if isinstance(row, TokenKeyRow):
        return wrap_token_key(new.public, open_token_key(old, row), row.made_at_s)
    if row.removed_at_s:
        return row
    bundle = unwrap(old, row.wrapped, row.volume_id, row.generation)
    with bundle.secret:
        wrapped = wrap(new.public, bundle)
        again = unwrap(new, wrapped, row.volume_id, row.generation)
        with again.secret:  # a secret that was lost here would be lost for good
            assert again.manifest == bundle.manifest
            assert again.secret.matches(bundle.secret)
    return dataclasses.replace(row, wrapped=wrapped)


def _record(rows: list[Row], old: Kek, new: Kek, now_s: int) -> AuditRecord:
    secrets = [row for row in rows if isinstance(row, GenerationRow) and row.wrapped]
    tokens = [row for row in rows if isinstance(row, TokenKeyRow)]
    counts = {"generations": len(secrets), "token_keys": len(tokens)}
    return AuditRecord(
        at_s=now_s,
        request_id="",
        denial_id=None,
        volume_id="",
        generation=0,
        decision=KEK_ROTATED,
        reason="by the owner",
        peer="",
        simulated=False,
        policy_version=0,
        report_data="",
        checks=(
            Check(name="kek", expected=old.key_id, actual=new.key_id, ok=True),
            *(
                Check(name=name, expected=str(count), actual=str(count), ok=True)
                for name, count in counts.items()
            ),
        ),
    )
