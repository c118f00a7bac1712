"""The simulator's own certificate authority: the shape of Intel's, never Intel's keys.

root CA → PCK platform CA → PCK leaf (with the SGX extension), and root CA → TCB signer. Keys are
made per installation, so a key server that trusts one simulator trusts no other.

Source: Intel SGX PCK Certificate and CRL Profile Specification, rev. 1.5; only shapes and names.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from tdxd.core.decode import decode
from tdxd.errors import DataError, HostError, UsageError
from tdxd.sim.sgx_extension import SGX_EXTENSION_OID, PckIdentity, sgx_extension

__all__ = ["TCB_SIGNER_NAME", "Pki", "Signer", "load_pki", "make_pki", "save_pki"]

TCB_SIGNER_NAME = "Intel SGX TCB Signing"
"""The common name that tells a signer of collateral from a PCK."""
_NAMES = {
    "root": "tdx-sim Root CA",
    "pck_ca": "tdx-sim PCK Platform CA",
    "pck": "tdx-sim PCK Certificate",
    "tcb_signer": TCB_SIGNER_NAME,
}
_ISSUERS = {"root": "root", "pck_ca": "root", "pck": "pck_ca", "tcb_signer": "root"}
_PATH_LENGTHS = {"root": 1, "pck_ca": 0}
_NOT_BEFORE = dt.datetime(2018, 1, 1, tzinfo=dt.UTC)
_NOT_AFTER = dt.datetime(2049, 12, 31, tzinfo=dt.UTC)
_ATTESTATION_KEY = "attestation"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Signer:
    """A P-256 key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        """Return the certificate as DER."""
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> str:
        """Return the certificate as PEM."""
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def sign_raw(self, message: bytes) -> bytes:
        """Return the 64-byte deterministic ECDSA signature r ‖ s of SHA-256(message)."""
        return sign_raw(self.key, message)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Pki:
    """All keys of one simulated platform; `attestation` is its quoting enclave's."""

    identity: PckIdentity
    root: Signer
    pck_ca: Signer
    pck: Signer
    tcb_signer: Signer
    attestation: ec.EllipticCurvePrivateKey

    @property
    def pck_chain_pem(self) -> str:
        """Return leaf, platform CA and root: what stands in a quote."""
        return self.pck.pem + self.pck_ca.pem + self.root.pem

    @property
    def pck_ca_chain_pem(self) -> str:
        """Return the issuer chain of the PCK CRL."""
        return self.pck_ca.pem + self.root.pem

    @property
    def tcb_chain_pem(self) -> str:
        """Return the issuer chain of TCB info and QE identity."""
        return self.tcb_signer.pem + self.root.pem


