"""Somebody who writes to the key server's database, or puts an older one back.

They have the whole database file and the public half of the key-encryption key, and know this
source. They do not have the private half; where they have the store's whole directory as it once
was, they do not have the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import os
import sqlite3

import pytest

from tdxd.core import hpke
from tdxd.core.bundle import KeyBundle
from tdxd.core.keyrelease import TOKEN_KEY_BYTES
from tdxd.errors import (
    ConfigError,
    DataError,
    DeniedError,
    UnavailableError,
    UnreachableError,
)
from tdxd.owner.audit.checkpoint import read_checkpoint
from tdxd.owner.audit.checkpoint_export import Exports
from tdxd.owner.audit.config import AuditConfig
from tdxd.owner.audit.guard import check_for_serving, load_checkpoint, public_keys
from tdxd.owner.audit.hooks import denial_json
from tdxd.owner.audit.record import GENESIS, chain_hash, encode_record, parse_record
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.config import read_config
from tdxd.owner.server.signing_keys import read_signing_keys
from tdxd.owner.server.token_keys import wrap_token_key
from tdxd.owner.store.backup import make_backup
from tdxd.owner.store.schema import METADATA
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import Store
from tests.keyserver import opened_owner, policy_text

TIGHT = '["UpToDate"]'
LOOSE = '["UpToDate", "OutOfDate"]'


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


def database(owner):
    return owner.directory / "store.sqlite3"


def sql(owner, *statements):
    """Do what the attacker does: write past tdx-keyd, while the server runs."""
    with contextlib.closing(sqlite3.connect(database(owner))) as attacker, attacker:
        for statement, *values in statements:
            assert attacker.execute(statement, values).rowcount != 0


def rows(owner, query, *values):
    with contextlib.closing(sqlite3.connect(database(owner))) as attacker:
        return attacker.execute(query, values).fetchall()


def taken(owner, path):
    """Copy the whole database as it stands."""
    with (
        contextlib.closing(sqlite3.connect(database(owner))) as source,
        contextlib.closing(sqlite3.connect(path)) as target,
    ):
        source.backup(target)
    return path


def put_back(owner, path):
    """Put a copy of the whole database back, under a running server."""
    with (
        contextlib.closing(sqlite3.connect(path)) as source,
        contextlib.closing(sqlite3.connect(database(owner))) as target,
    ):
        source.backup(target)


def exports(owner, path):
    return Exports(
        owner.store,
        owner.directory,
        AuditConfig(checkpoint_file=str(path)),
        keys=lambda: [key.private for key in read_signing_keys(owner.directory)],
        deployment=bytes.fromhex(read_config(owner.directory).deployment),
    )


def checkpointed(owner, path):
    exports(owner, path).export(5)
    with (owner.directory / "keyd.toml").open("a") as config:
        config.write(f'[audit]\ncheckpoint_file = "{path}"\n')
    return path


def verified(owner, checkpoint=None):
    """What a later process finds, with all its memory gone."""
    config = read_config(owner.directory)
    made = checkpoint and load_checkpoint(checkpoint, public_keys(owner.directory))
    with Store.open(owner.directory) as store:
        return verify(store, made, deployment=bytes.fromhex(config.deployment)).troubles


def refused(owner):
    """Why a server that starts now refuses the store."""
    with (
        Store.open(owner.directory) as store,
        pytest.raises(StoreIntegrityError) as caught,
    ):
        check_for_serving(owner.directory, read_config(owner.directory), store)
    return caught.value


async def denied_by_the_store(owner, volume_id="v"):
    """The trouble that the audit log names for a denial."""
    got = (await owner.fetch(volume_id))[volume_id]
    assert isinstance(got, DeniedError)
    assert owner.last().reason == "store"
    return owner.failed()["secret"][1]


def tampered_with(owner, name):
    """The same is found by a request, by `audit verify` and by a server that starts."""
    assert any(name in text for text in verified(owner)), verified(owner)
    error = refused(owner)
    assert name in error.message
    assert "tdx-keyd audit verify" in error.hint


# --- rows ---------------------------------------------------------------------


async def test_policy_loosened_by_sql(owner):
    owner.add("v", tcb_status=TIGHT)
    loose = policy_text(owner.platform, tcb_status=LOOSE)
    sql(
        owner,
        ("UPDATE policies SET text = ?", loose),
        ("UPDATE seal SET revision = 99",),
    )
    got = (await owner.fetch("v"))["v"]
    assert isinstance(
        got, UnreachableError
    )  # the seal was touched, too: no answer at all
    sql(owner, ("UPDATE seal SET revision = 3",))
    name = "policy of volume 'v' version 1 was edited"
    tampered_with(owner, name)
    with Store.open(owner.directory) as fresh:
        assert name in fresh.sealed_volume("v").trouble


async def test_policy_loosened_by_sql_before_the_server_first_looks(owner):
    owner.add("v", tcb_status=TIGHT)
    loose = policy_text(owner.platform, tcb_status=LOOSE)
    sql(owner, ("UPDATE policies SET text = ?", loose))
    assert "policy of volume 'v' version 1 was edited" in await denied_by_the_store(
        owner
    )


async def test_older_policy_put_back_with_its_own_mac(owner):
    owner.add("v", tcb_status=LOOSE)
    old = rows(owner, "SELECT text, version, mac, set_at_s FROM policies")[0]
    owner.add("v", 2, tcb_status=TIGHT)
    sql(
        owner,
        ("UPDATE policies SET text = ?, version = ?, mac = ?, set_at_s = ?", *old),
    )
    assert "policy of volume 'v' is version 1, sealed is version 2" in (
        await denied_by_the_store(owner)
    )
    tampered_with(owner, "policy of volume 'v' is version 1, sealed is version 2")


async def test_policy_of_another_volume_put_in_its_place(owner):
    owner.add("loose", tcb_status=LOOSE)
    owner.add("v", tcb_status=TIGHT)
    other = rows(owner, "SELECT text, mac FROM policies WHERE volume_id = 'loose'")[0]
    sql(owner, ("UPDATE policies SET text = ?, mac = ? WHERE volume_id = 'v'", *other))
    assert "policy of volume 'v' version 1" in await denied_by_the_store(owner)
    assert isinstance((await owner.fetch("loose"))["loose"], KeyBundle)


async def test_policy_deleted(owner):
    owner.add("v")
    sql(owner, ("DELETE FROM policies",))
    assert "policy of volume 'v' is missing" in await denied_by_the_store(owner)
    tampered_with(owner, "policy of volume 'v' is missing")


async def test_policy_put_in_for_a_volume_without_one(owner):
    owner.add("v", policy=None)
    text = policy_text(owner.platform)
    forged = ("v", 1, text, 0, bytes(32))
    sql(owner, ("INSERT INTO policies VALUES (?, ?, ?, ?, ?)", *forged))
    assert "policy of volume 'v' version 1" in await denied_by_the_store(owner)


async def test_generation_swapped_between_volumes(owner):
    owner.add("a")
    owner.add("v")
    sql(
        owner,
        ("UPDATE generations SET volume_id = 'x' WHERE volume_id = 'a'",),
        ("UPDATE generations SET volume_id = 'a' WHERE volume_id = 'v'",),
        ("UPDATE generations SET volume_id = 'v' WHERE volume_id = 'x'",),
    )
    assert "volume 'v' generation 1 was edited" in await denied_by_the_store(owner)
    tampered_with(owner, "volume 'a' generation 1 was edited")


async def test_older_generation_made_current(owner):
    owner.add("v", 1)
    owner.add("v", 2)
    sql(owner, ("DELETE FROM generations WHERE generation = 2",))
    assert "volume 'v' generation 2 is missing" in await denied_by_the_store(owner)
    tampered_with(owner, "volume 'v' generation 2 is missing")


async def test_removed_generation_brought_back_with_its_own_mac(owner):
    owner.add("v", 1)
    owner.add("v", 2)
    leaked = rows(owner, "SELECT * FROM generations WHERE generation = 2")[0]
    with owner.store.transaction() as change:
        change.remove("v", 2, 7)
    marks = ", ".join("?" * len(leaked))
    sql(owner, (f"INSERT OR REPLACE INTO generations VALUES ({marks})", *leaked))
    assert "volume 'v' generation 2 is another row" in await denied_by_the_store(owner)
    tampered_with(owner, "volume 'v' generation 2 is another row")


async def test_manifest_of_a_known_generation_edited(owner):
    owner.add("v")
    sql(owner, ("UPDATE generations SET manifest_sha256 = ?", "ab" * 32))
    assert "volume 'v' generation 1 was edited" in await denied_by_the_store(owner)


async def test_honest_change_does_not_seal_what_was_put_in(owner):
    owner.add("v", tcb_status=TIGHT)
    owner.add("w")
    loose = policy_text(owner.platform, tcb_status=LOOSE)
    sql(owner, ("UPDATE policies SET text = ? WHERE volume_id = 'v'", loose))
    owner.add("w", 2)
    assert "policy of volume 'v' version 1 was edited" in await denied_by_the_store(
        owner
    )
    assert isinstance((await owner.fetch("w"))["w"], KeyBundle)
    sql(owner, ("UPDATE generations SET manifest_sha256 = '' WHERE volume_id = 'w'",))
    with (
        pytest.raises(StoreIntegrityError, match="'w' generation 1 is not what"),
        owner.store.transaction() as change,
    ):
        change.remove("w", None, 7)


def test_floors_lowered(owner):
    with owner.store.transaction() as change:
        change.raise_floors({"tcb-evaluation/r/F": 17})
    body = rows(owner, "SELECT body FROM state")[0][0]
    lowered = body.replace(b"tcb-evaluation/r/F\x11", b"tcb-evaluation/r/F\x10")
    assert lowered != body
    sql(owner, ("UPDATE state SET body = ?", lowered))
    with pytest.raises(StoreIntegrityError, match="collateral floors"):
        owner.store.floors()
    with (
        pytest.raises(StoreIntegrityError, match="collateral floors"),
        owner.store.transaction() as change,
    ):
        change.raise_floors({"tcb-evaluation/r/F": 16})
    tampered_with(owner, "collateral floors")
    digest = hashlib.sha256(lowered).digest()
    sql(owner, ("UPDATE seal SET state_sha256 = ?", digest))
    with pytest.raises(StoreIntegrityError, match="is not authentic"):
        owner.store.floors()


def test_token_key_of_their_own_put_in(owner):
    """The public half is enough to seal one: the row's MAC is what is missing."""
    public = (owner.directory / "kek.public").read_bytes()
    row = wrap_token_key(public, os.urandom(TOKEN_KEY_BYTES), 5)
    forged = (row.key_id, row.wrapped, row.made_at_s, bytes(32))
    sql(owner, ("INSERT INTO token_keys VALUES (?, ?, ?, ?)", *forged))
    with pytest.raises(StoreIntegrityError, match=f"token key {row.key_id.hex()}"):
        owner.store.token_keys()
    tampered_with(owner, f"token key {row.key_id.hex()}")


