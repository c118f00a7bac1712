"""What proves a configuration: the digest of its files, and dm-verity's root hash."""

from __future__ import annotations

import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.config_trust import (
    command_line_root_hash,
    config_digest,
    verity_root_hash,
)

HASH = "ab" * 32
FILES = st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=8)), max_size=3)


def test_the_digest_byte_by_byte() -> None:
    """As docs say; an owner computes it without this program."""
    text = (
        bytes.fromhex("0000000e")
        + b"tdxd/config/v1"
        + bytes.fromhex("00000002")
        + bytes.fromhex("00000009")
        + b"tdxd.toml"
        + bytes.fromhex("00000003")
        + b"a=1"
        + bytes.fromhex("0000000e")
        + b"key_release.ca"
        + bytes.fromhex("00000000")
    )
    files = [("tdxd.toml", b"a=1"), ("key_release.ca", b"")]
    assert config_digest(files) == hashlib.sha384(text).digest()


@given(FILES, FILES)
def test_other_files_have_another_digest(
    one: list[tuple[str, bytes]], two: list[tuple[str, bytes]]
) -> None:
    assert (config_digest(one) == config_digest(two)) == (one == two)


def test_no_byte_can_move_between_name_and_content_or_files() -> None:
    variants = [
        [("ab", b"c")],
        [("a", b"bc")],
        [("abc", b"")],
        [("a", b"b"), ("c", b"")],
        [("c", b""), ("a", b"b")],
        [("a", b"b")],
        [],
    ]
    for one, two in itertools.combinations(variants, 2):
        assert config_digest(one) != config_digest(two)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (f"ro roothash={HASH} quiet\n", HASH),
        (f"roothash={HASH.upper()}", HASH),
        (f"roothash={HASH}{HASH}", HASH + HASH),
        ("ro quiet", None),
        ("", None),
        (f"roothash={HASH} roothash={'cd' * 32}", None),
        (f"usrhash={HASH}", None),
        (f"xroothash={HASH}", None),
        ("roothash=abcd", None),
        (f"roothash={HASH}00", None),
        (f"ro -- roothash={HASH}", None),
    ],
)
def test_the_root_hash_of_the_command_line(text: str, found: str | None) -> None:
    assert command_line_root_hash(text) == found


TABLE = f"1 8:1 8:2 4096 4096 1000 1 sha256 {HASH} {'5a' * 32}"


@pytest.mark.parametrize(
    ("target", "parameters", "found"),
    [
        ("verity", TABLE, HASH),
        ("verity", TABLE + " 1 restart_on_corruption", HASH),
        ("verity", TABLE + " 1 ignore_corruption", None),
        ("verity", TABLE + " 1 check_at_most_once", None),
        ("verity", TABLE + " 2 ignore_zero_blocks restart_on_corruption", None),
        ("linear", TABLE, None),
        ("", "", None),
        ("verity", "1 8:1 8:2", None),
        ("verity", TABLE.replace(HASH, "zz" * 32), None),
    ],
)
def test_the_root_hash_of_a_live_table(
    target: str, parameters: str, found: str | None
) -> None:
    assert verity_root_hash(target, parameters) == found
