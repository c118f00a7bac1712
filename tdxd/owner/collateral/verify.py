"""Verifies a set of collateral by itself, without a quote: signatures, roles, revocation, scope.

dcap-qvl verifies the same signatures with each quote; here they are verified once, when a set
comes in, because what is not proved to be Intel's must neither be kept nor raise a floor: a lying
PCCS could lock the owner out for good with one invented number.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
from collections.abc import Callable

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from tdxd.core.check import Check
from tdxd.core.showing import shown
from tdxd.owner.collateral.prepared import (
    CHAINS,
    X509_ERRORS,
    Prepared,
    common_names,
    key_sha384,
)

__all__ = ["Trust", "verify_set"]

_SIGNATURE_BYTES = 64
_CA_NAMES = {"platform": "PCK Platform CA", "processor": "PCK Processor CA"}
_DOCUMENTS = {
    "tcb_info": ("TDX", 3),
    "qe_identity": ("TD_QE", 2),
}
"""Source: Intel PCS API v4, TCB info V3 and enclave identity V2: `id` and `version`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """The root that everything must be signed under; `key_sha384` is of its public point."""

    name: str
    key_sha384: str


class _Refused(Exception):  # noqa: N818  # says why, never leaves this module
    """Something is not as it must be; the text says what."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The X.509 parts of a set."""

    chains: dict[str, list[x509.Certificate]]
    root_crl: x509.CertificateRevocationList
    pck_crl: x509.CertificateRevocationList


def verify_set(
    prepared: Prepared, *, trust: Trust, fmspc: str, ca: str, now_s: float
) -> tuple[Check, ...]:
    """Return one check for each way in which a set can fail to be what was asked for."""
    try:
        return _verify(prepared, trust, fmspc, ca, now_s)
    except X509_ERRORS as exc:
        return (
            Check(
                name="collateral_signature",
                expected=f"all parts signed under {trust.name}",
                actual=f"unreadable: {shown(str(exc), 200)}",
                ok=False,
            ),
        )


def _verify(
    prepared: Prepared, trust: Trust, fmspc: str, ca: str, now_s: float
) -> tuple[Check, ...]:
    fields = prepared.fields
    parts = _Parts(
        chains={
            name: x509.load_pem_x509_certificates(fields[name].encode())
            for name in CHAINS
        },
        root_crl=x509.load_der_x509_crl(bytes.fromhex(fields["root_ca_crl"])),
        pck_crl=x509.load_der_x509_crl(bytes.fromhex(fields["pck_crl"])),
    )
    return (
        _scope(prepared, fmspc),
        _pck_crl_issuer(parts, ca),
        _root_crl_issuer(parts, trust),
        _signatures(prepared, parts, trust, now_s),
        _revocation(parts),
    )


def _scope(prepared: Prepared, fmspc: str) -> Check:
    wanted = f"TDX 3 for {fmspc}, TD_QE 2"
    found = {
        name: (document.get("id"), document.get("version"))
        for name in _DOCUMENTS
        for document in (json.loads(prepared.fields[name]),)
    }
    (tcb_id, tcb_version), (qe_id, qe_version) = found["tcb_info"], found["qe_identity"]
    actual = shown(
        f"{tcb_id!s:.20} {tcb_version!s:.20} for {prepared.fmspc}, "
        f"{qe_id!s:.20} {qe_version!s:.20}",
        160,
    )
    ok = found == _DOCUMENTS and prepared.fmspc == fmspc
    return Check(name="collateral_scope", expected=wanted, actual=actual, ok=ok)


def _pck_crl_issuer(parts: _Parts, ca: str) -> Check:
    authority = parts.chains["pck_crl_issuer_chain"][0]
    names = common_names(parts.pck_crl.issuer)
    wanted = _CA_NAMES[ca]
    return Check(
        name="pck_crl_issuer",
        expected=f"a {wanted}",
        actual=", ".join(names) or "no common name",
        ok=parts.pck_crl.issuer == authority.subject
        and len(names) == 1
        and names[0].endswith(wanted),
    )


