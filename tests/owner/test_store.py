"""The store: volumes, policies, quota, audit; all or nothing."""

from __future__ import annotations

import dataclasses
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tdxd.core.check import Check
from tdxd.core.secret import Secret
from tdxd.errors import BusyError, ConfigError, DataError, HostError
from tdxd.owner.store import database as store_database
from tdxd.owner.store.kek import create_kek
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import AuditRecord, GenerationRow, Store, TokenKeyRow


@pytest.fixture
def store(tmp_path):
    create_kek(tmp_path, Secret(bytes(range(96))))
    with Store.create(tmp_path) as made:
        yield made


def generation(number=1, volume_id="v"):
    return GenerationRow(
        volume_id=volume_id,
        generation=number,
        wrapped=b"wrapped",
        manifest_sha256="00" * 32,
        added_at_s=5,
    )


def record(**changes):
    fields = {
        "at_s": 5,
        "request_id": "r",
        "denial_id": None,
        "volume_id": "v",
        "generation": 1,
        "decision": "released",
        "reason": "",
        "peer": "ipv4:127.0.0.1:1",
        "simulated": True,
        "policy_version": 2,
        "report_data": "ab",
        "checks": (
            Check(name="a", expected="x", actual="x", ok=True),
            Check(name="b", expected="x", actual="y", ok=False),
            Check(name="c", expected="same", actual="same", ok=False),
        ),
    }
    return AuditRecord(**{**fields, **changes})


def test_new_store_is_empty_and_private(tmp_path, store):
    assert store.volume_ids() == ()
    assert store.policy("v") is None
    assert store.audit() == ()
    mode = (tmp_path / "store.sqlite3").stat().st_mode
    assert stat.S_IMODE(mode) == 0o600


def test_store_is_never_made_twice(tmp_path, store):
    with pytest.raises(ConfigError, match="exists already"):
        Store.create(tmp_path)


def test_opening_nothing_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="is no key server store") as caught:
        Store.open(tmp_path)
    assert "tdx-keyd init" in caught.value.hint


@pytest.mark.parametrize(("version", "hint"), [(1, "tdx-keyd init"), (5, "newer")])
def test_other_schema_is_refused(tmp_path, store, version, hint):
    """A store of a newer program is whole: nobody must be told to throw it away."""
    with store.transaction() as change:
        change.set_meta("schema", version)
    with pytest.raises(ConfigError, match=f"schema version {version}, not 4") as caught:
        Store.open(tmp_path)
    assert hint in caught.value.hint
    assert ("init" in caught.value.hint) == (version < 3)


def test_file_that_is_no_database(tmp_path):
    (tmp_path / "store.sqlite3").write_bytes(b"not a database at all" * 100)
    with pytest.raises(HostError) as caught:
        Store.open(tmp_path)
    assert "not a database" in caught.value.hint


def test_generations_are_sorted_and_unique(store):
    with store.transaction() as change:
        for number in (3, 1, 2):
            change.add_generation(generation(number))
    assert [row.generation for row in store.generations("v")] == [1, 2, 3]
    with (
        pytest.raises(DataError, match="generation 2 is in the store"),
        store.transaction() as change,
    ):
        change.add_generation(generation(2))


def test_failed_transaction_leaves_nothing(store):
    def fail_halfway():
        with store.transaction() as change:
            change.add_generation(generation())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert store.volume_ids() == ()
    with store.transaction() as change:
        change.add_generation(generation())
    assert store.volume_ids() == ("v",)


def test_policy_version_counts_up_and_survives_removal(store):
    with store.transaction() as change:
        change.add_generation(generation())
        assert change.set_policy("v", "one", 1) == 1
        assert change.set_policy("v", "two", 2) == 2
    with store.transaction() as change:
        assert change.remove("v", None, 9) == 1
        assert change.set_policy("v", "three", 3) == 3
    assert store.volume_ids() == ()
    policy = store.policy("v")
    assert policy is not None
    assert (policy.text, policy.version) == ("three", 3)


