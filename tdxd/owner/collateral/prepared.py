"""One set of collateral, taken apart: its numbers, its times, and the roles of its signers.

dcap-qvl does not look at the role of the collateral's signer: any certificate below the root would
do, a platform's own PCK among them, and it reads PEM blocks of any label. So the signers' names
are checked here, and the chains are encoded anew from the very certificates that were checked.
Source of the signer's name: Intel DCAP quote verification library, TCBSigningChain.cpp.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from tdxd.core.check import Check
from tdxd.core.showing import LATEST_S, shown
from tdxd.errors import DataError

__all__ = [
    "CHAINS",
    "SET_MAX_CHARS",
    "X509_ERRORS",
    "Prepared",
    "common_names",
    "key_sha384",
    "prepare",
]

SIGNER_NAME = "Intel SGX TCB Signing"
_SIGNED_CHAINS = ("tcb_info_issuer_chain", "qe_identity_issuer_chain")
CHAINS = (*_SIGNED_CHAINS, "pck_crl_issuer_chain")
_TEXTS = ("tcb_info", "tcb_info_signature", "qe_identity", "qe_identity_signature")
_FIELDS = (*CHAINS, *_TEXTS, "root_ca_crl", "pck_crl")
SET_MAX_CHARS = 4 * 1024 * 1024
"""The largest set as JSON; Intel's have some twenty thousand characters."""
X509_ERRORS = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What `cryptography` says of certificates and lists; it reads most of them only when asked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A set of collateral; `parsed` is dcap-qvl's QuoteCollateralV3 of the `fields`.

    `signers` holds the checks of two roles, `gap_checks` all others: it may be used only if all
    passed, from `issued_s` (the latest issue in it) to before `expires_s` (the earliest
    nextUpdate). Times are unix seconds.
    """

    parsed: Any
    fields: Mapping[str, str] = dataclasses.field(repr=False)
    signers: tuple[Check, ...]
    fmspc: str
    issued: Mapping[str, int]
    expires: Mapping[str, int]
    tcb_evaluation: int
    qe_evaluation: int
    pck_crl_number: int
    root_crl_number: int
    gap_checks: tuple[Check, ...] = ()

    @property
    def issued_s(self) -> int:
        """Return when the youngest part was issued."""
        return max(self.issued.values())

    @property
    def expires_s(self) -> int:
        """Return when the first part expires."""
        return min(self.expires.values())

    @property
    def checks(self) -> tuple[Check, ...]:
        """Return every check made of this set."""
        return (*self.signers, *self.gap_checks)

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.ok for check in self.checks)


def prepare(collateral_json: str) -> Prepared:
    """Check the signers' roles, encode the chains anew, drop a PCK chain, read numbers and times.

    A wrong signer is no error here but a failed check, so that `explain` can show it.

    Raises: DataError for anything malformed.
    """
    if len(collateral_json) > SET_MAX_CHARS:
        raise DataError(
            f"collateral is malformed: {len(collateral_json)} characters, "
            f"at most {SET_MAX_CHARS}"
        )
    try:
        return _prepare(json.loads(collateral_json))
    except (*X509_ERRORS, KeyError, AttributeError, RecursionError) as exc:
        reason = f"no {exc}" if isinstance(exc, KeyError) else str(exc)
        raise DataError(f"collateral is malformed: {shown(reason, 200)}") from exc


def _prepare(given: dict[str, str]) -> Prepared:
    import dcap_qvl

    # Whatever else there is, a PCK chain that would override the quote's above all, is left out.
    fields = {name: given[name] for name in _FIELDS}
    signers = []
    for name in CHAINS:
        chain = x509.load_pem_x509_certificates(fields[name].encode())
        fields[name] = "".join(one.public_bytes(Encoding.PEM).decode() for one in chain)
        if name in _SIGNED_CHAINS:
            signers.append(_signer(name, chain[0]))
    tcb_info = json.loads(fields["tcb_info"])
    identity = json.loads(fields["qe_identity"])
    crls = {
        name: x509.load_der_x509_crl(bytes.fromhex(fields[name]))
        for name in ("pck_crl", "root_ca_crl")
    }
    documents = {"tcb_info": tcb_info, "qe_identity": identity}
    return Prepared(
        parsed=dcap_qvl.QuoteCollateralV3.from_json(json.dumps(fields)),
        fields=fields,
        signers=tuple(signers),
        fmspc=shown(str(tcb_info["fmspc"]).upper(), 40),
        issued={name: _time(one["issueDate"]) for name, one in documents.items()}
        | {name: int(crl.last_update_utc.timestamp()) for name, crl in crls.items()},
        expires={name: _time(one["nextUpdate"]) for name, one in documents.items()}
        | {name: _next_update(name, crl) for name, crl in crls.items()},
        tcb_evaluation=_number(tcb_info),
        qe_evaluation=_number(identity),
        pck_crl_number=_crl_number("pck_crl", crls["pck_crl"]),
        root_crl_number=_crl_number("root_ca_crl", crls["root_ca_crl"]),
    )


def _signer(chain_name: str, leaf: x509.Certificate) -> Check:
    names = common_names(leaf.subject)
    return Check(
        name=chain_name.replace("_issuer_chain", "_signer"),
        expected=SIGNER_NAME,
        actual=", ".join(names) or "no common name",
        ok=names == [SIGNER_NAME],
    )


def common_names(name: x509.Name) -> list[str]:
    """Return all common names in a distinguished name."""
    found = name.get_attributes_for_oid(NameOID.COMMON_NAME)
    return [shown(str(one.value), 80) for one in found]


def key_sha384(certificate: x509.Certificate) -> str:
    """Return the SHA-384 of the public point, as dcap-qvl names a root.

    Raises: ValueError for a key that is not on an elliptic curve, and `X509_ERRORS`.
    """
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("the key of a certificate is not on an elliptic curve")  # noqa: TRY004
    point = key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return hashlib.sha384(point).hexdigest()


def _time(text: str) -> int:
    moment = dt.datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"time {text!r} has no zone")
    at_s = int(moment.timestamp())
    if not 0 <= at_s < LATEST_S:
        raise ValueError(f"time {text!r} is not in the years 1970 to 9998")
    return at_s


def _number(document: dict[str, Any]) -> int:
    number = document["tcbEvaluationDataNumber"]
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError(f"tcbEvaluationDataNumber {number!r:.40}")
    return number


def _next_update(name: str, crl: x509.CertificateRevocationList) -> int:
    if crl.next_update_utc is None:
        raise ValueError(f"{name} has no nextUpdate")
    return int(crl.next_update_utc.timestamp())


def _crl_number(name: str, crl: x509.CertificateRevocationList) -> int:
    try:
        extension = crl.extensions.get_extension_for_class(x509.CRLNumber)
    except x509.ExtensionNotFound as exc:
        raise ValueError(f"{name} has no CRL number") from exc
    number = extension.value.crl_number
    if not 0 <= number < 2**63:
        raise ValueError(f"{name}: CRL number {number} does not fit 63 bits")
    return number
