"""What the server makes of the rows of a volume: nothing that is not as it was sealed."""

from __future__ import annotations

import contextlib
import sqlite3

import pytest

from tdxd.owner.store.kek import read_kek
from tdxd.owner.store.volumes import Volumes
from tests.keyserver import opened_owner


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


@pytest.fixture
def volumes(owner):
    return Volumes(owner.store, read_kek(owner.directory / "kek.private"))


def test_state_of_a_volume_and_of_none(owner, volumes):
    bundle = owner.add("v", 3)
    state = volumes.state("v")
    assert (state.generation, state.policy_version, state.trouble) == (3, 1, "")
    assert state.finding.known
    assert state.finding.policy is not None
    (released,) = state.bundles
    assert bundle.secret.reveal() in released.reveal()
    other = volumes.state("none")
    assert (other.finding.known, other.generation, other.bundles) == (False, 0, ())


def test_state_is_kept_until_it_is_of_an_older_revision(owner, volumes):
    owner.add("v")
    first = volumes.state("v")
    volumes.renew(owner.store.seal().revision)
    assert volumes.state("v") is first
    owner.add("v", 2)
    assert volumes.state("v") is first  # it says of which revision it is
    assert first.revision < owner.store.seal().revision
    volumes.renew(owner.store.seal().revision)
    assert volumes.state("v").generation == 2
    assert volumes.state("v").revision == owner.store.seal().revision


def test_knows_every_generation_that_was_ever_added(owner, volumes):
    manifests = {number: owner.add("v", number).manifest.digest() for number in (1, 2)}
    assert volumes.knows("v", 1, manifests[1])
    assert volumes.knows("v", 2, manifests[2])
    assert not volumes.knows("v", 1, manifests[2])
    assert not volumes.knows("v", 3, manifests[2])
    assert not volumes.knows("w", 1, manifests[1])
    with owner.store.transaction() as change:
        change.remove("v", 1, 9)
    assert volumes.knows("v", 1, manifests[1])  # a guest that serves it may renew
    with owner.store.transaction() as change:
        change.remove("v", None, 9)
    volumes.renew(owner.store.seal().revision)
    assert volumes.knows("v", 2, manifests[2])
    assert not volumes.state("v").finding.known  # nothing is released all the same


def test_unknown_volumes_of_a_log_cost_one_reading(owner, volumes, monkeypatch):
    """A runtime log may name thousands of them."""
    digest = owner.add("v").manifest.digest()
    read = []
    real = owner.store.sealed_reading

    def counted():
        read.append(1)
        return real()

    monkeypatch.setattr(owner.store, "sealed_reading", counted)
    assert not any(volumes.knows(f"x{index}", 1, digest) for index in range(1000))
    assert len(read) == 1
    assert volumes.knows("v", 1, digest)


def test_volume_that_is_added_later_is_known(owner, volumes):
    owner.add("v")
    owner.add("old")
    volumes.state("v")
    assert not volumes.knows("w", 1, bytes(32))
    digest = owner.add("w").manifest.digest()
    newer = owner.add("v", 2).manifest.digest()
    assert volumes.state("old").revision == owner.store.seal().revision
    assert volumes.knows("w", 1, digest)  # what is kept is of one revision
    assert volumes.knows("v", 2, newer)


def test_rows_that_are_not_as_sealed_give_no_policy_and_no_bundle(owner, volumes):
    owner.add("v")
    owner.add("w")
    path = owner.directory / "store.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as attacker, attacker:
        attacker.execute("UPDATE policies SET set_at_s = 7 WHERE volume_id = 'v'")
    state = volumes.state("v")
    assert state.trouble.startswith("policy of volume 'v' version 1 was edited")
    assert (state.bundles, state.finding.policy) == ((), None)
    assert state.manifests == frozenset()
    assert volumes.state("w").trouble == ""


def test_policy_that_no_longer_parses(owner, volumes):
    owner.add("v")
    with owner.store.transaction() as change:
        change.set_policy("v", "[tdx]\nnonsense = 1\n", 9)
    finding = volumes.state("v").finding
    assert finding.policy is None
    assert "nonsense" in finding.policy_trouble
