"""Somebody who writes to the database in ways that no row's MAC shows by itself.

They have what `test_release_store` gives them: the database file while the server runs, the public
half of the key-encryption key, and backups that they made themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sqlite3
import tarfile

import pytest

from tdxd.core import hpke
from tdxd.core.bundle import KeyBundle
from tdxd.core.secret import Secret
from tdxd.errors import ConfigError, DataError, UnreachableError
from tdxd.owner.audit.record import chain_hash
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.config import read_config
from tdxd.owner.server.token_keys import rotate_token_key
from tdxd.owner.store.admin import add_bundle
from tdxd.owner.store.backup import make_backup, restore_backup
from tdxd.owner.store.store import Store
from tests.keyserver import make_bundle, opened_owner


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


def attacker(owner):
    made = sqlite3.connect(owner.directory / "store.sqlite3", isolation_level=None)
    return contextlib.closing(made)


def verified(owner):
    config = read_config(owner.directory)
    with Store.open(owner.directory) as store:
        return verify(store, deployment=bytes.fromhex(config.deployment)).troubles


def rolled_back(sqlite, seal):
    """Take the newest audit record away, and put the seal back that stood before it."""
    sqlite.execute("BEGIN")
    sqlite.execute("DELETE FROM audit WHERE seq > ?", (seal[2],))
    marks = ", ".join("?" * len(seal))
    sqlite.execute(f"INSERT OR REPLACE INTO seal VALUES ({marks})", seal)
    sqlite.execute("COMMIT")


# --- values of another type, of the same bytes ----------------------------------


async def test_newest_generation_hidden_by_a_zero_of_another_type(owner):
    """A blob of eight zeros has the bytes of the number 0, and is no 0 to Python."""
    owner.add("v", 1)
    owner.add("v", 2)
    with attacker(owner) as sqlite:
        sqlite.execute(
            "UPDATE generations SET removed_at_s = ? WHERE generation = 2", (bytes(8),)
        )
    got = (await owner.fetch("v"))["v"]
    assert not isinstance(got, KeyBundle), got.manifest.generation
    assert owner.last().reason == "store"
    assert any("generation 2 was edited" in text for text in verified(owner))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE generations SET added_at_s = CAST(? AS BLOB)",
        "UPDATE generations SET manifest_sha256 = CAST(? AS BLOB)",
        "UPDATE policies SET text = CAST(text AS BLOB) WHERE ? IS NOT NULL",
    ],
)
async def test_value_of_another_type(owner, statement):
    owner.add("v")
    with attacker(owner) as sqlite:
        sqlite.execute(statement, (bytes(8),))
    await owner.fetch("v")
    assert owner.last().reason == "store"
    assert verified(owner)


# --- the log under a running server ---------------------------------------------


async def test_newest_release_taken_out_of_the_log_of_a_running_server(owner):
    """One record back, between two requests: the next record would take its number."""
    owner.add("v")
    await owner.fetch("v")
    with attacker(owner) as sqlite:
        (before,) = sqlite.execute("SELECT * FROM seal").fetchall()
        assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
        rolled_back(sqlite, before)
    assert isinstance((await owner.fetch("v"))["v"], UnreachableError)


async def test_newest_release_replaced_by_what_another_process_wrote(owner):
    """As above, and another worker has written a record under the number meanwhile."""
    owner.add("v")
    await owner.fetch("v")
    with attacker(owner) as sqlite, Store.open(owner.directory) as other:
        (before,) = sqlite.execute("SELECT * FROM seal").fetchall()
        assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
        newest = dataclasses.replace(owner.last(), peer="ipv4:192.0.2.7:7")
        rolled_back(sqlite, before)
        with other.transaction() as change:
            change.record([newest])
        assert isinstance((await owner.fetch("v"))["v"], UnreachableError)
        with other.transaction() as change:
            change.record([newest])
        assert isinstance((await owner.fetch("v"))["v"], UnreachableError)


async def test_newest_policy_taken_back_under_a_running_server(owner):
    owner.add("v")
    with attacker(owner) as sqlite:
        before = {
            name: sqlite.execute(f"SELECT * FROM {name}").fetchall()
            for name in ("seal", "state", "policies", "generations")
        }
        owner.add("v", 2)
        assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
        sqlite.execute("DELETE FROM audit")
        for name, held in before.items():
            sqlite.execute(f"DELETE FROM {name}")
            marks = ", ".join("?" * len(held[0]))
            sqlite.executemany(f"INSERT INTO {name} VALUES ({marks})", held)
    assert isinstance((await owner.fetch("v"))["v"], UnreachableError)


def broken_off(store, record):
    with store.transaction() as change:
        change.record([record])
        change.finish()
        raise ZeroDivisionError


async def test_transaction_that_failed_moves_no_mark(owner):
    owner.add("v")
    await owner.fetch("v")
    newest = owner.last()
    with pytest.raises(ZeroDivisionError):
        broken_off(owner.store, newest)
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
    assert verified(owner) == ()


async def test_record_that_is_none_put_after_the_end(owner):
    """The chain needs no key, so its form is nothing to rely on."""
    owner.add("v")
    await owner.fetch("v")
    with attacker(owner) as sqlite:
        ((seq, head),) = sqlite.execute("SELECT seq, head FROM seal").fetchall()
        junk = b"rollback"
        sqlite.execute(
            "INSERT INTO audit VALUES (?, ?, ?, NULL)",
            (seq + 1, junk, chain_hash(head, junk)),
        )
    troubles = "\n".join(verified(owner))
    assert f"audit record {seq + 1}: " in troubles
    assert "put in after the sealed end" in troubles


# --- the public half of the key-encryption key ------------------------------------


@pytest.fixture
def swapped(owner, tmp_path):
    """The attacker's own key pair, its public half in the place of the owner's."""
    pair = hpke.key_pair(Secret(b"\x05" * hpke.SEED_BYTES))
    (owner.directory / "kek.public").write_bytes(pair.public)
    return pair


def bundle_file(tmp_path):
    file = tmp_path / "new.bundle"
    file.write_bytes(make_bundle("v").encode())
    return file


def wrapped_now(owner, table):
    with attacker(owner) as sqlite:
        return {row[0] for row in sqlite.execute(f"SELECT wrapped FROM {table}")}


def test_bundle_is_sealed_to_no_key_but_the_owners(owner, swapped, tmp_path):
    with pytest.raises(ConfigError, match=r"kek\.public is not the public half"):
        add_bundle(owner.directory, bundle_file(tmp_path), None, 1)
    assert wrapped_now(owner, "generations") == set()


def test_token_key_is_sealed_to_no_key_but_the_owners(owner, swapped):
    before = wrapped_now(owner, "token_keys")
    with pytest.raises(ConfigError, match=r"kek\.public is not the public half"):
        rotate_token_key(owner.directory, owner.store, 10**9, lambda n: b"\x07" * n)
    assert wrapped_now(owner, "token_keys") == before


# --- backups --------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_backup_with_a_journal_of_its_own(owner, tmp_path, suffix):
    """SQLite would play it back, and delete the file that it names as its super-journal."""
    file = tmp_path / "backup"
    make_backup(owner.directory, file, 1, with_keys=True)
    with tarfile.open(file, "a") as tar:
        entry = tarfile.TarInfo(f"store.sqlite3{suffix}")
        entry.size = 4
        tar.addfile(entry, io.BytesIO(b"junk"))
    with pytest.raises(DataError, match="is none of ours"):
        restore_backup(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()
