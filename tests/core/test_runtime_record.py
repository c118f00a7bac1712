"""The history that a guest keeps of RTMR3: it comes back, and tells which event is missing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.runtime_log import RuntimeEvent, replay_runtime
from tdxd.core.runtime_record import RuntimeHistory, parse_history
from tdxd.errors import RecordError

EVENT = st.builds(
    RuntimeEvent,
    name=st.from_regex(r"[a-z][a-z0-9/-]{0,12}", fullmatch=True),
    payload=st.binary(max_size=20),
)
HISTORY = st.builds(
    RuntimeHistory,
    boot_id=st.text(max_size=36),
    base=st.binary(min_size=48, max_size=48),
    events=st.lists(EVENT, max_size=5).map(tuple),
)


@given(HISTORY)
def test_it_comes_back_as_it_was(history: RuntimeHistory) -> None:
    assert parse_history(history.encode()) == history


@given(HISTORY)
def test_the_register_tells_which_event_is_missing(history: RuntimeHistory) -> None:
    """All are there, or the last is not; nothing else is explained."""
    for count in range(len(history.events) + 1):
        register = replay_runtime(history.base, history.events[:count])
        if count == len(history.events):
            assert history.missing(register) is None
        elif count == len(history.events) - 1:
            assert history.missing(register) == history.events[-1]
        else:
            with pytest.raises(RecordError):
                history.missing(register)


@given(HISTORY, EVENT)
def test_one_event_more_and_one_less(
    history: RuntimeHistory, event: RuntimeEvent
) -> None:
    longer = history.with_event(event)
    assert longer.events[-1] == event
    assert longer.without_last() == history
    assert longer.missing(history.value) == event


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(RecordError, match=r"^runtime log: "):
        parse_history(data)


@given(HISTORY, st.data())
def test_a_changed_byte_is_refused_or_is_another_history(
    history: RuntimeHistory, data: st.DataObject
) -> None:
    encoded = bytearray(history.encode())
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    try:
        found = parse_history(bytes(encoded))
    except RecordError:
        return
    assert found != history


def test_a_base_of_another_size() -> None:
    with pytest.raises(ValueError, match="base is 47 bytes long"):
        RuntimeHistory(boot_id="b", base=bytes(47))