def test_one_generation_is_removed(store):
    with store.transaction() as change:
        change.add_generation(generation(1))
        change.add_generation(generation(2))
    with store.transaction() as change:
        assert change.remove("v", 2, 9) == 1
        assert change.remove("v", 9, 9) == 0
    assert [row.generation for row in store.generations("v")] == [1]
    assert store.volume_ids() == ("v",)


def test_every_change_grows_the_revision(store):
    seen = [store.seal().revision]
    for change_with in (
        lambda change: change.add_generation(generation()),
        lambda change: change.set_policy("v", "text", 1),
        lambda change: change.remove("v", None, 9),
    ):
        with store.transaction() as change:
            change_with(change)
        seen.append(store.seal().revision)
    assert seen == sorted(set(seen))


def test_audit_alone_does_not_grow_the_revision(store):
    before = store.seal().revision
    with store.transaction() as change:
        change.record([record()])
    assert store.seal().revision == before


def test_change_by_another_process_is_seen(tmp_path, store):
    before = store.seal().revision
    with Store.open(tmp_path) as other, other.transaction() as change:
        change.add_generation(generation())
    assert store.seal().revision > before
    assert store.volume_ids() == ("v",)


def test_audit_record_round_trip(store):
    with store.transaction() as change:
        change.record(
            [record(), record(volume_id="w", decision="denied", denial_id="d")]
        )
    first, second = store.audit()
    assert first == record(seq=1)
    assert second.seq == 2
    assert store.audit(denied_only=True) == (second,)
    assert store.audit(limit=1) == (second,)
    assert store.denial("d") == second
    assert store.denial("none") is None


def test_quota(store):
    def spend(nonce, now_s, limit=2, volume_id="v"):
        with store.transaction() as change:
            return change.spend(volume_id, nonce, now_s, limit)

    assert spend(b"a", 0) == 1
    assert spend(b"b", 10) == 2
    assert spend(b"c", 20) is None
    assert spend(b"a", 20) == 2  # the same nonce is counted once
    assert spend(b"c", 20, volume_id="w") == 1
    assert spend(b"c", 3600) == 2  # the first one is an hour old


_SPENDER = """
import sys
from pathlib import Path
from tdxd.owner.store.store import Store
with Store.open(Path(sys.argv[1])) as store:
    sys.stdout.write("ready\\n"); sys.stdout.flush(); sys.stdin.readline()
    granted = []
    for number in range(60):
        # every second nonce is asked for by both processes
        name = b"shared%d" % number if number % 2 else b"%d of " % number + sys.argv[2].encode()
        with store.transaction() as change:
            if change.spend("v", name, 100, 50) is not None:
                granted.append(name.decode())
sys.stdout.write("\\n".join(granted))
"""


