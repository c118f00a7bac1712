"""What is checked of a content before it is stored, with certificates of every wrong kind."""

from __future__ import annotations

import datetime as dt

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from tdxd.errors import DataError
from tdxd.owner.sealing.certs import make_server_certificate
from tdxd.owner.secret_content import check_content

NOW = dt.datetime(2026, 6, 1, tzinfo=dt.UTC)
DAY = dt.timedelta(days=1)
EC = ec.generate_private_key(ec.SECP256R1())


def name(text):
    return x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, text)])


def certificate(
    subject, key, issuer, issuer_key, *, ca=False, usage=None, days=(-10, 365)
):
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW + days[0] * DAY)
        .not_valid_after(NOW + days[1] * DAY)
    )
    if ca is not None:
        basic = x509.BasicConstraints(ca=ca, path_length=None)
        builder = builder.add_extension(basic, critical=True)
    if usage is not None:
        made = x509.KeyUsage(
            digital_signature=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=usage,
            crl_sign=False,
            encipher_only=False,
            decipher_only=False,
        )
        builder = builder.add_extension(made, critical=True)
    algorithm = (
        None if isinstance(issuer_key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    )
    return builder.sign(issuer_key, algorithm)


def pem(one):
    if isinstance(one, x509.Certificate):
        return one.public_bytes(serialization.Encoding.PEM)
    return one.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


ROOT_KEY = ec.generate_private_key(ec.SECP384R1())
BETWEEN_KEY = ed25519.Ed25519PrivateKey.generate()
ROOT = certificate("root", ROOT_KEY, "root", ROOT_KEY, ca=True, usage=True)
BETWEEN = certificate("between", BETWEEN_KEY, "root", ROOT_KEY, ca=True)
LEAF = certificate("leaf", EC, "between", BETWEEN_KEY)
CHAIN = pem(LEAF) + pem(BETWEEN) + pem(ROOT)
KEY = pem(EC)


def check(content, data):
    return check_content(content, data, source="f.pem", now=NOW)


def refused(content, data):
    with pytest.raises(DataError) as caught:
        check(content, data)
    said = f"{caught.value.message} {caught.value.hint}"
    for cause in (caught.value.__cause__, caught.value.__context__):
        said += repr(cause)
    for line in data.splitlines():
        if len(line) > 30 and not line.startswith(b"-----"):
            assert line.decode("latin-1") not in said
    return caught.value.message


# --- a key with its certificates ----------------------------------------------


@pytest.mark.parametrize(
    "data", [KEY + CHAIN, CHAIN + KEY, b"a comment\n" + KEY + b"\n\n" + CHAIN]
)
def test_a_key_with_its_chain(data):
    found = check("tls-pem", data)
    assert found.summary == "certificate of CN=leaf, valid to 2027-06-01"
    assert found.warnings == ()


@pytest.mark.parametrize("content", ["tls-pem", "client-ca"])
def test_files_that_were_joined_without_a_line_end(content):
    """OpenSSL reads no such file, though other parsers do: it must not show in the guest."""
    good = KEY + CHAIN if content == "tls-pem" else pem(ROOT) + pem(BETWEEN)
    glued = good.replace(b"-----\n-----BEGIN", b"----------BEGIN", 1)
    assert "not PEM, or damaged" in refused(content, glued)


def test_what_tdx_seal_makes():
    both, _ = make_server_certificate(("localhost", "127.0.0.1"))
    assert "CN=localhost" in check("tls-pem", both).summary


@pytest.mark.parametrize("form", ["TraditionalOpenSSL", "PKCS8"])
@pytest.mark.parametrize("kind", ["rsa", "ec"])
def test_other_forms_of_a_key(form, kind):
    key = EC if kind == "ec" else rsa.generate_private_key(65537, 2048)
    own = certificate("own", key, "own", key, ca=None)
    text = key.private_bytes(
        serialization.Encoding.PEM,
        getattr(serialization.PrivateFormat, form),
        serialization.NoEncryption(),
    )
    assert check("tls-pem", text + pem(own)).warnings == ()


def test_parameters_of_a_curve_may_stand_before_the_key():
    parameters = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    assert check("tls-pem", parameters + KEY + CHAIN).warnings == ()


def test_a_key_that_is_not_the_certificates():
    other = pem(ec.generate_private_key(ec.SECP256R1()))
    assert refused("tls-pem", other + CHAIN) == (
        "f.pem: the private key is not that of the first certificate"
    )


def test_the_servers_own_certificate_comes_first():
    text = refused("tls-pem", KEY + pem(BETWEEN) + pem(LEAF) + pem(ROOT))
    assert text.endswith("not that of the first certificate, but of certificate 2")


@pytest.mark.parametrize(
    "rest", [(ROOT, BETWEEN), (BETWEEN, BETWEEN, ROOT), (BETWEEN, LEAF)]
)
def test_each_certificate_is_signed_by_the_next(rest):
    data = KEY + pem(LEAF) + b"".join(pem(one) for one in rest)
    assert "is not signed by the one after it" in refused("tls-pem", data)


def test_a_certificate_that_only_names_its_issuer():
    forged = certificate("leaf", EC, "between", EC)
    assert "is not signed by" in refused("tls-pem", KEY + pem(forged) + pem(BETWEEN))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (CHAIN, "f.pem: 0 private keys, not one"),
        (KEY + KEY + CHAIN, "f.pem: 2 private keys, not one"),
        (KEY, "f.pem: holds no certificate"),
        (b"secret words", "f.pem: not PEM, or damaged"),
        (KEY[:-20] + CHAIN, "f.pem: not PEM, or damaged"),
        (b"", "f.pem: nothing, not 1 to 65536 bytes"),
        (KEY + CHAIN + b"\n" * 65536, "not 1 to 65536 bytes"),
        (
            b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n"
            + CHAIN,
            "f.pem: a key is malformed, or of an unknown kind",
        ),
        (
            KEY + b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
            "f.pem: certificate 1 is malformed",
        ),
        (
            KEY + CHAIN + b"-----BEGIN OTHER-----\nAAAA\n-----END OTHER-----\n",
            "f.pem: holds a block 'OTHER'",
        ),
    ],
)
def test_what_is_no_key_with_certificates(data, text):
    assert text in refused("tls-pem", data)


