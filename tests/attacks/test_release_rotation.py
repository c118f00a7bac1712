"""Somebody who has an old key-encryption key, and writes to the database after it was rotated.

They have the old `kek.private`, every state of the database from before, and know this source.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sqlite3

import pytest

from tdxd.core.secret import Secret
from tdxd.errors import DataError
from tdxd.owner.audit.guard import check_for_serving
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.config import read_config
from tdxd.owner.server.token_keys import open_token_key
from tdxd.owner.store.changes import Transaction
from tdxd.owner.store.kek import create_kek, read_kek, unwrap, wrap
from tdxd.owner.store.rotation import rotate_kek
from tdxd.owner.store.rows import read_generations, read_policy, row_mac
from tdxd.owner.store.seal import SealedState, StoreIntegrityError, is_sealed_with
from tdxd.owner.store.store import Store
from tests.keyserver import make_bundle, opened_owner, policy_text

LOOSE = '["UpToDate", "OutOfDate"]'


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        made.add("v")
        made.add("w", 1)
        made.add("w", 2)
        yield made


@pytest.fixture
def old(owner, tmp_path):
    """The old key, and the store's directory as it was."""
    with owner.store.transaction() as change:
        change.remove("w", 1, 7)
    shutil.copytree(owner.directory, tmp_path / "old")
    kek = read_kek(owner.directory / "kek.private")
    owner.store.close()
    rotate_kek(owner.directory, 77, os.urandom)
    return kek


@contextlib.contextmanager
def raw(directory):
    path = directory / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as sqlite, sqlite:
        yield sqlite


def rows_of(directory):
    with Store.open(directory) as opened, opened.transaction() as change:
        return change.rows()


def refused(owner, kek_file=None):
    with (
        Store.open(owner.directory, kek_file) as opened,
        pytest.raises(StoreIntegrityError) as caught,
    ):
        check_for_serving(owner.directory, read_config(owner.directory), opened)
    return caught.value.message


def test_old_key_opens_no_secret_makes_no_mac_and_no_seal(owner, old, tmp_path):
    new = read_kek(owner.directory / "kek.private")
    rows = rows_of(owner.directory)
    kinds = {type(row).__name__ for row in rows}
    assert kinds == {"GenerationRow", "PolicyRow", "TokenKeyRow"}
    for row in rows:
        assert row_mac(old.store_key, row) != row.mac == row_mac(new.store_key, row)
        match type(row).__name__:
            case "GenerationRow" if row.wrapped:
                with pytest.raises(DataError, match="does not open with this key"):
                    unwrap(old, row.wrapped, row.volume_id, row.generation)
                unwrap(new, row.wrapped, row.volume_id, row.generation)
            case "TokenKeyRow":
                with pytest.raises(DataError, match="does not open with this key"):
                    open_token_key(old, row)
                open_token_key(new, row)
    with raw(owner.directory) as sqlite:
        assert not is_sealed_with(sqlite, old.store_key)
        assert is_sealed_with(sqlite, new.store_key)
    assert (owner.directory / "kek.public").read_bytes() == new.public != old.public


def test_nothing_under_the_old_key_is_left_in_the_files(owner, old, tmp_path):
    """Neither in freed pages nor in the write-ahead log: what the old key opens is gone."""
    ours = {path.name: path.read_bytes() for path in owner.directory.iterdir()}
    content = b"".join(ours.values())
    theirs = rows_of(tmp_path / "old")
    wrapped = [row.wrapped for row in theirs if getattr(row, "wrapped", b"")]
    assert len(wrapped) == 3
    for one in wrapped:
        for start in range(0, len(one) - 32, 32):
            assert one[start : start + 32] not in content
    for row in theirs:
        assert row.mac not in content
    seed = (tmp_path / "old" / "kek.private").read_bytes()
    assert seed not in content
    assert not any(name.startswith("kek.next") for name in ours)


async def test_new_token_key_since_the_old_ones_are_known(owner, old, tmp_path):
    known = {row.key_id for row in rows_of(tmp_path / "old") if hasattr(row, "key_id")}
    with Store.open(owner.directory) as opened:
        newest = {row.key_id for row in opened.token_keys()}
    assert known < newest


