"""Verifies a TDX quote with dcap-qvl, and closes what dcap-qvl 0.7 leaves to its caller.

The TCB status, the attributes and the measurements are judged per volume by `core.policy`: here
every status but `Revoked` passes on purpose, and so do dynamic platforms, SMT and cached keys,
which all cloud machines have. The gaps are listed and tested in tests/owner/test_appraise.py.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tdxd.core.policy import TCB_STATUSES, Check, VerifiedQuote
from tdxd.core.quote import Quote, TdReport, parse_quote
from tdxd.errors import ConfigError, EvidenceMalformedError
from tdxd.owner.collateral import Prepared

__all__ = [
    "INTEL_ROOT_KEY_SHA384",
    "Appraisal",
    "PckIdentity",
    "TrustedRoot",
    "appraise",
    "intel_root",
    "load_root",
    "read_pck_identity",
    "read_quote",
]

INTEL_ROOT_KEY_SHA384 = (
    "46e403bd34f05a3f2817ab9badcaacc7ffc98e0f261008cd30dae936cace18d5"
    "dcf58eef31463613de1570d516200993"
)
"""SHA-384 of the key of Intel's SGX Root CA, as dcap-qvl names it."""
_AGES_S = 100 * 365 * 86400
"""Grace period of old TCB levels: none is refused here, the policy of each volume decides."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrustedRoot:
    """A root CA: `der` is None for Intel's, which dcap-qvl carries."""

    name: str
    der: bytes | None
    key_sha384: str
    simulated: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PckIdentity:
    """What the certificate chain in a quote claims: which collateral to get, which root to try."""

    fmspc: str
    ca: str
    root_name: str
    root_key_sha384: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Appraisal:
    """The outcome: every check, and what was proved if all of them passed."""

    checks: tuple[Check, ...]
    verified: VerifiedQuote | None


def intel_root() -> TrustedRoot:
    """Return Intel's production root."""
    return TrustedRoot(
        name="Intel SGX Root CA",
        der=None,
        key_sha384=INTEL_ROOT_KEY_SHA384,
        simulated=False,
    )


def load_root(certificate: bytes, *, simulated: bool, source: str) -> TrustedRoot:
    """Read another root CA, PEM or DER.

    It must be self-issued: dcap-qvl ends the whole process for one that is not.

    Raises: ConfigError.
    """
    try:
        if certificate.lstrip().startswith(b"-----BEGIN"):
            root = x509.load_pem_x509_certificate(certificate)
        else:
            root = x509.load_der_x509_certificate(certificate)
        root.verify_directly_issued_by(root)
        key_sha384 = _key_sha384(root)
    except (ValueError, TypeError, InvalidSignature) as exc:
        raise ConfigError(f"{source} is not a self-signed root certificate") from exc
    return TrustedRoot(
        name=root.subject.rfc4514_string(),
        der=root.public_bytes(Encoding.DER),
        key_sha384=key_sha384,
        simulated=simulated,
    )


def _key_sha384(certificate: x509.Certificate) -> str:
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("the key of a certificate is not on an elliptic curve")  # noqa: TRY004
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return hashlib.sha384(point).hexdigest()


def read_quote(data: bytes) -> tuple[Quote, bytes]:
    """Take a quote apart; also return it without the zeros that some platforms append.

    Raises: EvidenceMalformedError for anything that is not a TDX quote of version 4 or 5, and for
    bytes other than zero after its end.
    """
    exact = _without_padding(data)
    return parse_quote(exact), exact


def _without_padding(data: bytes) -> bytes:
    body_bytes = 584
    if int.from_bytes(data[:2], "little") == 5:
        body_bytes = 6 + int.from_bytes(data[50:54], "little")
    at = 48 + body_bytes
    end = at + 4 + int.from_bytes(data[at : at + 4], "little")
    return data if any(data[end:]) else data[:end]


def read_pck_identity(quote: bytes) -> PckIdentity:
    """Read whose quote this claims to be; nothing of it is believed.

    Raises: EvidenceMalformedError.
    """
    import dcap_qvl

    try:
        chain = dcap_qvl.parse_quote(quote).cert_chain_pem_bytes()
        if chain is None:
            raise ValueError("no PCK certificate chain")
        return _identity_of(bytes(chain))
    except ValueError as exc:
        raise EvidenceMalformedError(f"quote: {exc}") from exc


@functools.lru_cache(maxsize=256)
def _identity_of(chain_pem: bytes) -> PckIdentity:
    import dcap_qvl

    certificates = x509.load_pem_x509_certificates(chain_pem.rstrip(b"\0"))
    extension = dcap_qvl.parse_pck_extension_from_pem(chain_pem)
    issuer = certificates[0].issuer.rfc4514_string()
    return PckIdentity(
        fmspc=bytes(extension.fmspc).hex().upper(),
        ca="processor" if "Processor" in issuer else "platform",
        root_name=certificates[-1].subject.rfc4514_string(),
        root_key_sha384=_key_sha384(certificates[-1]),
    )


