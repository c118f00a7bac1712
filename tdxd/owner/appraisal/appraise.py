"""Verifies a TDX quote with dcap-qvl, and closes what dcap-qvl 0.7 leaves to its caller.

The TCB status and its age, the platform's properties, the attributes and the measurements are
judged per volume by `core.appraisal`: here every status but `Revoked` passes on purpose, and so do
dynamic platforms, SMT and cached keys. What is checked here holds for every volume. The gaps are
listed by number, each with its test, in tests/owner/test_gaps.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding

from tdxd.core.appraisal import VerifiedQuote
from tdxd.core.check import Check, failed, passed
from tdxd.core.policy import TCB_STATUSES
from tdxd.core.quote import TEE_TYPE_TDX, Quote, TdReport, parse_quote
from tdxd.core.showing import shown, when
from tdxd.errors import ConfigError, EvidenceMalformedError
from tdxd.owner.appraisal.claims import read_claims
from tdxd.owner.collateral.prepared import X509_ERRORS, Prepared, key_sha384

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
_NAME_MAX_CHARS = 80
_CAUSE_MAX_CHARS = 400
_CHAIN = ("the PCK", "its CA", "the root")
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
    """What the certificate chain in a quote claims: which collateral to get, which root to try.

    `fmspc` is upper-case hex, as PCS spells it; `ppid` lower-case, as policies do. `forged` says
    why it is no chain, or is empty: then whoever trusts the root's key may believe all the rest
    of this, except that it is of today, and this quote's.
    """

    fmspc: str
    ca: str
    ppid: str
    root_name: str
    root_key_sha384: str
    forged: str


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
        root_key_sha384 = key_sha384(root)
    except (*X509_ERRORS, InvalidSignature) as exc:
        raise ConfigError(f"{source} is not a self-signed root certificate") from exc
    return TrustedRoot(
        name=root.subject.rfc4514_string(),
        der=root.public_bytes(Encoding.DER),
        key_sha384=root_key_sha384,
        simulated=simulated,
    )


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
    """Read whose quote this claims to be: see `PckIdentity` for what may be believed.

    Raises: EvidenceMalformedError.
    """
    import dcap_qvl

    try:
        chain = dcap_qvl.parse_quote(quote).cert_chain_pem_bytes()
        if chain is None:
            raise ValueError("no PCK certificate chain")
        return _identity_of(bytes(chain))
    except X509_ERRORS as exc:
        text = f"quote: {shown(str(exc), _CAUSE_MAX_CHARS)}"
        raise EvidenceMalformedError(text) from exc


@functools.lru_cache(maxsize=256)
def _identity_of(chain_pem: bytes) -> PckIdentity:
    import dcap_qvl

    certificates = x509.load_pem_x509_certificates(chain_pem.rstrip(b"\0"))
    # Encoded anew: dcap-qvl reads PEM blocks of any label, and this must be the same certificate.
    leaf = certificates[0].public_bytes(Encoding.PEM)
    extension = dcap_qvl.parse_pck_extension_from_pem(leaf)
    issuer = certificates[0].issuer.rfc4514_string()
    return PckIdentity(
        fmspc=bytes(extension.fmspc).hex().upper(),
        ca="processor" if "Processor" in issuer else "platform",
        ppid=bytes(extension.ppid).hex(),
        root_name=shown(certificates[-1].subject.rfc4514_string(), _NAME_MAX_CHARS),
        root_key_sha384=key_sha384(certificates[-1]),
        forged=_why_forged(certificates),
    )


def _why_forged(chain: list[x509.Certificate]) -> str:
    """Say which certificate is not signed by the next, the root by itself.

    dcap-qvl verifies the chain with the quote, but only after collateral was got for the FMSPC:
    without this, whoever invents one makes the server ask Intel for it.
    """
    if len(chain) != len(_CHAIN):
        return f"{len(chain)} certificates, not {', '.join(_CHAIN)}"
    for name, one, issuer in zip(_CHAIN, chain, (*chain[1:], chain[-1]), strict=True):
        try:
            one.verify_directly_issued_by(issuer)
        except InvalidSignature:
            return f"{name} is not signed by the next certificate"
        except X509_ERRORS as exc:
            return f"{name}: {shown(str(exc), _NAME_MAX_CHARS)}"
    return ""


def appraise(
    quote: bytes, report: TdReport, prepared: Prepared, now_s: int, root: TrustedRoot
) -> Appraisal:
    """Verify a quote against a root and collateral as of `now_s` (unix time, the server's).

    `report` is what `read_quote` found in it: the verified report must say the same.
    """
    genuine = f"signed under {root.name}"
    before = (*prepared.signers, *prepared.gap_checks)
    if not all(check.ok for check in before):
        unknown = failed("quote", genuine, "not tried")
        return Appraisal(checks=(*before, unknown), verified=None)
    claims, why_not = _verify(quote, prepared, now_s, root)
    if claims is None:
        return Appraisal(
            checks=(*before, failed("quote", genuine, why_not)), verified=None
        )
    verified = read_claims(claims, now_s, simulated=root.simulated)
    checks = (
        *before,
        _read_alike(genuine, same=verified.report == _plain_report(report)),
        _pck_chain(verified, read_pck_identity(quote)),
        *_common_checks(claims, prepared, now_s),
        Check(
            name="root_key",
            expected=root.key_sha384,
            actual=verified.root_key_sha384,
            ok=verified.root_key_sha384 == root.key_sha384,
        ),
    )
    good = all(check.ok for check in checks)
    return Appraisal(checks=checks, verified=verified if good else None)


def _read_alike(genuine: str, *, same: bool) -> Check:
    if same:
        return passed("quote", genuine, genuine)
    return failed("quote", genuine, "signed, but read differently by dcap-qvl")


def _pck_chain(verified: VerifiedQuote, own: PckIdentity) -> Check:
    """Collateral could carry a PCK chain, which dcap-qvl would take instead of the quote's."""
    expected = f"PPID {own.ppid}, FMSPC {own.fmspc} of the quote's own chain"
    actual = f"PPID {verified.ppid}, FMSPC {verified.fmspc}"
    same = (verified.ppid, verified.fmspc) == (own.ppid, own.fmspc)
    return Check(name="pck_chain", expected=expected, actual=actual, ok=same)


def _common_checks(
    claims: dict[str, Any], prepared: Prepared, now_s: int
) -> tuple[Check, ...]:
    """Check what dcap-qvl reports and does not judge, and no policy may allow."""
    kind = claims["tee_type"]
    issued_s, expires_s = (
        claims["latest_issue_date"],
        claims["earliest_expiration_date"],
    )
    tail = claims["qe"]["report"]["report_data"][64:]
    pce = _pce_of(prepared.fields["tcb_info"])
    pce_id = bytes(claims["platform"]["pck"]["pce_id"]).hex()
    return (
        Check(
            name="tee_type",
            expected=f"{TEE_TYPE_TDX:#x} (TDX)",
            actual=f"{kind:#x}",
            ok=kind == TEE_TYPE_TDX,
        ),
        Check(
            name="clock",
            expected=f"{when(issued_s)} to {when(expires_s)}, as the collateral",
            actual=f"{when(now_s)}, the server's own",
            ok=issued_s <= now_s < expires_s,
        ),
        Check(
            name="pce_id",
            expected=f"{pce} in the TCB info",
            actual=f"{pce_id} (type 0) in the PCK certificate",
            ok=pce == f"{pce_id} (type 0)",
        ),
        Check(
            name="unused_fields",
            expected="zero after the hash in the QE's report data; nothing else is read",
            actual=tail if tail.strip("0") else "zero",
            ok=not tail.strip("0"),
        ),
    )


@functools.lru_cache(maxsize=64)
def _pce_of(tcb_info: str) -> str:
    """Return PCEID and type of a TCB info: how its SVNs are to be compared."""
    fields = json.loads(tcb_info)
    return f"{str(fields.get('pceId')).lower()} (type {fields.get('tcbType')})"


def _verify(
    quote: bytes, prepared: Prepared, now_s: int, root: TrustedRoot
) -> tuple[dict[str, Any] | None, str]:
    """Return the claims, or None and the whole cause."""
    try:
        found = _verifier(root.der).verify_with_policy(
            quote, prepared.parsed, now_s, _policy(now_s)
        )
    except ValueError as exc:
        cause = _diagnose(quote, prepared, now_s, root) or str(exc)
        return None, shown(" ".join(cause.split()), _CAUSE_MAX_CHARS)
    return json.loads(found.to_json()), ""


@functools.lru_cache(maxsize=2)  # it takes as long to make as a signature to check
def _policy(now_s: int) -> Any:
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
    return policy


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


_REPORT_NAMES = tuple(field.name for field in dataclasses.fields(TdReport))


def _plain_report(report: TdReport) -> TdReport:
    return TdReport(**{name: getattr(report, name) for name in _REPORT_NAMES})
