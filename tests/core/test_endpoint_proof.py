"""The evidence of an endpoint: what its report data binds, and its one encoding."""

from __future__ import annotations

import hashlib
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import keyrelease
from tdxd.core.decode import encode_canonical
from tdxd.core.endpoint_proof import (
    EVIDENCE_MAX_BYTES,
    EndpointEvidence,
    endpoint_report_data,
    evidence_target,
    key_digest_of_der,
    key_digest_of_pem,
    nonce_of_target,
    parse_endpoint_evidence,
)
from tdxd.errors import DataError, RemoteProtocolError
from tests.certificates import self_signed

FIELDS: dict[str, Any] = {
    "nonce": bytes(range(32)),
    "key_sha256": bytes(range(32, 64)),
    "event_log": b"event log",
    "runtime_log": b"",
}
EVIDENCE = EndpointEvidence(
    key_sha256=b"k" * 32, quote=b"quote", event_log=b"event log", runtime_log=b""
)


def lp(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def test_report_data_is_as_the_protocol_says() -> None:
    parts = (
        b"tdxd/endpoint/v1",
        FIELDS["nonce"],
        FIELDS["key_sha256"],
        hashlib.sha384(b"event log").digest(),
        hashlib.sha384(b"").digest(),
    )
    wanted = hashlib.sha512(b"".join(map(lp, parts))).digest()
    assert endpoint_report_data(**FIELDS) == wanted


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_changes_the_report_data(name: str) -> None:
    value = FIELDS[name]
    other = bytes([value[0] ^ 1]) + value[1:] if value else b"x"
    changed = endpoint_report_data(**{**FIELDS, name: other})
    assert changed != endpoint_report_data(**FIELDS)


def test_it_is_never_the_report_data_of_a_key_release() -> None:
    """The labels differ, and each starts its hash after its own length."""
    release = keyrelease.report_data(
        token=FIELDS["nonce"],
        public_key=FIELDS["key_sha256"],
        volume_ids=(),
        signing_key_sha256=bytes(32),
        event_log=FIELDS["event_log"],
        runtime_log=FIELDS["runtime_log"],
    )
    assert release != endpoint_report_data(**FIELDS)


@pytest.mark.parametrize("name", ["nonce", "key_sha256"])
@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_other_sizes_are_refused(name: str, size: int) -> None:
    with pytest.raises(ValueError, match="not 32 each"):
        endpoint_report_data(**{**FIELDS, name: bytes(size)})


@given(st.binary(min_size=32, max_size=32))
def test_a_nonce_comes_back_from_its_target(nonce: bytes) -> None:
    assert nonce_of_target(evidence_target(nonce)) == nonce


GOOD = evidence_target(bytes(range(32)))


@pytest.mark.parametrize(
    "target",
    [
        GOOD.upper(),
        GOOD[:-1],
        GOOD + "0",
        GOOD + "&nonce=" + "00" * 32,
        GOOD.replace("nonce", "Nonce"),
        GOOD + "\n",
        GOOD + "#x",
        GOOD.replace("/tdxd", "//tdxd"),
        GOOD.partition("?")[0],
        "http://host" + GOOD,
        GOOD[:-1] + "g",
        GOOD[:-1] + "\u0661",
    ],
)
def test_any_other_target_has_no_nonce(target: str) -> None:
    assert nonce_of_target(target) is None


def test_evidence_comes_back_from_its_encoding() -> None:
    assert parse_endpoint_evidence(EVIDENCE.encode(), source="x") == EVIDENCE


def test_the_largest_evidence_fits() -> None:
    largest = EndpointEvidence(
        key_sha256=bytes(32),
        quote=bytes(keyrelease.QUOTE_MAX_BYTES),
        event_log=bytes(keyrelease.EVENT_LOG_MAX_BYTES),
        runtime_log=bytes(keyrelease.RUNTIME_LOG_MAX_BYTES),
    ).encode()
    assert len(largest) <= EVIDENCE_MAX_BYTES
    assert parse_endpoint_evidence(largest, source="x").quote == bytes(16384)


TABLE: dict[str, Any] = {
    "format": 1,
    "key_sha256": b"k" * 32,
    "quote": b"quote",
    "event_log": b"",
    "runtime_log": b"",
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": 2}, "format"),
        ({"key_sha256": b"short"}, "key_sha256 has 5 bytes"),
        ({"quote": bytes(16385)}, "quote has 16385 bytes"),
        ({"runtime_log": bytes(262145)}, "runtime_log has 262145 bytes"),
        ({"event_log": bytes(1048577)}, "event_log has 1048577 bytes"),
        ({"quote": "text"}, "quote"),
        ({"more": b""}, "unknown key"),
    ],
)
def test_what_is_not_evidence_is_refused(changes: Any, problem: str) -> None:
    data = encode_canonical({**TABLE, **changes})
    with pytest.raises(RemoteProtocolError, match=problem):
        parse_endpoint_evidence(data, source="x")


