"""PEM files of TLS: what a running front may be given."""

from __future__ import annotations

import hashlib
import os
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core import tls_pem
from tdxd.errors import DataError
from tests.certificates import self_signed

BOTH, PUBLIC = self_signed("localhost")
KEY = BOTH.removesuffix(PUBLIC)
OTHER, OTHER_PUBLIC = self_signed("localhost")


def encrypted() -> bytes:
    key = load_pem_private_key(KEY, None)
    return key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")
    )


def test_the_certificate_that_is_shown_is_named_wherever_the_key_stands() -> None:
    der = x509.load_pem_x509_certificate(PUBLIC).public_bytes(Encoding.DER)
    expected = hashlib.sha256(der).hexdigest()
    for pem in (BOTH, PUBLIC + KEY, PUBLIC + OTHER_PUBLIC + KEY, b"x\n\n" + BOTH):
        assert tls_pem.server_certificate(pem) == expected


REFUSED = {
    b"": "no certificate",
    b"garbage": "no certificate",
    PUBLIC: "has 0 private keys",
    KEY: "no certificate",
    BOTH + KEY: "has 2 private keys",
    PUBLIC + OTHER.removesuffix(OTHER_PUBLIC): "is not the certificate's",
    PUBLIC + encrypted(): "cannot be used",
    PUBLIC + KEY.replace(b"M", b"A", 1): "cannot be used",
}


@pytest.mark.parametrize("pem", REFUSED, ids=REFUSED.values())
def test_what_no_server_could_use_is_refused(pem: bytes) -> None:
    with pytest.raises(DataError, match=REFUSED[pem]) as caught:
        tls_pem.server_certificate(pem)
    assert caught.value.__cause__ is None
    assert KEY.splitlines()[1].decode() not in str(caught.value)


GLUED = BOTH.replace(b"-----\n-----BEGIN", b"----------BEGIN")
UNREADABLE = {
    "two marks on one line": GLUED,
    "old line ends": BOTH.replace(b"\n", b"\r"),
    "indented": BOTH.replace(b"\n", b"\n  "),
    "junk behind": BOTH.rstrip(b"\n") + b"junk\n",
    "end behind content": BOTH.replace(b"\n-----END", b"-----END"),
}


def by_openssl(pem: bytes) -> None:
    """Load a file as HAProxy would."""
    fd = os.memfd_create("pem")
    try:
        os.write(fd, pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


@pytest.mark.parametrize("pem", UNREADABLE.values(), ids=UNREADABLE)
def test_what_openssl_reads_otherwise_is_refused(pem: bytes) -> None:
    with pytest.raises(ssl.SSLError):
        by_openssl(pem)
    with pytest.raises(DataError, match="PEM file"):
        tls_pem.server_certificate(pem)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" \n"])
def test_what_openssl_reads_is_taken(end: bytes) -> None:
    pem = (b"text\n" + BOTH).replace(b"\n", end)
    for one in (pem, pem.rstrip(), b"\xef\xbb\xbf" + BOTH.replace(b"\n", end)):
        assert tls_pem.blocks(one) == BOTH
        by_openssl(one)
        assert tls_pem.server_certificate(one) == tls_pem.server_certificate(BOTH)


def test_an_old_encrypted_key_is_refused() -> None:
    key = load_pem_private_key(KEY, None)
    old = key.private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"x")
    )
    assert b"DEK-Info: AES-256-CBC" in old
    with pytest.raises(DataError, match="cannot be used"):
        tls_pem.server_certificate(PUBLIC + old)


def test_very_many_marks_take_no_time() -> None:
    pem = b"-----BEGIN A-----\n-" * 50_000
    with pytest.raises(DataError, match="damaged"):
        tls_pem.authorities(pem)


def test_authorities_are_counted() -> None:
    assert tls_pem.authorities(PUBLIC + b"\n\ntext\n" + OTHER_PUBLIC) == 2
    with pytest.raises(DataError, match="no certificate"):
        tls_pem.authorities(KEY)


@given(st.sampled_from([b"\n", b"\r\n"]), st.lists(st.sampled_from([b"", b"text"])))
def test_a_payload_has_no_empty_line_and_nothing_but_blocks(
    end: bytes, between: list[bytes]
) -> None:
    pem = end.join([*between, KEY.replace(b"\n", end), *between, PUBLIC, *between])
    assert tls_pem.blocks(pem) == KEY + PUBLIC
