"""Strict decoding: the message names the key path, the value and what would do."""

from __future__ import annotations

import dataclasses
from typing import Literal

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.decode import decode, decode_canonical, encode_canonical
from tdxd.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    name: str
    size_bytes: int = 0

    def __post_init__(self) -> None:
        if self.size_bytes < 0:
            raise ValueError(f"size_bytes {self.size_bytes} is negative")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    inner: tuple[Inner, ...] = ()
    mode: Literal["fast", "slow"] = "fast"
    ratio: float = 1.0
    flag: bool = False
    maybe: str | None = None
    data: bytes = b""
    table: dict[str, int] = dataclasses.field(default_factory=dict)
    renamed: int = dataclasses.field(default=0, metadata={"key": "other-name"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    side_mm: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Circle:
    kind: Literal["circle"] = "circle"
    radius_mm: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    shape: Square | Circle
    frame: Square | Circle | None = None


def test_the_keys_tell_which_record_of_a_union_is_meant() -> None:
    circle = {"kind": "circle", "radius_mm": 2}
    made = decode(Drawing, {"shape": circle, "frame": {"side_mm": 1}}, source="f")
    assert made == Drawing(shape=Circle(radius_mm=2), frame=Square(side_mm=1))
    assert decode(Drawing, {"shape": circle, "frame": None}, source="f").frame is None


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ({"kind": "circle", "side_mm": 2}, "shape.kind: unknown key"),
        ({"kind": "square", "radius_mm": 2}, "shape.kind: expected one of 'circle'"),
        ({}, "shape.side_mm: missing"),
        ("round", "shape: expected a table, got 'round'"),
        (None, "shape: expected a table, got None"),
    ],
)
def test_what_is_no_record_of_a_union_is_refused(shape, text) -> None:
    with pytest.raises(ConfigError, match=text):
        decode(Drawing, {"shape": shape}, source="f")


def test_everything_decodes() -> None:
    made = decode(
        Outer,
        {
            "inner": [{"name": "a", "size_bytes": 1}],
            "mode": "slow",
            "ratio": 2,
            "flag": True,
            "maybe": "x",
            "data": b"1",
            "table": {"k": 1},
            "other-name": 5,
        },
        source="f",
    )
    assert made == Outer(
        inner=(Inner(name="a", size_bytes=1),),
        mode="slow",
        ratio=2.0,
        flag=True,
        maybe="x",
        data=b"1",
        table={"k": 1},
        renamed=5,
    )


@pytest.mark.parametrize(
    ("mapping", "text"),
    [
        ({"innner": []}, "f: innner: unknown key"),
        ({"inner": [{"name": "a"}, {"nam": "b"}]}, r"f: inner\[1\].nam: unknown key"),
        ({"inner": [{}]}, r"f: inner\[0\].name: missing"),
        ({"inner": 3}, "f: inner: expected a list, got 3"),
        ({"inner": [3]}, r"f: inner\[0\]: expected a table, got 3"),
        ({"mode": "warp"}, "f: mode: expected one of 'fast', 'slow', got 'warp'"),
        ({"flag": 1}, "f: flag: expected true or false, got 1"),
        ({"other-name": True}, "f: other-name: expected a whole number, got True"),
        ({"maybe": 1}, "f: maybe: expected a string, got 1"),
        ({"table": []}, "f: table: expected a table, got a list"),
        ({"table": {"k": "v"}}, "f: table.k: expected a whole number"),
        ({"inner": [{"name": "a", "size_bytes": -1}]}, r"f: inner\[0\]: size_bytes -1"),
        ({"ratio": "x" * 100}, r"expected float, got 'x+\.\.\."),
        ({"ratio": {}}, "got a table"),
        ([], "f: expected a table, got a list"),
    ],
)
def test_messages_name_the_path(mapping: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        decode(Outer, mapping, source="f")


def test_a_near_miss_is_suggested() -> None:
    with pytest.raises(ConfigError) as caught:
        decode(Outer, {"moed": "fast"}, source="f")
    assert caught.value.hint == "did you mean 'mode'"


def test_a_far_miss_lists_the_known_keys() -> None:
    with pytest.raises(ConfigError) as caught:
        decode(Inner, {"zzz": 1}, source="f")
    assert caught.value.hint == "known keys: name, size_bytes"


def test_bytes_are_never_shown() -> None:
    with pytest.raises(ConfigError, match="got 6 bytes") as caught:
        decode(Outer, {"mode": b"canary"}, source="f")
    assert "canary" not in str(caught.value)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(plain)
def test_canonical_msgpack_comes_back(value: object) -> None:
    data = encode_canonical(value)
    assert decode_canonical(data, source="m", max_bytes=10**6) == value


@given(st.binary(max_size=60))
def test_whatever_decodes_was_canonical(data: bytes) -> None:
    try:
        value = decode_canonical(data, source="m", max_bytes=60)
    except DataError:
        return
    assert encode_canonical(value) == data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x82\xa1a\x01\xa1a\x02", "not valid msgpack"),  # the same key twice
        (b"\x82\xa1b\x01\xa1a\x02", "canonical"),  # keys out of order
        (b"\xd1\x00\x01", "canonical"),  # 1 as two bytes
        (b"\x91" * 700 + b"\xc0", "canonical"),  # nested too deeply to be encoded again
        (b"\xc7\x01\x05x", "not valid msgpack"),  # an extension type
        (b"\x81\x01\x02", "not valid msgpack"),  # a number as key
        (msgpack.packb(1) + b"\0", "not valid msgpack"),  # something behind
        (b"\0" * 1000, "at most 999"),
    ],
)
def test_what_is_not_canonical_is_refused(data: bytes, text: str) -> None:
    with pytest.raises(DataError, match=text):
        decode_canonical(data, source="m", max_bytes=999)