def _root_crl_issuer(parts: _Parts, trust: Trust) -> Check:
    names = common_names(parts.root_crl.issuer)
    roots = {chain[-1].subject for chain in parts.chains.values()}
    return Check(
        name="root_crl_issuer",
        expected=trust.name,
        actual=", ".join(names) or "no common name",
        ok=roots == {parts.root_crl.issuer},
    )


def _signatures(prepared: Prepared, parts: _Parts, trust: Trust, now_s: float) -> Check:
    """Verify every chain, both CRLs and both documents; name all that fail."""
    chains, fields = parts.chains, prepared.fields
    root = chains["pck_crl_issuer_chain"][-1]
    pck_ca = chains["pck_crl_issuer_chain"][0]
    tries: dict[str, Callable[[], None]] = {
        name: functools.partial(
            _chain, chain, trust, now_s, ca=name == "pck_crl_issuer_chain"
        )
        for name, chain in chains.items()
    }
    tries["root_ca_crl"] = functools.partial(_crl, parts.root_crl, root)
    tries["pck_crl"] = functools.partial(_crl, parts.pck_crl, pck_ca)
    for name in _DOCUMENTS:
        tries[name] = functools.partial(
            _document,
            fields[name],
            fields[f"{name}_signature"],
            chains[f"{name}_issuer_chain"][0],
        )
    found = {name: _why_not(one) for name, one in tries.items()}
    wrong = [f"{name}: {text}" for name, text in found.items() if text]
    genuine = f"all parts signed under {trust.name}"
    return Check(
        name="collateral_signature",
        expected=genuine,
        actual="; ".join(wrong) or genuine,
        ok=not wrong,
    )


def _revocation(parts: _Parts) -> Check:
    revoked = sorted(
        {
            ", ".join(common_names(certificate.subject))
            for chain in parts.chains.values()
            for certificate in chain
            if parts.root_crl.get_revoked_certificate_by_serial_number(
                certificate.serial_number
            )
            is not None
        }
    )
    return Check(
        name="collateral_revocation",
        expected="no signer revoked",
        actual=f"revoked: {'; '.join(revoked)}" if revoked else "no signer revoked",
        ok=not revoked,
    )


def _why_not(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except InvalidSignature:
        return "wrong signature"
    except _Refused as exc:
        return str(exc)
    except X509_ERRORS as exc:
        return str(exc) or type(exc).__name__
    return ""


def _chain(
    chain: list[x509.Certificate], trust: Trust, now_s: float, *, ca: bool
) -> None:
    if len(chain) != 2:
        raise _Refused(f"{len(chain)} certificates, not the signer and the root")
    leaf, root = chain
    if key_sha384(root) != trust.key_sha384:
        raise _Refused("ends at another root")
    root.verify_directly_issued_by(root)
    leaf.verify_directly_issued_by(root)
    now = dt.datetime.fromtimestamp(now_s, dt.UTC)
    for one in chain:
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            raise _Refused(f"{', '.join(common_names(one.subject))} is not valid now")
    constraints = leaf.extensions.get_extension_for_class(x509.BasicConstraints).value
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage).value
    if constraints.ca is not ca or not (
        usage.crl_sign if ca else usage.digital_signature
    ):
        raise _Refused("the signer's certificate is for other uses")


def _crl(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> None:
    if crl.issuer != issuer.subject:
        raise _Refused("of another issuer")
    if not crl.is_signature_valid(_public_key(issuer)):
        raise _Refused("wrong signature")


def _document(text: str, signature_hex: str, signer: x509.Certificate) -> None:
    raw = bytes.fromhex(signature_hex)
    if len(raw) != _SIGNATURE_BYTES:
        raise _Refused(f"signature of {len(raw)} bytes, not {_SIGNATURE_BYTES}")
    r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
    der = encode_dss_signature(r, s)
    _public_key(signer).verify(der, text.encode(), ec.ECDSA(hashes.SHA256()))


def _public_key(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise _Refused("a key that is not on P-256")
    return key