def sign_raw(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """Return the 64-byte deterministic ECDSA signature r ‖ s of SHA-256(message)."""
    algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    r, s = decode_dss_signature(key.sign(message, algorithm))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def public_raw(key: ec.EllipticCurvePublicKey) -> bytes:
    """Return the 64-byte public point x ‖ y."""
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def make_pki(identity: PckIdentity) -> Pki:
    """Make new keys and certificates; `identity` goes into the PCK certificate."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in _NAMES}
    signers = {
        name: Signer(key=key, certificate=_certificate(name, keys, identity))
        for name, key in keys.items()
    }
    attestation = ec.generate_private_key(ec.SECP256R1())
    return Pki(identity=identity, **signers, attestation=attestation)


def make_crl(
    issuer: Signer,
    *,
    number: int,
    this_update_s: int,
    next_update_s: int,
    revoked: Sequence[x509.Certificate] = (),
) -> bytes:
    """Return a CRL as DER; times are seconds since 1970."""
    this_update = _time(this_update_s)
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(this_update)
        .next_update(_time(next_update_s))
        .add_extension(x509.CRLNumber(number), critical=False)
        .add_extension(_authority(issuer.key), critical=False)
    )
    for certificate in revoked:
        entry = x509.RevokedCertificateBuilder()
        entry = entry.serial_number(certificate.serial_number)
        builder = builder.add_revoked_certificate(
            entry.revocation_date(this_update).build()
        )
    crl = builder.sign(issuer.key, hashes.SHA256(), ecdsa_deterministic=True)
    return crl.public_bytes(Encoding.DER)


def save_pki(pki: Pki, directory: Path) -> None:
    """Write keys (0600) and certificates into a new directory (0700).

    Raises: HostError; UsageError if the directory exists.
    """
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        hint = f"choose another directory, or remove {directory.parent}"
        text = f"{directory.parent} holds a platform already"
        raise UsageError(text, hint=hint) from None
    except OSError as exc:
        raise HostError.of("mkdir", str(directory), exc) from exc
    try:
        for name in _NAMES:
            signer: Signer = getattr(pki, name)
            _write_private(directory / f"{name}.key", signer.key)
            (directory / f"{name}.pem").write_text(signer.pem)
        _write_private(directory / f"{_ATTESTATION_KEY}.key", pki.attestation)
        (directory / "root.der").write_bytes(pki.root.der)
        (directory / "identity.json").write_text(json.dumps(_plain(pki.identity)))
    except OSError as exc:
        raise HostError.of("write", str(exc.filename or directory), exc) from exc


def load_pki(directory: Path) -> Pki:
    """Read what `save_pki` wrote.

    Raises: HostError, DataError.
    """
    try:
        signers = {
            name: Signer(
                key=_read_private(directory / f"{name}.key"),
                certificate=_read_certificate(directory / f"{name}.pem"),
            )
            for name in _NAMES
        }
        attestation = _read_private(directory / f"{_ATTESTATION_KEY}.key")
        identity = _read_identity(directory / "identity.json")
    except OSError as exc:
        hint = f"make the platform first: tdx-sim init {directory.parent}"
        path = str(exc.filename or directory)
        raise HostError.of("read", path, exc, hint=hint) from exc
    return Pki(identity=identity, **signers, attestation=attestation)


def _certificate(
    name: str, keys: dict[str, ec.EllipticCurvePrivateKey], identity: PckIdentity
) -> x509.Certificate:
    key, issuer = keys[name], keys[_ISSUERS[name]]
    digest = hashlib.sha256(public_raw(key.public_key())).digest()
    length = _PATH_LENGTHS.get(name)
    ca = length is not None
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .issuer_name(_subject(_ISSUERS[name]))
        .public_key(key.public_key())
        .serial_number(int.from_bytes(digest[:16], "big") | 1)
        .not_valid_before(_NOT_BEFORE)
        .not_valid_after(_NOT_AFTER)
        .add_extension(x509.BasicConstraints(ca, length), critical=True)
        .add_extension(_key_usage(ca=ca), critical=True)
        .add_extension(_authority(issuer), critical=False)
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
        )
    )
    if name == "pck":
        extension = x509.UnrecognizedExtension(
            x509.ObjectIdentifier(SGX_EXTENSION_OID), sgx_extension(identity)
        )
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(issuer, hashes.SHA256(), ecdsa_deterministic=True)


def _subject(name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, _NAMES[name]),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "tdx-sim: not Intel"),
        ]
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=not ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _authority(issuer: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())


def _time(seconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC)


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(pem)


def _read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except ValueError as exc:
        raise DataError(f"{path}: not a private key") from exc
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise DataError(f"{path}: not an elliptic curve key")
    return key


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as exc:
        raise DataError(f"{path}: not a certificate") from exc


def _plain(identity: PckIdentity) -> dict[str, object]:
    return {
        name: value.hex() if isinstance(value, bytes) else value
        for name, value in dataclasses.asdict(identity).items()
    }


def _read_identity(path: Path) -> PckIdentity:
    try:
        plain = json.loads(path.read_text())
        for name in ("ppid", "platform_instance_id", "fmspc", "pce_id", "cpu_svns"):
            plain[name] = bytes.fromhex(plain[name])
    except (ValueError, KeyError, TypeError) as exc:
        raise DataError(f"{path}: not the identity of a platform") from exc
    return decode(PckIdentity, plain, source=str(path), error=DataError)
