"""What is answered from memory, and what needs a thread that may wait."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from tdxd.errors import UnavailableError
from tdxd.owner.server.at_hand import AtHand, WouldWaitError, without_waiting

NOW_S = 1000.0


class Found:
    """As much of a `Prepared` as is looked at."""

    def __init__(self, expires_s):
        self.expires_s = expires_s


class Cache:
    def __init__(self, expires_s=10_000):
        self.asked = []
        self.expires_s = expires_s

    def get(self, fmspc, ca, now_s):
        self.asked.append((fmspc, ca, now_s))
        if fmspc == "bad":
            raise UnavailableError("no such collateral")
        return cast("Any", Found(self.expires_s))


def test_half_a_minute_from_memory():
    cache = Cache()
    hand = AtHand(cache.get)
    first = hand.get("a", "platform", NOW_S)
    with without_waiting():
        assert hand.get("a", "platform", NOW_S + 29.9) is first
    assert len(cache.asked) == 1
    with without_waiting(), pytest.raises(WouldWaitError):
        hand.get("a", "platform", NOW_S + 30.1)
    with without_waiting(), pytest.raises(WouldWaitError):
        hand.get("a", "processor", NOW_S)
    assert len(cache.asked) == 1
    assert hand.get("a", "platform", NOW_S + 30.1) is not first


def test_never_after_it_expires():
    hand = AtHand(Cache(expires_s=1010).get)
    first = hand.get("a", "platform", NOW_S)
    with without_waiting():
        assert hand.get("a", "platform", 1009.9) is first
        with pytest.raises(WouldWaitError):
            hand.get("a", "platform", 1010.0)


def test_clock_that_went_back_asks_again():
    cache = Cache()
    hand = AtHand(cache.get)
    hand.get("a", "platform", NOW_S)
    hand.get("a", "platform", NOW_S - 1)
    assert len(cache.asked) == 2


def test_failures_are_not_kept():
    cache = Cache()
    hand = AtHand(cache.get)
    for _ in range(2):
        with pytest.raises(UnavailableError):
            hand.get("bad", "platform", NOW_S)
    assert len(cache.asked) == 2


def test_memory_is_bounded():
    cache = Cache()
    hand = AtHand(cache.get)
    for number in range(1000):
        hand.get(str(number), "platform", NOW_S)
        assert len(hand._kept) <= 64


def test_only_this_thread_is_in_a_hurry():
    hand = AtHand(Cache().get)
    seen = []
    with without_waiting():
        other = threading.Thread(target=lambda: seen.append(hand.get("a", "x", NOW_S)))
        other.start()
        other.join()
    assert len(seen) == 1
    hand.get("b", "x", NOW_S)  # and not longer than it said