def test_quota_is_atomic_across_processes(tmp_path, store):
    """Two processes that spend as fast as they can get exactly the quota, each nonce once."""
    store.close()
    argv = [sys.executable, "-c", _SPENDER, str(tmp_path)]
    children = [
        subprocess.Popen(
            [*argv, name],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for child in children:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("go\n")
        child.stdin.flush()
    granted = [child.communicate(timeout=60)[0].split("\n") for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert all(len(names) > 1 for names in granted)
    assert len({*granted[0], *granted[1]}) == 50


def test_floors_only_rise(tmp_path, store):
    assert store.floors() == {}
    with store.transaction() as change:
        change.raise_floors({"tcb-evaluation/r/F": 17, "pck-crl/r/platform": 0})
    before = store.seal().revision
    with store.transaction() as change:
        change.raise_floors({"tcb-evaluation/r/F": 16, "pck-crl/r/platform": 1})
    assert store.seal().revision == before + 1
    with store.transaction() as change:
        change.raise_floors({"tcb-evaluation/r/F": 17})
    assert store.seal().revision == before + 1  # nothing rose, nothing is written
    with Store.open(tmp_path) as other:
        assert other.floors() == {"tcb-evaluation/r/F": 17, "pck-crl/r/platform": 1}


def test_token_keys(store):
    def row(name, made_at_s):
        return TokenKeyRow(key_id=name * 8, wrapped=b"w" + name, made_at_s=made_at_s)

    with store.transaction() as change:
        change.add_token_key(row(b"a", 10))
        change.add_token_key(row(b"b", 20))
    assert [one.key_id for one in store.token_keys()] == [b"b" * 8, b"a" * 8]
    with (
        pytest.raises(DataError, match="token key 6161616161616161 is in the store"),
        store.transaction() as change,
    ):
        change.add_token_key(row(b"a", 30))
    with store.transaction() as change:
        assert change.drop_token_keys(20) == 1
        assert change.drop_token_keys(20) == 0
    assert [one.wrapped for one in store.token_keys()] == [b"wb"]


def test_removed_generation_stays_known_without_its_secret(store):
    with store.transaction() as change:
        change.add_generation(generation(1))
        change.add_generation(generation(2))
        change.remove("v", 1, 9)
    assert [row.generation for row in store.generations("v")] == [2]
    held = store.sealed_volume("v")
    assert held.trouble == ""
    gone, kept = held.generations
    assert (gone.generation, gone.wrapped, gone.removed_at_s) == (1, b"", 9)
    assert (kept.generation, kept.wrapped, kept.removed_at_s) == (2, b"wrapped", 0)


def test_removed_generation_comes_back_with_the_same_manifest_only(store):
    with store.transaction() as change:
        change.add_generation(generation())
        change.remove("v", None, 9)
    other = dataclasses.replace(generation(), manifest_sha256="11" * 32)
    with (
        pytest.raises(DataError, match="was in the store with another manifest"),
        store.transaction() as change,
    ):
        change.add_generation(other)
    assert store.volume_ids() == ()
    with store.transaction() as change:
        change.add_generation(generation())
    assert store.volume_ids() == ("v",)


def test_without_the_key_nothing_changes_and_nothing_is_vouched_for(tmp_path, store):
    store.close()
    key = tmp_path / "kek.private"
    kept = key.rename(tmp_path / "elsewhere")
    with Store.open(tmp_path) as locked:
        assert locked.volume_ids() == ()
        for attempt in (locked.floors, locked.token_keys, locked.seal):
            with pytest.raises(ConfigError, match=r"kek\.private is missing") as caught:
                attempt()
            assert "--kek FILE" in caught.value.hint
        with pytest.raises(ConfigError), locked.transaction():
            pass
    with Store.open(tmp_path, kept) as opened, opened.transaction() as change:
        change.add_generation(generation())


def test_another_key_is_noticed(tmp_path, store):
    store.close()
    other = tmp_path / "other"
    other.write_bytes(bytes(96))
    other.chmod(0o600)
    with (
        Store.open(tmp_path, other) as opened,
        pytest.raises(StoreIntegrityError, match="is not authentic"),
    ):
        opened.floors()


def test_audit_lines_are_the_chain(store):
    with store.transaction() as change:
        change.record([record(), record(decision="denied", denial_id="d")])
    lines = list(store.audit_lines())
    assert [line["seq"] for line in lines] == [1, 2]
    assert lines[-1]["hash"] == store.seal().head.hex()
    assert list(store.audit_lines(1)) == lines[1:]
    assert list(store.audit_lines(2)) == []


def test_second_writer_waits_and_then_gives_up(tmp_path, store, monkeypatch):
    monkeypatch.setattr(store_database, "_BUSY_TIMEOUT_S", 0.1)
    blocker = sqlite3.connect(tmp_path / "store.sqlite3", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        with (
            Store.open(tmp_path) as other,
            pytest.raises(BusyError, match="locked by another process"),
            other.transaction(),
        ):
            pass
    finally:
        blocker.close()


def test_damaged_database_is_a_host_error(store):
    with store.transaction() as change:
        change._connection.exec_driver_sql("DROP TABLE audit")
    with pytest.raises(HostError) as caught:
        store.audit()
    assert "no such table" in caught.value.hint
