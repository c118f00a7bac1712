"""Rates and calls at once: what a bucket holds, who is counted, what is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.decode import decode
from tdxd.errors import ConfigError
from tdxd.owner.server.limits import Gate, Kind, LimitsConfig, peer_name

LIMITS = LimitsConfig(
    challenges_per_s=100,
    releases_per_s=10,
    peer_challenges_per_s=4,
    peer_releases_per_s=2,
    burst_s=3,
    calls=8,
    peer_calls=5,
    peers=3,
)


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


def gate(**changes):
    clock = Clock()
    limits = LimitsConfig(
        **{name: getattr(LIMITS, name) for name in LIMITS.__slots__} | changes
    )
    return Gate(limits, clock), clock


def call(made, peer, kind=Kind.RELEASE):
    """A call that ends at once."""
    refusal = made.enter(peer, kind)
    if not refusal:
        made.leave(peer)
    return refusal


def test_one_peer_spends_its_burst_and_then_its_rate():
    made, clock = gate()
    assert [call(made, "a") for _ in range(6)] == [""] * 6
    refusal = call(made, "a")
    assert refusal == "a: at most 2 releases per second; try again in 1 s"
    assert made.refused == 1
    clock.now_s += 1.0
    assert [bool(call(made, "a")) for _ in range(3)] == [False, False, True]
    clock.now_s += 1000.0
    assert sum(not call(made, "a") for _ in range(100)) == 6  # the cap, however long


def test_kinds_are_counted_apart():
    made, _ = gate()
    for _ in range(7):
        call(made, "a")
    assert call(made, "a")
    assert not call(made, "a", Kind.CHALLENGE)


def test_refused_calls_of_one_peer_take_nothing_from_others():
    made, _ = gate()
    for _ in range(1000):
        call(made, "flood")
    assert [call(made, "b") for _ in range(6)] == [""] * 6


def test_all_peers_together_have_a_rate_too():
    made, clock = gate(peers=1000)
    let_in = sum(not call(made, f"peer {number}") for number in range(100))
    assert let_in == 30
    assert call(made, "new") == "busy: at most 10 releases per second; try again in 1 s"
    clock.now_s += 0.1
    assert not call(made, "new")
    assert call(made, "new")


def test_refusal_by_the_common_rate_costs_a_peer_nothing():
    made, clock = gate(peers=1000)
    for number in range(100):
        call(made, f"peer {number}")
    for _ in range(50):
        assert call(made, "late")
    clock.now_s += 10
    assert [call(made, "late") for _ in range(6)] == [""] * 6


def test_calls_at_once_of_one_peer_and_of_all():
    made, _ = gate()
    assert [made.enter("a", Kind.RELEASE) for _ in range(5)] == [""] * 5
    assert made.enter("a", Kind.RELEASE) == "5 calls of a at once, no more"
    assert [made.enter("b", Kind.RELEASE) for _ in range(3)] == [""] * 3
    assert made.enter("c", Kind.RELEASE) == "8 calls at once, no more"
    made.leave("a")
    assert not made.enter("c", Kind.RELEASE)


def test_memory_is_bounded_and_the_quietest_is_forgotten():
    made, clock = gate(releases_per_s=1e9)
    for _ in range(7):
        call(made, "a")
    for number in range(1000):
        clock.now_s += 0.0001
        call(made, f"peer {number}")
        assert call(made, "a")  # who keeps calling is not forgotten
        assert len(made) <= 3
    assert not made._inside


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(list(Kind)), st.floats(0, 2)),
        max_size=200,
    )
)
def test_never_more_than_burst_and_rate(calls):
    made, clock = gate()
    start_s = clock.now_s
    seen: dict[tuple[str, Kind], int] = {}
    for peer, kind, pause_s in calls:
        clock.now_s += pause_s
        if not call(made, peer, kind):
            seen[peer, kind] = seen.get((peer, kind), 0) + 1
    for (_peer, kind), count in seen.items():
        rate = LIMITS.peer_rate(kind)
        assert count <= rate * (LIMITS.burst_s + clock.now_s - start_s) + 1e-6
    assert not made._inside


def test_clock_that_stands_or_goes_back_gives_nothing():
    made, clock = gate()
    for _ in range(6):
        call(made, "a")
    clock.now_s -= 500
    assert call(made, "a")
    clock.now_s += 500
    assert call(made, "a")


def test_share_of_one_of_several_workers():
    half = LIMITS.share(2)
    assert (half.challenges_per_s, half.releases_per_s, half.calls) == (50, 5, 4)
    assert half.peer_releases_per_s == LIMITS.peer_releases_per_s
    assert LIMITS.share(100).calls == 1


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("ipv4:192.0.2.7:50051", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:1", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:9", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:9", "fe80::/64"),
        ("ipv4:nonsense", "ipv4"),
        ("unix:/run/x", "unix"),
        ("unix:", "unix"),
        ("", ""),
    ],
)
def test_whom_a_limit_counts(name, peer):
    assert peer_name(name) == peer


@pytest.mark.parametrize(
    "table",
    [
        {"calls": 0},
        {"releases_per_s": -1.0},
        {"burst_s": float("inf")},
        {"peers": 0},
        {"peer_releases_per_s": 0.1, "burst_s": 1.0},
        {"bursts": 1},
    ],
)
def test_bad_limits_are_refused(table):
    with pytest.raises(ConfigError):
        decode(LimitsConfig, table, source="keyd.toml")
