"""Which directories are versions, and which versions are served."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.model_server.versions import Policy, choose, index_versions


def test_only_whole_numbers_are_versions():
    names = ["1", "20", "x", ".tmp-3", "1_0", "٣", "-1", "+2", "", "9" * 19, "9" * 20]
    assert index_versions(names) == {1: "1", 20: "20"}


def test_of_two_spellings_the_last_is_taken():
    assert index_versions(["1", "01", "001"]) == {1: "1"}


@pytest.mark.parametrize(
    ("policy", "want"),
    [
        (Policy(), (30,)),
        (Policy(count=2), (4, 30)),
        (Policy(count=9), (1, 4, 30)),
        (Policy(kind="all"), (1, 4, 30)),
        (Policy(kind="specific", versions=frozenset([1, 5])), (1,)),
    ],
)
def test_policies(policy, want):
    assert choose(policy, {4: "4", 30: "30", 1: "1"}) == want


@given(st.sets(st.integers(0, 2**63 - 1)), st.integers(0, 5))
def test_latest_are_the_highest(found, count):
    chosen = choose(Policy(count=count), {one: str(one) for one in found})
    assert len(chosen) == min(max(count, 1), len(found))
    assert all(one <= min(chosen) for one in found - set(chosen))
