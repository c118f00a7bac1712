"""Judges one request, cheapest checks first: what holds for all volumes, then each volume itself.

Default deny: a volume is released only if every check of its table passed. Checks of one stage are
all made, so that a denial shows everything that is wrong; a later stage is not entered once an
earlier one failed, with one exception: where the quote does not verify, the policies are still
compared with what it claims, for the owner's eyes only.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Mapping, Sequence

from tdxd.core import keyrelease as protocol
from tdxd.core.policy import (
    Check,
    Policy,
    VerifiedQuote,
    appraise_platform,
    appraise_report,
)
from tdxd.core.quote import Quote
from tdxd.errors import EvidenceMalformedError, RemoteProtocolError, UnavailableError
from tdxd.owner.appraise import (
    PckIdentity,
    TrustedRoot,
    appraise,
    read_pck_identity,
    read_quote,
)
from tdxd.owner.collateral import CollateralCache, Prepared

__all__ = ["Finding", "Judge", "Judgement", "judge_volume", "reason_of"]

_REASONS = {
    "token": "token",
    "token_deployment": "token",
    "token_expiry": "token-expired",
    "quote_format": "quote-format",
    "report_data": "report-data",
    "root": "root",
    "collateral": "collateral-unavailable",
    "tcb_info_signer": "collateral-signer",
    "qe_identity_signer": "collateral-signer",
    "quote": "quote",
    "root_key": "root",
    "volume": "unknown-volume",
    "policy": "no-policy",
    "td_attributes": "td-attributes",
    "tcb_status": "tcb-status",
    "platform": "platform",
    "simulated": "simulated",
    "quota": "quota",
    "secret": "store",
}


def reason_of(checks: Sequence[Check]) -> str:
    """Return the reason code of the first check that failed, or "" if none did."""
    failed = next((check for check in checks if not check.ok), None)
    return "" if failed is None else _REASONS.get(failed.name, "measurements")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What holds for all volumes of a request.

    `quote` is what the quote claims, if it could be read; `verified` what was proved, and only
    then may anything be released.
    """

    checks: tuple[Check, ...]
    nonce: bytes = b""
    quote: Quote | None = None
    verified: VerifiedQuote | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What the store says about one volume: its policy, and why there is none."""

    known: bool
    policy: Policy | None
    policy_trouble: str = "none"


class Judge:
    """Judges requests for one deployment, under Intel's root and those that the config names."""

    def __init__(
        self,
        *,
        token_keys: Sequence[bytes],
        deployment: bytes,
        signing_key_sha256: bytes,
        roots: Mapping[TrustedRoot, CollateralCache],
    ) -> None:
        self._token_keys = tuple(token_keys)
        self._deployment = deployment
        self._signing_key_sha256 = signing_key_sha256
        self._roots = {root.key_sha384: (root, cache) for root, cache in roots.items()}

    def judge(self, evidence: protocol.Evidence, now_s: float) -> Judgement:
        """Check everything that does not depend on a volume."""
        checks, nonce = self._token(evidence.token, now_s)
        if reason_of(checks):
            return Judgement(checks=checks)
        try:
            quote, exact = read_quote(evidence.quote)
            pck = read_pck_identity(exact)
        except EvidenceMalformedError as exc:
            bad = _failed("quote_format", "TDX quote, version 4 or 5", exc.message)
            return Judgement(checks=(*checks, bad), nonce=nonce)
        checks = (*checks, self._report_data(evidence, quote))
        if reason_of(checks):
            return Judgement(checks=checks, nonce=nonce, quote=quote)
        found, verified = self._genuine(quote, exact, pck, now_s)
        return Judgement(
            checks=(*checks, *found), nonce=nonce, quote=quote, verified=verified
        )

    def _token(self, token: bytes, now_s: float) -> tuple[tuple[Check, ...], bytes]:
        ours = "made by this deployment"
        try:
            claims = protocol.decode_token(token, keys=self._token_keys)
        except RemoteProtocolError as exc:
            return (_failed("token", ours, exc.message),), b""
        left_s = claims.expiry_s - now_s
        checks = (
            Check(name="token", expected=ours, actual=ours, ok=True),
            Check(
                name="token_deployment",
                expected=self._deployment.hex(),
                actual=claims.deployment.hex(),
                ok=claims.deployment == self._deployment,
            ),
            Check(
                name="token_expiry",
                expected=f"0 to {protocol.TOKEN_LIFETIME_MAX_S} s from now",
                actual=f"{left_s:.0f} s from now",
                ok=0 < left_s <= protocol.TOKEN_LIFETIME_MAX_S,
            ),
        )
        return checks, claims.nonce

    def _report_data(self, evidence: protocol.Evidence, quote: Quote) -> Check:
        wanted = protocol.report_data(
            token=evidence.token,
            public_key=evidence.public_key,
            volume_ids=evidence.volume_ids,
            signing_key_sha256=self._signing_key_sha256,
            event_log=evidence.event_log,
            runtime_log=evidence.runtime_log,
        )
        return Check(
            name="report_data",
            expected=wanted.hex(),
            actual=quote.report_data.hex(),
            ok=hmac.compare_digest(wanted, quote.report_data),
        )

    def _genuine(
        self, quote: Quote, exact: bytes, pck: PckIdentity, now_s: float
    ) -> tuple[tuple[Check, ...], VerifiedQuote | None]:
        trusted = " or ".join(root.name for root, _ in self._roots.values())
        if pck.root_key_sha384 not in self._roots:
            actual = f"{pck.root_name} (key sha384:{pck.root_key_sha384[:16]}…)"
            return (_failed("root", trusted, actual),), None
        root, cache = self._roots[pck.root_key_sha384]
        try:
            prepared: Prepared = cache.get(pck.fmspc, pck.ca, now_s)
        except UnavailableError as exc:
            wanted = f"for FMSPC {pck.fmspc}, not expired"
            return (_failed("collateral", wanted, exc.message),), None
        appraisal = appraise(exact, quote, prepared, int(now_s), root)
        return appraisal.checks, appraisal.verified


def judge_volume(
    volume_id: str, judgement: Judgement, finding: Finding
) -> tuple[Check, ...]:
    """Return the whole table of one volume: the common checks and its own."""
    common = judgement.checks
    report = judgement.verified.report if judgement.verified else judgement.quote
    if judgement.verified is None and reason_of(common) != "quote":
        return common
    if not finding.known:
        return (*common, _failed("volume", f"{volume_id} in the store", "none"))
    if finding.policy is None or report is None:
        return (*common, _failed("policy", "a valid policy", finding.policy_trouble))
    rules = finding.policy.tdx
    checks = (*common, *appraise_report(rules, report))
    if judgement.verified is not None:
        checks = (*checks, *appraise_platform(rules, judgement.verified))
    return checks


def _failed(name: str, expected: str, actual: str) -> Check:
    return Check(name=name, expected=expected, actual=actual, ok=False)