async def test_quota_row_deleted(owner):
    owner.add("v", release="[release]\nmax_per_hour = 1\n")
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
    sql(owner, ("DELETE FROM nonces",))
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)  # a stated residual
    assert any(
        "audit record 1: the release of volume 'v' is not counted" in text
        for text in verified(owner)
    )


# --- the seal and the state ---------------------------------------------------


async def test_policy_state_and_seal_put_back_together(owner):
    """Everything but the log as it was: the old seal then names an old end of the log."""
    owner.add("v", tcb_status=LOOSE)
    old = {
        table: rows(owner, f"SELECT * FROM {table}")
        for table in ("policies", "state", "seal")
    }
    owner.add("v", 2, tcb_status=TIGHT)
    await owner.fetch("v")
    newest = rows(owner, "SELECT * FROM generations WHERE generation = 2")[0]
    sql(owner, ("DELETE FROM generations WHERE generation = ?", newest[1]))
    for table, held in old.items():
        marks = ", ".join("?" * len(held[0]))
        sql(
            owner,
            *(
                (f"INSERT OR REPLACE INTO {table} VALUES ({marks})", *row)
                for row in held
            ),
        )
    got = (await owner.fetch("v"))["v"]
    assert isinstance(got, UnreachableError)  # the running server remembers
    tampered_with(owner, "audit record")
    assert any("put in after the sealed end" in text for text in verified(owner))


