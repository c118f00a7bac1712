"""The store: volumes, policies, quota, audit; all or nothing."""

from __future__ import annotations

import sqlite3
import stat

import pytest

from tdxd.core.policy import Check
from tdxd.errors import BusyError, ConfigError, DataError, HostError
from tdxd.owner import store as store_module
from tdxd.owner.store import AuditRecord, GenerationRow, Store


@pytest.fixture
def store(tmp_path):
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


def test_newer_schema_is_refused(tmp_path, store):
    with store.transaction() as change:
        change.set_meta("schema", 2)
    with pytest.raises(ConfigError, match="schema version 2, not 1"):
        Store.open(tmp_path)


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
        assert change.remove("v", None) == 1
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
        assert change.remove("v", 2) == 1
        assert change.remove("v", 9) == 0
    assert [row.generation for row in store.generations("v")] == [1]
    assert store.volume_ids() == ("v",)


def test_every_change_grows_the_revision(store):
    seen = [store.revision()]
    for change_with in (
        lambda change: change.add_generation(generation()),
        lambda change: change.set_policy("v", "text", 1),
        lambda change: change.remove("v", None),
    ):
        with store.transaction() as change:
            change_with(change)
        seen.append(store.revision())
    assert seen == sorted(set(seen))


def test_audit_alone_does_not_grow_the_revision(store):
    before = store.revision()
    with store.transaction() as change:
        change.record([record()])
    assert store.revision() == before


def test_change_by_another_process_is_seen(tmp_path, store):
    before = store.revision()
    with Store.open(tmp_path) as other, other.transaction() as change:
        change.add_generation(generation())
    assert store.revision() > before
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


def test_second_writer_waits_and_then_gives_up(tmp_path, store, monkeypatch):
    monkeypatch.setattr(store_module, "_BUSY_TIMEOUT_S", 0.1)
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