def test_rows_from_before_put_back_with_their_own_macs(owner, old, tmp_path):
    with raw(tmp_path / "old") as sqlite:
        was = sqlite.execute("SELECT * FROM generations").fetchall()
        policies = sqlite.execute("SELECT * FROM policies").fetchall()
    with raw(owner.directory) as sqlite:
        sqlite.executemany(
            "INSERT OR REPLACE INTO generations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", was
        )
    assert "volume 'v' generation 1 was edited" in refused(owner)
    with raw(owner.directory) as sqlite:
        sqlite.executemany(
            "INSERT OR REPLACE INTO policies VALUES (?, ?, ?, ?, ?)", policies
        )
    assert "policy of volume 'v' version 1 was edited" in refused(owner)


def test_policy_loosened_with_a_mac_and_a_seal_of_the_old_key(owner, old):
    """All that the old key could ever do to the database, done again."""
    text = policy_text(owner.platform, tcb_status=LOOSE)
    with raw(owner.directory) as sqlite:
        row = read_policy(sqlite, "v")
        assert row is not None
        row = dataclasses.replace(row, text=text)
        row = dataclasses.replace(row, mac=row_mac(old.store_key, row))
        sqlite.execute(
            "UPDATE policies SET text = ?, mac = ? WHERE volume_id = 'v'",
            (row.text, row.mac),
        )
    assert "policy of volume 'v' version 1 was edited" in refused(owner)
    with raw(owner.directory) as sqlite:
        sealed = SealedState(sqlite)
        seal = sealed.read(None)
        state = sealed.state(seal)
        state.policies["v"] = (row.version, row.mac)
        sealed.write(seal, state, old.store_key)
    assert "seal" in refused(owner)


def test_bundle_of_their_own_sealed_to_the_new_public_half(owner, old):
    """The public half is no secret: what they lack is the MAC."""
    public = (owner.directory / "kek.public").read_bytes()
    with raw(owner.directory) as sqlite:
        row = read_generations(sqlite, "v")[0]
        row = dataclasses.replace(row, wrapped=wrap(public, make_bundle("v")))
        mac = row_mac(old.store_key, row)
        sqlite.execute(
            "UPDATE generations SET wrapped = ?, mac = ? WHERE volume_id = 'v'",
            (row.wrapped, mac),
        )
    assert "volume 'v' generation 1 was edited" in refused(owner)


def test_whole_database_from_before_put_back(owner, old, tmp_path):
    """It is authentic under the old key, which is not the store's any more."""
    shutil.copy2(tmp_path / "old" / "store.sqlite3", owner.directory)
    for name in ("store.sqlite3-wal", "store.sqlite3-shm"):
        (owner.directory / name).unlink(missing_ok=True)
    assert "not authentic" in refused(owner)


def test_old_key_put_beside_the_new_one_as_if_it_came_next(owner, old, tmp_path):
    """The key lies elsewhere; who writes to the store's directory decides nothing about it."""
    vault = tmp_path / "vault"
    vault.mkdir()
    kek = (owner.directory / "kek.private").rename(vault / "kek.private")
    shutil.copy2(tmp_path / "old" / "store.sqlite3", owner.directory)
    for name in ("kek.private", "kek.next.private"):
        shutil.copy2(tmp_path / "old" / "kek.private", owner.directory / name)
    assert "not authentic" in refused(owner, kek)


def test_store_sealed_by_a_key_of_their_own_with_its_file_in_the_directory(
    owner, old, tmp_path
):
    vault = tmp_path / "vault"
    vault.mkdir()
    kek = (owner.directory / "kek.private").rename(vault / "kek.private")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    create_kek(theirs, Secret(os.urandom(96)))
    shutil.copy2(theirs / "kek.private", owner.directory / "kek.next.private")
    shutil.copy2(theirs / "kek.public", owner.directory / "kek.public")
    forged = read_kek(theirs / "kek.private")
    with Store.open(owner.directory, kek) as opened, opened.transaction() as change:
        assert isinstance(change, Transaction)
        change.remake(change.rows(), forged.store_key)
    assert "not authentic" in refused(owner, kek)


def test_new_key_opens_what_the_old_one_did(owner, old, tmp_path):
    deployment = bytes.fromhex(read_config(owner.directory).deployment)
    with Store.open(owner.directory) as opened:
        assert verify(opened, deployment=deployment).troubles == ()
        (row,) = opened.generations("v")
        got = unwrap(opened.kek(), row.wrapped, "v", 1)
    before = next(
        row for row in rows_of(tmp_path / "old") if getattr(row, "wrapped", b"")
    )
    assert got.secret.matches(unwrap(old, before.wrapped, "v", 1).secret)