def test_two_seals(owner):
    columns = (
        "revision, seq, head, state_sha256, exported_revision, exported_seq, "
        "exported_at_s, mac"
    )
    sql(owner, (f"INSERT INTO seal SELECT 2, {columns} FROM seal",))
    with pytest.raises(StoreIntegrityError, match="no single seal: 2 rows"):
        owner.store.seal()


@pytest.mark.parametrize(
    "column", ["revision", "seq", "exported_revision", "exported_seq", "exported_at_s"]
)
@pytest.mark.parametrize("value", [-1, 77, "text", None])
def test_any_edit_of_the_seal(owner, column, value):
    if value is None:
        value = b"\x00"
    sql(owner, (f"UPDATE seal SET {column} = ?", value))
    with pytest.raises(StoreIntegrityError, match="not authentic"):
        owner.store.seal()


# --- the audit log ------------------------------------------------------------


@pytest.fixture
def logged(tmp_path_factory):
    """A store with twenty decisions and a checkpoint after twelve."""
    with opened_owner(tmp_path_factory.mktemp("logged")) as made:
        made.add("v")
        example = record_of(made)
        for count in range(20):
            with made.store.transaction() as change:
                change.record([example(count)])
            if count == 11:
                exports(made, made.directory.parent / "checkpoint").export(5)
        yield made


