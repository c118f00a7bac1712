"""Judges evidence by hand, by the same checks as the server: what `tdx-keyd appraise` does."""

from __future__ import annotations

import dataclasses
import hmac

from tdxd.core.check import Check, failed
from tdxd.core.policy import Policy
from tdxd.errors import EvidenceMalformedError
from tdxd.owner.appraisal.appraise import TrustedRoot, appraise
from tdxd.owner.appraisal.judge import (
    QUOTE_FORM,
    Finding,
    Judgement,
    KnownVolumes,
    judge_volume,
    take_apart,
)
from tdxd.owner.collateral.examine import SetRules, examine
from tdxd.owner.collateral.prepared import prepare
from tdxd.owner.collateral.verify import Trust

__all__ = ["OfflineEvidence", "judge_offline"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OfflineEvidence:
    """Evidence that nobody sent: `report_data` is compared unless it is None.

    `collateral` is one set as JSON; `known_volumes` None takes every volume's event of a runtime
    log for one of the store's.
    """

    quote: bytes
    collateral: str
    event_log: bytes = b""
    runtime_log: bytes = b""
    report_data: bytes | None = None
    known_volumes: KnownVolumes | None = None


def judge_offline(
    evidence: OfflineEvidence, root: TrustedRoot, policy: Policy, now_s: int
) -> tuple[Check, ...]:
    """Judge as the server does, without a request and without a store: for trials by hand.

    There is no token, and collateral has no floors.

    Raises: DataError for malformed collateral.
    """
    try:
        quote, exact, pck, form = take_apart(evidence.quote)
    except EvidenceMalformedError as exc:
        return (failed("quote_format", QUOTE_FORM, exc.message),)
    wanted = evidence.report_data
    bound = Check(
        name="report_data",
        expected="not compared" if wanted is None else wanted.hex(),
        actual=quote.report_data.hex(),
        ok=wanted is None or hmac.compare_digest(wanted, quote.report_data),
    )
    prepared = examine(
        prepare(evidence.collateral),
        trust=Trust(name=root.name, key_sha384=root.key_sha384),
        fmspc=pck.fmspc,
        ca=pck.ca,
        now_s=now_s,
        rules=SetRules(),
        floors={},
    )
    appraisal = appraise(exact, quote, prepared, now_s, root)
    judgement = Judgement(
        checks=(form, bound, *appraisal.checks),
        now_s=now_s,
        event_log=evidence.event_log,
        runtime_log=evidence.runtime_log,
        quote=quote,
        verified=appraisal.verified,
    )
    finding = Finding(known=True, policy=policy)
    known = evidence.known_volumes or (lambda *_: True)
    return judge_volume("offline", judgement, finding, known)
