"""Judges one request, cheapest checks first: what holds for all volumes, then each volume itself.

Default deny: a volume is released only if every check of its table passed. Checks of one stage are
all made, so that a denial shows everything that is wrong; a later stage is not entered once an
earlier one failed, with one exception: where the quote does not verify, the policies are still
compared with what it claims, for the owner's eyes only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from tdxd.core import keyrelease as protocol
from tdxd.core.appraisal import (
    VerifiedQuote,
    appraise_platform,
    appraise_report,
    appraise_time,
)
from tdxd.core.check import Check, failed, passed
from tdxd.core.event_rules import appraise_logs
from tdxd.core.policy import Policy
from tdxd.core.quote import Quote, TdReport
from tdxd.errors import EvidenceMalformedError, RemoteProtocolError, UnavailableError
from tdxd.owner.appraisal.appraise import (
    PckIdentity,
    TrustedRoot,
    appraise,
    read_pck_identity,
    read_quote,
)
from tdxd.owner.collateral.examine import COLLATERAL_REASONS
from tdxd.owner.collateral.prepared import Prepared

if TYPE_CHECKING:  # it logs, which a client that judges does not
    from tdxd.owner.collateral.cache import CollateralCache

__all__ = [
    "QUOTE_FORM",
    "REASONS",
    "EvidenceDigests",
    "Finding",
    "Judge",
    "Judgement",
    "KnownVolumes",
    "judge_volume",
    "reason_of",
    "take_apart",
]

KnownVolumes = Callable[[str, int, bytes], bool]
"""Says whether the store holds a volume id, generation and manifest digest (32 bytes)."""
TokenKeys = Callable[[], Sequence[bytes]]
"""Gives the keys that open tokens now: those of a store change while the server runs."""

_REASONS = {
    "token": "token",
    "token_deployment": "token",
    "token_expiry": "token-expired",
    "replay_key": "token",
    "quote_format": "quote-format",
    "report_data": "report-data",
    "root": "root",
    "collateral": "collateral-unavailable",
    **COLLATERAL_REASONS,
    "quote": "quote",
    "pck_chain": "quote",
    "tee_type": "quote",
    "clock": "clock",
    "pce_id": "quote",
    "unused_fields": "quote",
    "root_key": "root",
    "volume": "unknown-volume",
    "policy": "no-policy",
    "not_before": "not-now",
    "not_after": "not-now",
    "td_attributes": "td-attributes",
    "xfam": "xfam",
    "tee_tcb_svn": "tcb-status",
    "tcb_status": "tcb-status",
    "tcb_grace": "tcb-status",
    "tcb_clock": "clock",
    "tcb_evaluation": "tcb-status",
    "advisories": "advisories",
    "dynamic_platform": "platform",
    "smt": "platform",
    "cached_keys": "platform",
    "platform": "platform",
    "simulated": "simulated",
    "generations": "no-generation",
    "quota": "quota",
    "secret": "store",
}
"""Reason codes by the name of the check; what stands not here is a measurement or a log."""
_LOG_PREFIXES = ("event", "runtime")
_LOG, _MEASUREMENT = "event-log", "measurements"
REASONS = frozenset({*_REASONS.values(), _LOG, _MEASUREMENT})
"""Everything that `reason_of` may say of a failure."""


def reason_of(checks: Sequence[Check]) -> str:
    """Return the reason code of the first check that failed, or "" if none did."""
    for check in checks:
        if not check.ok:
            other = _MEASUREMENT
            if check.name.startswith(_LOG_PREFIXES):
                other = _LOG
            return _REASONS.get(check.name, other)
    return ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceDigests:
    """Digests for the record, in hex.

    A quote can be altered and still verify, so none of them identifies a request or a guest.
    """

    quote_sha256: str
    event_log_sha384: str
    runtime_log_sha384: str

    @classmethod
    def of(cls, evidence: protocol.Evidence) -> EvidenceDigests:
        """Return the digests of the evidence of a request, as received."""
        return cls(
            quote_sha256=hashlib.sha256(evidence.quote).hexdigest(),
            event_log_sha384=protocol.log_digest(evidence.event_log).hex(),
            runtime_log_sha384=protocol.log_digest(evidence.runtime_log).hex(),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What holds for all volumes of a request, as of `now_s`.

    `nonce` is the token's: what quotas count. `quote` is what the quote claims, if it could be
    read; `verified` what was proved, and only then may anything be released. The logs are as
    received.
    """

    checks: tuple[Check, ...]
    now_s: float
    event_log: bytes = b""
    runtime_log: bytes = b""
    digests: EvidenceDigests | None = None
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
        token_keys: TokenKeys,
        deployment: bytes,
        signing_key_sha256: bytes,
        roots: Mapping[TrustedRoot, CollateralCache],
    ) -> None:
        self._token_keys = token_keys
        self._deployment = deployment
        self._signing_key_sha256 = signing_key_sha256
        self._roots = {root.key_sha384: (root, cache) for root, cache in roots.items()}

    def judge(self, evidence: protocol.Evidence, now_s: float) -> Judgement:
        """Check everything that does not depend on a volume."""
        checks, nonce = self._token(evidence.token, now_s)
        so_far = Judgement(
            checks=checks,
            now_s=now_s,
            event_log=evidence.event_log,
            runtime_log=evidence.runtime_log,
            digests=EvidenceDigests.of(evidence),
            nonce=nonce,
        )
        if reason_of(checks):
            return so_far
        try:
            quote, exact, pck, form = take_apart(evidence.quote)
        except EvidenceMalformedError as exc:
            bad = failed("quote_format", QUOTE_FORM, exc.message)
            return dataclasses.replace(so_far, checks=(*checks, bad))
        checks = (*checks, form, self._report_data(evidence, quote))
        if reason_of(checks):
            return dataclasses.replace(so_far, checks=checks, quote=quote)
        found, verified = self._genuine(quote, exact, pck, now_s)
        return dataclasses.replace(
            so_far, checks=(*checks, *found), quote=quote, verified=verified
        )

    def _token(self, token: bytes, now_s: float) -> tuple[tuple[Check, ...], bytes]:
        ours = "made by this deployment"
        try:
            claims = protocol.decode_token(token, keys=self._token_keys())
        except RemoteProtocolError as exc:
            return (failed("token", ours, exc.message),), b""
        left_s = claims.expiry_s - now_s
        checks = (
            passed("token", ours, ours),
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
            Check(
                name="replay_key",
                expected="the token's nonce, never a hash of the quote",
                actual=f"nonce {claims.nonce.hex()[:16]}…",
                ok=any(claims.nonce),
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
            return (failed("root", trusted, actual),), None
        root, cache = self._roots[pck.root_key_sha384]
        if pck.forged:
            wanted = f"certificates that lead to {root.name}"
            return (failed("pck_chain", wanted, pck.forged),), None
        try:
            prepared: Prepared = cache.get(pck.fmspc, pck.ca, now_s)
        except UnavailableError as exc:
            wanted = f"for FMSPC {pck.fmspc}, not expired"
            return (failed("collateral", wanted, exc.message),), None
        appraisal = appraise(exact, quote, prepared, int(now_s), root)
        return appraisal.checks, appraisal.verified


def judge_volume(
    volume_id: str,
    judgement: Judgement,
    finding: Finding,
    known_volumes: KnownVolumes = lambda *_: False,
) -> tuple[Check, ...]:
    """Return the whole table of one volume: the common checks and its own."""
    common = judgement.checks
    report = judgement.verified.report if judgement.verified else judgement.quote
    if judgement.verified is None and not reason_of(common):
        return (*common, failed("quote", "verified", "not tried"))
    if judgement.verified is None and reason_of(common) != "quote":
        return common
    if not finding.known:
        return (*common, failed("volume", f"{volume_id} in the store", "none"))
    if finding.policy is None or report is None:
        return (*common, failed("policy", "a valid policy", finding.policy_trouble))
    return (*common, *_by_policy(finding.policy, judgement, report, known_volumes))


def _by_policy(
    policy: Policy, judgement: Judgement, report: TdReport, known_volumes: KnownVolumes
) -> tuple[Check, ...]:
    logs = appraise_logs(
        policy.event_log,
        policy.runtime,
        policy.reference,
        report,
        judgement.event_log,
        judgement.runtime_log,
        known_volumes,
        sets=policy.tdx.rtmr,
    )
    checks = (
        *appraise_time(policy.release, judgement.now_s),
        *appraise_report(policy.tdx, report, initial_rtmr3=logs.initial_rtmr3),
        *logs.checks,
    )
    if judgement.verified is None:
        return checks
    platform = appraise_platform(policy.tdx, judgement.verified, judgement.now_s)
    return (*checks, *platform)


QUOTE_FORM = "TDX quote, version 4 or 5, nothing after it"


def take_apart(data: bytes) -> tuple[Quote, bytes, PckIdentity, Check]:
    """Take a quote apart, and return the check that it has the right form.

    Raises: EvidenceMalformedError.
    """
    quote, exact = read_quote(data)
    padding = f", {len(data) - len(exact)} zeros after it" if data != exact else ""
    form = f"version {quote.version}, {quote.body.value}, {len(exact)} bytes{padding}"
    return (
        quote,
        exact,
        read_pck_identity(exact),
        passed("quote_format", QUOTE_FORM, form),
    )