def record_of(_owner):
    from tests.owner.test_store import record

    def make(count):
        denied = count % 3 == 0
        return record(
            request_id=f"r{count}",
            decision="denied" if denied else "released",
            denial_id=f"d{count}" if denied else None,
        )

    return make


def point(owner):
    return owner.directory.parent / "checkpoint"


def edited(data, old=b"released", new=b"denied!!"):
    assert old in data
    return data.replace(old, new)


def rechained(owner, first, change):
    """Edit records from a number on, and compute every later hash anew, as the source shows."""
    log = rows(owner, "SELECT seq, record, hash FROM audit ORDER BY seq")
    before = GENESIS if first == 1 else log[first - 2][2]
    statements = []
    for seq, data, _ in log[first - 1 :]:
        made = change(seq, data)
        before = chain_hash(before, made)
        statements.append(
            ("UPDATE audit SET record = ?, hash = ? WHERE seq = ?", made, before, seq)
        )
    sql(owner, *statements)
    return before


def test_untouched_log_verifies(logged):
    assert verified(logged) == ()
    assert verified(logged, point(logged)) == ()


def test_audit_record_edited(logged):
    data = rows(logged, "SELECT record FROM audit WHERE seq = 5")[0][0]
    sql(logged, ("UPDATE audit SET record = ? WHERE seq = 5", edited(data)))
    assert "audit record 5 was edited" in verified(logged)[0]
    assert len(verified(logged)) == 1
    assert "audit record 5 was edited" in refused(logged).message


def test_audit_record_edited_and_its_hash_too(logged):
    data, _ = rows(logged, "SELECT record, hash FROM audit WHERE seq = 5")[0]
    before = rows(logged, "SELECT hash FROM audit WHERE seq = 4")[0][0]
    made = edited(data)
    update = "UPDATE audit SET record = ?, hash = ? WHERE seq = 5"
    sql(logged, (update, made, chain_hash(before, made)))
    assert "audit record 6 was edited, put in or moved" in verified(logged)[0]