def test_another_encoding_of_the_same_is_refused() -> None:
    data = EVIDENCE.encode()
    with pytest.raises(RemoteProtocolError):
        parse_endpoint_evidence(data + b"\0", source="x")
    loose = data.replace(b"\xa9key_sha256", b"\xd9\x0akey_sha256")
    loose = loose.replace(b"\xaakey_sha256", b"\xd9\x0akey_sha256")
    assert loose != data
    with pytest.raises(RemoteProtocolError, match="canonical"):
        parse_endpoint_evidence(loose, source="x")
    with pytest.raises(RemoteProtocolError, match="at most"):
        parse_endpoint_evidence(bytes(EVIDENCE_MAX_BYTES + 1), source="x")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        parse_endpoint_evidence(data, source="x")


def openssl(*arguments: str | Path, data: bytes = b"") -> bytes:
    argv = ["openssl", *arguments]
    return subprocess.run(argv, input=data, capture_output=True, check=True).stdout


def test_a_key_digest_is_that_of_openssl() -> None:
    private, public = self_signed("localhost")
    key = openssl("x509", "-pubkey", "-noout", data=public)
    der = openssl("pkey", "-pubin", "-outform", "DER", data=key)
    assert key_digest_of_pem(private) == hashlib.sha256(der).digest()


def test_the_first_certificate_of_a_file_counts() -> None:
    first, second = self_signed("one"), self_signed("two")
    assert key_digest_of_pem(first[0] + second[1]) == key_digest_of_pem(first[1])
    assert key_digest_of_pem(second[1]) != key_digest_of_pem(first[1])


@pytest.mark.parametrize("pem", [b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_file_without_a_certificate_is_refused(pem: bytes) -> None:
    with pytest.raises(DataError, match="no certificate"):
        key_digest_of_pem(pem)


def test_a_certificate_of_an_unknown_version_is_refused() -> None:
    der = openssl("x509", "-outform", "DER", data=self_signed("localhost")[1])
    version = b"\xa0\x03\x02\x01"
    odd = der.replace(version + b"\x02", version + b"\x63", 1)
    assert odd != der
    with pytest.raises(DataError, match="not a certificate"):
        key_digest_of_der(odd)


@given(st.binary(max_size=100))
def test_bytes_that_are_no_certificate_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="not a certificate"):
        key_digest_of_der(data)


def test_a_key_in_an_unusual_encoding_is_refused(tmp_path: Path) -> None:
    """One key written in two ways would have two digests: of a compressed point there is none."""
    usual, key = tmp_path / "usual.pem", tmp_path / "key.pem"
    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", usual)
    openssl("ec", "-conv_form", "compressed", "-in", usual, "-out", key)
    request = ("req", "-x509", "-key", key, "-subj", "/CN=x")
    with pytest.raises(DataError):
        key_digest_of_pem(openssl(*request))
    with pytest.raises(DataError, match="unusual"):
        key_digest_of_der(openssl(*request, "-outform", "DER"))
