"""PEM files of TLS: what a running front may be given."""

from __future__ import annotations

import hashlib

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