def test_audit_log_recomputed_to_its_end(logged):
    head = rechained(logged, 5, lambda seq, data: edited(data) if seq == 5 else data)
    assert verified(logged) == (
        "audit record 20 is another one than the sealed end of the log",
    )
    sql(logged, ("UPDATE seal SET head = ?", head))
    assert "seal (revision" in verified(logged)[0]
    assert "not authentic" in refused(logged).message


def test_audit_log_recomputed_by_who_has_the_key_and_not_the_checkpoint(logged):
    rechained(logged, 5, lambda seq, data: edited(data) if seq == 5 else data)
    head = rows(logged, "SELECT hash FROM audit WHERE seq = 20")[0][0]
    with logged.store.transaction() as change:
        change._seal = dataclasses.replace(change.seal(), head=head)
    assert verified(logged) == ()
    (trouble,) = verified(logged, point(logged))
    assert "audit record 12 is another one than that of the checkpoint" in trouble


@pytest.mark.parametrize(
    ("first", "last", "named"),
    [
        (1, 1, "audit record 1 is missing"),
        (7, 7, "audit record 7 is missing"),
        (7, 9, "audit records 7 to 9 are missing"),
        (20, 20, "audit record 20 is missing: the log was cut at its end"),
        (13, 20, "audit records 13 to 20 are missing: the log was cut at its end"),
        (1, 20, "audit records 1 to 20 are missing: the log was cut at its end"),
    ],
)
def test_audit_records_deleted(logged, first, last, named):
    sql(logged, ("DELETE FROM audit WHERE seq BETWEEN ? AND ?", first, last))
    assert named in verified(logged)
    assert named in refused(logged).message
    assert named in verified(logged, point(logged))


def test_audit_tail_cut_and_seal_put_back(logged):
    """The end of the log and the seal of that time: whole, and behind the checkpoint."""
    seal = rows(logged, "SELECT * FROM seal")[0]
    path = logged.directory.parent / "newest"
    for count in range(3):
        with logged.store.transaction() as change:
            change.record([record_of(logged)(100 + count)])
    exports(logged, path).export(6)
    sql(
        logged,
        ("DELETE FROM audit WHERE seq > 20",),
        (f"INSERT OR REPLACE INTO seal VALUES ({', '.join('?' * len(seal))})", *seal),
    )
    assert verified(logged) == ()
    (trouble,) = verified(logged, path)
    assert trouble.startswith("the audit log ends at record 20, the checkpoint of ")
    assert trouble.endswith(" has 23")


def test_audit_record_put_in(logged):
    sql(
        logged,
        ("UPDATE audit SET seq = -seq WHERE seq > 7",),
        ("UPDATE audit SET seq = 1 - seq WHERE seq < 0",),
        ("INSERT INTO audit SELECT 8, record, hash, NULL FROM audit WHERE seq = 2",),
    )
    assert "audit record 8 was edited, put in or moved here" in verified(logged)[0]
    assert any(
        "21 to 21 were put in after the sealed end" in one for one in verified(logged)
    )


def test_audit_record_put_in_at_the_end(logged):
    head = rows(logged, "SELECT hash FROM audit WHERE seq = 20")[0][0]
    data = encode_record(record_of(logged)(7), 21)
    forged = (21, data, chain_hash(head, data), None)
    sql(logged, ("INSERT INTO audit VALUES (?, ?, ?, ?)", *forged))
    assert verified(logged) == (
        "audit records 21 to 21 were put in after the sealed end of the log",
    )


def test_audit_records_reordered(logged):
    sql(
        logged,
        ("UPDATE audit SET seq = 99 WHERE seq = 5",),
        ("UPDATE audit SET seq = 5 WHERE seq = 6",),
        ("UPDATE audit SET seq = 6 WHERE seq = 99",),
    )
    assert "audit record 5 was edited, put in or moved here" in verified(logged)[0]


