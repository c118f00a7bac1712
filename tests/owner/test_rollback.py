"""An owner goes on with an older store: no number is used again, and the log says so."""

from __future__ import annotations

import shutil

import pytest

from tdxd.errors import DataError
from tdxd.owner.audit.guard import load_checkpoint, make_exports, public_keys
from tdxd.owner.audit.rollback import accept_rollback
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.config import read_config
from tdxd.owner.store.store import Store
from tests.keyserver import opened_owner
from tests.owner.test_store import record


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


def decide(store, count=1, name="r"):
    for _ in range(count):
        with store.transaction() as change:
            change.record([record(request_id=name)])


def saved(directory, to):
    """A copy of the whole directory, as a snapshot of the disk has it."""
    with Store.open(directory) as store, store.reading():
        shutil.copytree(directory, to)
    return to


def checkpoint(directory, path):
    with Store.open(directory) as store:
        exports = make_exports(directory, read_config(directory), store)
        exports.write_current(path, 5)
    return load_checkpoint(path, public_keys(directory))


def troubles(directory, against):
    deployment = bytes.fromhex(read_config(directory).deployment)
    with Store.open(directory) as store:
        return verify(store, against, deployment=deployment).troubles


def accepted(directory, against):
    with Store.open(directory) as store:
        return accept_rollback(directory, store, against, 77)


def test_every_checkpoint_of_the_lost_time_is_accepted_and_no_other(owner, tmp_path):
    owner.add("v")
    decide(owner.store)
    older = saved(owner.directory, tmp_path / "older")
    before = checkpoint(owner.directory, tmp_path / "0")
    lost = []
    for number in (1, 2, 3):
        decide(owner.store)
        owner.add("v", number + 1)
        lost.append(checkpoint(owner.directory, tmp_path / str(number)))
    assert troubles(older, before) == ()
    assert all(troubles(older, one) for one in lost)
    assert accepted(older, lost[-1]) == lost[-1].seq + 1
    for one in (before, *lost):
        assert troubles(older, one) == ()
    decide(owner.store, 5)  # the original went on: that is not what was accepted
    later = checkpoint(owner.directory, tmp_path / "4")
    assert any("the audit log ends at record" in one for one in troubles(older, later))


def test_copy_that_went_on_alone_is_accepted_by_the_head_it_departs_from(
    owner, tmp_path
):
    owner.add("v")
    decide(owner.store)
    older = saved(owner.directory, tmp_path / "older")
    decide(owner.store)
    newest = checkpoint(owner.directory, tmp_path / "checkpoint")
    with Store.open(older) as store:
        decide(store, 4, name="alone")
    (trouble,) = troubles(older, newest)
    assert "audit record 2 is another one" in trouble
    assert accepted(older, newest) == 6
    assert troubles(older, newest) == ()


def test_numbers_go_on_after_the_lost_ones_and_floors_hold(owner, tmp_path):
    owner.add("v")
    older = saved(owner.directory, tmp_path / "older")
    with owner.store.transaction() as change:
        for _ in range(5):
            change.set_policy("v", "text", 9)
        change.set_policy("later", "text", 9)
        change.raise_floors({"tcb-evaluation/r/F": 17})
        change.record([record()] * 8)
    newest = checkpoint(owner.directory, tmp_path / "checkpoint")
    accepted(older, newest)
    with Store.open(older) as store:
        seal, state = store.sealed()
        assert seal.seq == 9
        assert seal.revision > newest.revision
        assert state.policy_version("v") == 7
        assert state.policy_version("later") == 2
        assert store.floors()["tcb-evaluation/r/F"] == 17
        kept = store.policy("v")
        assert kept is not None
        assert kept.text.startswith("[tdx]")  # the text of the backup stands again
        lost = store.policy("later")
        assert lost is not None
        assert "lost" in lost.text  # and allows nothing
        (told,) = store.audit()
        assert (told.decision, told.at_s) == ("rollback", 77)
        assert told.report_data == newest.head.hex()
        seen = {one.name: (one.expected, one.actual, one.ok) for one in told.checks}
        assert seen["audit_records"] == ("8", "0", False)
        assert seen["policy of v"] == ("6", "1", False)
        assert seen["floor tcb-evaluation/r/F"] == ("17", "0", False)
        assert seen["generation of v"] == ("1", "1", True)


def test_nothing_to_accept(owner, tmp_path):
    newest = checkpoint(owner.directory, tmp_path / "checkpoint")
    with pytest.raises(DataError, match="is not behind this checkpoint"):
        accepted(owner.directory, newest)
