"""The secret file of the reference's key service: what is taken, what is refused, what is said."""

from __future__ import annotations

import json
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.errors import DataError, UsageError
from tdxd.owner.foreign.secret_json import chosen, parse_secret_json

REFERENCE = b'{\n    "app1" : "2333",\n    "luksKey" : "Intel@intel123"\n}\n'
"""In the shape of cczoo/tdx-encrypted-tdvm-image/initramfs-hooks/ra/ra-server/secret.json."""
SECRET = "wilbur-and-orville"


def parsed(data):
    return parse_secret_json(data, source="secret.json")


def test_a_file_of_the_reference():
    found = parsed(REFERENCE)
    assert [one.app_id for one in found] == ["app1", "luksKey"]
    assert [one.passphrase.reveal() for one in found] == [b"2333", b"Intel@intel123"]
    assert not any(one.shortened for one in found)


def test_values_are_taken_byte_for_byte():
    data = json.dumps({"a": " pass word\n", "b": "pâsswörd", "c": '\\"/'}).encode()
    values = [one.passphrase.reveal() for one in parsed(data)]
    assert values == [b" pass word\n", "pâsswörd".encode(), b'\\"/']


def test_a_byte_order_mark_is_no_matter():
    assert len(parsed(b"\xef\xbb\xbf" + REFERENCE)) == 2


@pytest.mark.parametrize(
    ("value", "shortened"),
    [
        ("plain", False),
        ("two words", False),
        ("a: b", True),  # awk -F ': ' gives the part before it
        ("a  b", True),  # echo ${PASSWORD} makes one space of two
        (" a", True),
        ("a ", True),
        ("a\tb", True),
        ("a\n", True),
        ("a:b", False),
    ],
)
def test_what_the_mount_script_would_not_pass_on_whole_is_told(value, shortened):
    (found,) = parsed(json.dumps({"a": value}).encode())
    assert found.shortened is shortened


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "not JSON: line 1 column 1"),
        (b"{", "not JSON: line 1 column 2"),
        (b'{"a": "' + SECRET.encode() + b'",}', "not JSON: line 1"),
        (b'{"a": "' + SECRET.encode() + b'"} more', "not JSON: line 1"),
        (b'{"a": "' + SECRET.encode() + b'\xff"}', "not UTF-8 text"),
        (b'["' + SECRET.encode() + b'"]', "not a JSON object"),
        (b"[" * 100_000, "not a flat JSON object"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not a flat JSON object"),
        (b"{}", "holds no secret"),
        (b'{"a": 7}', "the value of a is not a string"),
        (b'{"a": null}', "the value of a is not a string"),
        (b'{"a": {"b": "' + SECRET.encode() + b'"}}', "the value of a is not a string"),
        (b'{"a": "x", "b": "' + SECRET.encode() + b'", "a": "x"}', "a stands there 2"),
        (b'{"a": ""}', "the value of a is not 1 to 512 bytes"),
        (b'{"a": "x\\u0000y"}', "the value of a is not 1 to 512 bytes"),
        (b'{"a": "\\ud800"}', "the value of a is not 1 to 512 bytes"),
        (b'{"a": "' + b"x" * 513 + b'"}', "the value of a is not 1 to 512 bytes"),
        (b'{"\\u001b[2J": 7}', "the value of ?[2J is not a string"),
    ],
    ids=range(18),
)
def test_what_is_refused_names_the_place_and_no_secret(data, problem):
    with pytest.raises(DataError) as caught:
        parsed(data)
    assert caught.value.message.startswith(f"secret.json: {problem}")
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert caught.value.__context__ is None  # a decoder's error holds the whole file


@given(
    st.binary() | st.dictionaries(st.text(), st.text()).map(json.dumps).map(str.encode)
)
def test_any_bytes_give_secrets_or_the_error(data):
    try:
        found = parsed(data)
    except DataError:
        return
    assert all(1 <= len(one.passphrase) <= 512 for one in found)


def ids(*names):
    found = chosen(parsed(REFERENCE), names, source="secret.json")
    return {name: one.app_id for name, one in found.items()}


def test_secrets_are_chosen_and_named():
    assert ids("app1") == {"app1": "app1"}
    assert ids("luksKey=root") == {"root": "luksKey"}
    assert ids("luksKey=root", "app1=a.b") == {"root": "luksKey", "a.b": "app1"}


def test_all_are_taken_where_all_could_be_volumes():
    found = chosen(parsed(b'{"a": "x", "b": "y"}'), (), source="s")
    assert list(found) == ["a", "b"]


def test_an_equals_sign_in_a_name_is_no_matter():
    found = parsed(b'{"a=b": "x", "a": "y"}')
    named = {
        name: one.app_id
        for name, one in chosen(found, ["a=b=c", "a=d"], source="s").items()
    }
    assert named == {"c": "a=b", "d": "a"}
    with pytest.raises(UsageError, match="volume id 'a=b'"):
        chosen(found, ["a=b"], source="s")


@pytest.mark.parametrize(
    ("names", "problem", "hint"),
    [
        ((), "volume id 'luksKey' is not", "--id 'luksKey=ID'"),
        (("luksKey",), "volume id 'luksKey' is not", "--id 'luksKey=ID'"),
        (("app2",), "secret.json has no app2", "it has app1, luksKey"),
        (("app2=x",), "secret.json has no app2", "it has app1, luksKey"),
        (("app1=../x",), "volume id '../x' is not", "--id 'app1=ID'"),
        (("app1=x", "luksKey=x"), "two secrets for the volume x", ""),
    ],
)
def test_names_that_lead_nowhere(names, problem, hint):
    with pytest.raises(UsageError, match=problem) as caught:
        ids(*names)
    assert hint in caught.value.hint