def test_denial_hidden_from_the_list_of_denials(logged):
    sql(logged, ("UPDATE audit SET denial_id = NULL WHERE denial_id = 'd3'",))
    assert verified(logged) == (
        "audit record 4 stands under another number or denial id",
    )


def test_gap_that_claims_to_be_an_accepted_rollback(logged):
    """Only a record that the chain and the seal cover may explain missing numbers."""
    data = rows(logged, "SELECT record FROM audit WHERE seq = 9")[0][0]
    forged = encode_record(parse_record(data, source="it"), 9).replace(
        b"released", b"rollback"
    )
    sql(
        logged,
        ("DELETE FROM audit WHERE seq BETWEEN 5 AND 8",),
        ("UPDATE audit SET record = ? WHERE seq = 9", forged),
    )
    assert "audit records 5 to 8 are missing" in verified(logged)


# --- the whole database -------------------------------------------------------


async def test_older_database_put_back_under_a_running_server(owner, tmp_path):
    owner.add("v", tcb_status=LOOSE)
    old = taken(owner, tmp_path / "old")
    owner.add("v", 2, tcb_status=TIGHT)
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
    put_back(owner, old)
    got = (await owner.fetch("v"))["v"]
    assert isinstance(got, UnreachableError)


async def test_older_database_put_back_between_two_starts(owner, tmp_path):
    owner.add("v", tcb_status=LOOSE)
    with owner.store.transaction() as change:
        change.raise_floors({"tcb-evaluation/r/F": 16})
    await owner.fetch("v")
    old = taken(owner, tmp_path / "old")
    owner.add("v", 2, tcb_status=TIGHT)
    with owner.store.transaction() as change:
        change.raise_floors({"tcb-evaluation/r/F": 17})
    await owner.fetch("v")
    checkpoint = checkpointed(owner, tmp_path / "checkpoint")
    put_back(owner, old)
    assert verified(owner) == ()  # nothing inside the database can show it
    troubles = "\n".join(verified(owner, checkpoint))
    assert "the audit log ends at record 1, the checkpoint of" in troubles
    assert "the store is at revision" in troubles
    assert "policy of volume 'v' is version 1, the checkpoint has 2" in troubles
    assert "the newest generation of volume 'v' is 1, the checkpoint has 2" in troubles
    assert (
        "collateral floor tcb-evaluation/r/F is 16, the checkpoint has 17" in troubles
    )
    error = refused(owner)
    assert "is behind its newest checkpoint" in error.message
    assert "accept-rollback" in error.hint


async def test_two_histories_from_one_backup(owner, tmp_path):
    """A copy that went on alone is as long as the original, and no successor of it."""
    owner.add("v")
    await owner.fetch("v")
    old = taken(owner, tmp_path / "old")
    await owner.fetch("v")
    checkpoint = checkpointed(owner, tmp_path / "checkpoint")
    put_back(owner, old)
    with Store.open(owner.directory) as other, other.transaction() as change:
        change.record([record_of(owner)(1), record_of(owner)(2)])
    (trouble,) = verified(owner, checkpoint)
    assert "audit record 2 is another one than that of the checkpoint" in trouble


async def test_older_store_may_not_overwrite_the_newest_checkpoint(owner, tmp_path):
    owner.add("v")
    old = taken(owner, tmp_path / "old")
    await owner.fetch("v")
    checkpoint = checkpointed(owner, tmp_path / "checkpoint")
    kept = checkpoint.read_bytes()
    put_back(owner, old)
    with Store.open(owner.directory) as store:
        late = dataclasses.replace(owner, store=store)
        with pytest.raises(UnavailableError, match="checkpoint of audit record 1"):
            exports(late, checkpoint).export(9)
    assert checkpoint.read_bytes() == kept


def test_checkpoint_file_deleted(owner, tmp_path):
    owner.add("v")
    checkpoint = checkpointed(owner, tmp_path / "checkpoint")
    checkpoint.unlink()
    with (
        Store.open(owner.directory) as store,
        pytest.raises(ConfigError, match="is missing, but a checkpoint") as caught,
    ):
        check_for_serving(owner.directory, read_config(owner.directory), store)
    assert "tdx-keyd audit checkpoint" in caught.value.hint