def appraise(
    quote: bytes, report: TdReport, prepared: Prepared, now_s: int, root: TrustedRoot
) -> Appraisal:
    """Verify a quote against a root and collateral as of `now_s` (unix time, the server's).

    `report` is what `read_quote` found in it: the verified report must say the same.
    """
    genuine = f"signed under {root.name}"
    if not all(check.ok for check in prepared.signers):
        unknown = Check(name="quote", expected=genuine, actual="not tried", ok=False)
        return Appraisal(checks=(*prepared.signers, unknown), verified=None)
    claims, why_not = _verify(quote, prepared, now_s, root)
    if claims is None:
        failed = Check(name="quote", expected=genuine, actual=why_not, ok=False)
        return Appraisal(checks=(*prepared.signers, failed), verified=None)
    verified = _verified(claims, root)
    same = _same_report(verified.report, report)
    key = verified.root_key_sha384
    checks = (
        *prepared.signers,
        Check(
            name="quote",
            expected=genuine,
            actual=genuine if same else "signed, but read differently by dcap-qvl",
            ok=same,
        ),
        Check(
            name="root_key",
            expected=root.key_sha384,
            actual=key,
            ok=key == root.key_sha384,
        ),
    )
    passed = all(check.ok for check in checks)
    return Appraisal(checks=checks, verified=verified if passed else None)


def _verify(
    quote: bytes, prepared: Prepared, now_s: int, root: TrustedRoot
) -> tuple[dict[str, Any] | None, str]:
    """Return the claims, or None and the whole cause."""
    import dcap_qvl

    policy = (
        dcap_qvl.QuotePolicy.strict(now_s)
        .allow_dynamic_platform(True)
        .allow_smt(True)
        .allow_cached_keys(True)
        .platform_grace_period(_AGES_S)
        .qe_grace_period(_AGES_S)
    )
    for status in TCB_STATUSES:
        policy = policy.allow_status(status)
    try:
        found = _verifier(root.der).verify_with_policy(
            quote, prepared.parsed, now_s, policy
        )
    except ValueError as exc:
        cause = _diagnose(quote, prepared, now_s, root) or str(exc)
        return None, " ".join(cause.split())
    claims = json.loads(found.to_json())
    if claims["tee_type"] != 0x81:
        return None, f"TEE type {claims['tee_type']:#x} is not TDX"
    return claims, ""


@functools.lru_cache(maxsize=8)
def _verifier(root_der: bytes | None) -> Any:
    import dcap_qvl

    return dcap_qvl.QuoteVerifier(root_der)


def _diagnose(quote: bytes, prepared: Prepared, now_s: int, root: TrustedRoot) -> str:
    """Ask again by the call whose messages carry the causes."""
    import dcap_qvl

    try:
        if root.der is None:
            dcap_qvl.verify(quote, prepared.parsed, now_s)
        else:
            dcap_qvl.verify_with_root_ca(quote, prepared.parsed, root.der, now_s)
    except ValueError as exc:
        return str(exc)
    return ""


_CLAIM_NAMES = tuple(f"rt_mr{index}" for index in range(4))


def _verified(claims: dict[str, Any], root: TrustedRoot) -> VerifiedQuote:
    fields: dict[str, Any] = {}
    (layer,) = claims["report"].values()
    while layer:  # TD 1.5 and 1.5-ex wrap the older layouts as `base`
        fields |= {key: value for key, value in layer.items() if key != "base"}
        layer = layer.get("base")
    names = {field.name for field in dataclasses.fields(TdReport)} - {"rtmrs"}
    plain: dict[str, Any] = {
        name: bytes.fromhex(value) if isinstance(value, str) else value
        for name, value in fields.items()
        if name in names
    }
    rtmr0, rtmr1, rtmr2, rtmr3 = (bytes.fromhex(fields[key]) for key in _CLAIM_NAMES)
    pck = claims["platform"]["pck"]
    return VerifiedQuote(
        report=TdReport(rtmrs=(rtmr0, rtmr1, rtmr2, rtmr3), **plain),
        tcb_status=claims["tcb"]["status"],
        advisory_ids=tuple(claims["tcb"]["advisory_ids"]),
        tcb_evaluation=claims["tcb"]["eval_data_number"],
        ppid=bytes(pck["ppid"]).hex(),
        fmspc=bytes(pck["fmspc"]).hex().upper(),
        root_key_sha384=bytes(claims["platform"]["root_key_id"]).hex(),
        simulated=root.simulated,
    )


def _same_report(verified: TdReport, parsed: TdReport) -> bool:
    return all(
        getattr(verified, field.name) == getattr(parsed, field.name)
        for field in dataclasses.fields(TdReport)
    )