@pytest.mark.parametrize("form", ["TraditionalOpenSSL", "PKCS8"])
def test_an_encrypted_key_is_told(form):
    locked = EC.private_bytes(
        serialization.Encoding.PEM,
        getattr(serialization.PrivateFormat, form),
        serialization.BestAvailableEncryption(b"x"),
    )
    assert refused("tls-pem", locked + CHAIN) == "f.pem: the private key is encrypted"


@pytest.mark.parametrize(
    ("days", "text"),
    [
        ((-20, -5), "certificate of CN=own expired on 2026-05-27"),
        ((5, 20), "certificate of CN=own is valid from 2026-06-06"),
        ((-20, 5), "certificate of CN=own expires on 2026-06-06"),
    ],
)
def test_dates_are_a_warning_only(days, text):
    """The guest's clock is the host's, and the owner's may be wrong."""
    own = certificate("own", EC, "own", EC, ca=True, days=days)
    assert check("tls-pem", KEY + pem(own)).warnings == (text,)
    assert check("client-ca", pem(own)).warnings == (text,)


# --- the certificates that sign those of clients ------------------------------


def test_authorities_of_clients():
    assert check("client-ca", pem(ROOT) + pem(BETWEEN)).summary == (
        "CA CN=root, CN=between"
    )


@pytest.mark.parametrize(
    "fields", [{"ca": False}, {"ca": None}, {"ca": True, "usage": False}]
)
def test_what_may_sign_nobody_is_no_authority(fields):
    one = certificate("one", EC, "one", EC, **fields)
    text = refused("client-ca", pem(ROOT) + pem(one))
    assert text == "f.pem: certificate 2 (CN=one) is not that of a CA"


def test_the_key_of_an_authority_stays_with_its_owner():
    assert "which no guest may have" in refused("client-ca", pem(ROOT_KEY) + pem(ROOT))


# --- any bytes ------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=300))
def test_a_file_is_any_bytes_and_nothing_else_crashes(data):
    assert check("file", data).summary == f"{len(data)} bytes"
    for content in ("tls-pem", "client-ca"):
        with pytest.raises(DataError):
            check(content, data)


@given(st.data())
def test_damaged_pem_is_refused_or_means_the_same(data):
    """A byte more or less never ends in anything but a refusal or an accepted file."""
    whole = bytearray(KEY + CHAIN)
    where = data.draw(st.integers(0, len(whole) - 1))
    whole[where] = data.draw(st.integers(0, 255))
    try:
        found = check("tls-pem", bytes(whole))
    except DataError:
        return
    assert "CN=" in found.summary