def test_checkpoint_of_another_deployment(owner, tmp_path):
    (tmp_path / "other").mkdir()
    with opened_owner(tmp_path / "other") as other:
        checkpoint = checkpointed(other, tmp_path / "checkpoint")
    with pytest.raises(DataError, match="signed by the unknown key ed25519:"):
        verified(owner, checkpoint)


def test_checkpoint_of_another_deployment_under_the_same_key(owner, tmp_path):
    made = Exports(
        owner.store,
        owner.directory,
        AuditConfig(checkpoint_file=str(tmp_path / "checkpoint")),
        keys=lambda: [key.private for key in read_signing_keys(owner.directory)],
        deployment=bytes(16),
    )
    made.export(5)
    (trouble,) = verified(owner, tmp_path / "checkpoint")
    assert trouble == f"the checkpoint is of the deployment {bytes(16).hex()}"


async def test_two_histories_of_the_same_length_and_revision(owner, tmp_path):
    """Each copy got another policy under the same version."""
    owner.add("v")
    old = taken(owner, tmp_path / "old")
    with owner.store.transaction() as change:
        change.set_policy("v", policy_text(owner.platform, tcb_status=TIGHT), 9)
    checkpoint = checkpointed(owner, tmp_path / "checkpoint")
    put_back(owner, old)
    with Store.open(owner.directory) as other, other.transaction() as change:
        change.set_policy("v", policy_text(owner.platform, tcb_status=LOOSE), 9)
    (trouble,) = verified(owner, checkpoint)
    assert "is another one than that of the checkpoint" in trouble
    assert trouble.startswith("revision ")


def test_checkpoint_file_replaced_by_somebody_elses(owner, tmp_path):
    checkpoint = checkpointed(owner, tmp_path / "checkpoint")
    (tmp_path / "other").mkdir()
    with opened_owner(tmp_path / "other") as other:
        checkpoint.write_bytes(exports(other, tmp_path / "x").current(5)[2])
    error = refused(owner)
    assert "signed by the unknown key" in error.message
    checkpoint.write_bytes(b"junk")
    error = refused(owner)
    assert str(checkpoint) in error.message
    assert "tdx-keyd audit checkpoint" in error.hint


def test_checkpoint_beside_the_store_is_said_to_prove_little(owner, capfd):
    checkpointed(owner, owner.directory / "checkpoint")
    with Store.open(owner.directory) as store:
        check_for_serving(owner.directory, read_config(owner.directory), store)
    assert "checkpoint.beside_the_store" in "".join(capfd.readouterr())


def test_every_bit_of_a_checkpoint_counts(owner, tmp_path):
    owner.add("v")
    data = checkpointed(owner, tmp_path / "checkpoint").read_bytes()
    keys = public_keys(owner.directory)
    read_checkpoint(data, keys, source="it")
    for index in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[index] ^= 1 << bit
            with pytest.raises(DataError):
                read_checkpoint(bytes(flipped), keys, source="it")
    with pytest.raises(DataError):
        read_checkpoint(data + b"\x00", keys, source="it")
    with pytest.raises(DataError):
        read_checkpoint(data[:-1], keys, source="it")


def test_wrapped_secret_sealed_by_somebody_else(owner):
    """The public half lies about: what is sealed to it is not thereby the owner's."""
    owner.add("v")
    public = (owner.directory / "kek.public").read_bytes()
    key = hpke.parse_public_key(public)
    sealed = hpke.seal(b"anything", key, b"info")
    sql(owner, ("UPDATE generations SET wrapped = ?", sealed))
    tampered_with(owner, "volume 'v' generation 1 was edited")


# --- what a database can hold besides rows --------------------------------------


@pytest.mark.parametrize(
    ("kind", "statement"),
    [
        (
            "swallow",
            "CREATE TRIGGER t BEFORE INSERT ON audit BEGIN SELECT RAISE(IGNORE); END",
        ),
        (
            "undo",
            "CREATE TRIGGER t AFTER INSERT ON audit BEGIN DELETE FROM audit; END",
        ),
        (
            "keep the seal",
            "CREATE TRIGGER t BEFORE INSERT ON seal BEGIN SELECT RAISE(IGNORE); END",
        ),
        (
            "reset the quota",
            "CREATE TRIGGER t AFTER INSERT ON nonces BEGIN DELETE FROM nonces; END",
        ),
    ],
)
async def test_trigger_in_the_database(owner, kind, statement):
    owner.add("v", release="[release]\nmax_per_hour = 5\n")
    with contextlib.closing(sqlite3.connect(database(owner))) as attacker:
        attacker.execute(statement)
    got = (await owner.fetch("v"))["v"]
    if kind in {"swallow", "keep the seal"}:  # no record, no answer
        assert isinstance(got, UnreachableError)
        assert owner.store.audit() == ()
    tampered_with(owner, "trigger 't' of the database is none of tdx-keyd's")


def test_table_replaced_by_a_view(owner):
    with contextlib.closing(sqlite3.connect(database(owner))) as attacker:
        attacker.execute("ALTER TABLE audit RENAME TO hidden")
        attacker.execute("CREATE VIEW audit AS SELECT * FROM hidden WHERE seq > 5")
    tampered_with(owner, "table 'audit' of the database is not as tdx-keyd made it")


JUNK = (0, 1, -1, 2**62, 1.5, "text", "", b"blob", b"")


@pytest.mark.parametrize(
    "column",
    [
        f"{table.name}.{column.name}"
        for table in METADATA.sorted_tables
        for column in table.columns
        if table.name != "meta"
    ],
)
async def test_junk_in_any_column(owner, column, tmp_path):
    """Whatever a value is replaced by, it is found, and nothing crashes."""
    owner.add("v", release="[release]\nmax_per_hour = 9\n")
    owner.add("w", 2)
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
    good = taken(owner, tmp_path / "good")
    table, name = column.split(".")
    query = f"SELECT rowid, * FROM {table} ORDER BY rowid LIMIT 1"
    (kept,) = rows(owner, query)
    for junk in JUNK:
        with contextlib.closing(sqlite3.connect(database(owner))) as attacker:
            statement = f"UPDATE {table} SET {name} = ? WHERE rowid = ?"
            try:
                with attacker:
                    attacker.execute(statement, (junk, kept[0]))
            except sqlite3.IntegrityError:
                continue  # a rowid must be a number
        if rows(owner, query) != [kept]:
            assert verified(owner), (column, junk)
        put_back(owner, good)
    assert verified(owner) == ()


# --- secrets ------------------------------------------------------------------


async def test_no_secret_in_backup_checkpoint_or_hook(owner, tmp_path, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    bundle = owner.add("v")
    owner.add("w", simulated="false")
    await owner.fetch("v", "w")
    keys = {
        path.name: path.read_bytes()
        for path in owner.directory.iterdir()
        if path.name.endswith((".key", ".private"))
    }
    assert len(keys) >= 4
    backup = tmp_path / "backup"
    make_backup(owner.directory, backup, 5, with_keys=False)
    assert backup.stat().st_mode & 0o777 == 0o600
    checkpoint = checkpointed(owner, tmp_path / "checkpoint")
    denial = owner.store.audit(denied_only=True)[0]
    out, err = capfd.readouterr()
    shown = b"\0".join(
        (
            backup.read_bytes(),
            checkpoint.read_bytes(),
            denial_json(denial),
            repr(list(owner.store.audit_lines())).encode(),
            (out + err + caplog.text).encode(),
            repr(owner.store.key()).encode(),
        )
    )
    secret = bundle.secret.reveal()
    for needle in (secret[:16], *(key[-48:-16] for key in keys.values())):
        assert len(needle) >= 16
        assert needle not in shown
        assert needle.hex().encode() not in shown
