"""Judges the evidence of a serving endpoint by the checks of the key server.

Roles know nothing of each other: here the client's question and the owner's appraisal meet.
"""

from __future__ import annotations

import dataclasses
import hmac
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdxd.core.check import Check, failed
from tdxd.core.policy import Policy
from tdxd.core.quote import Quote
from tdxd.core.runtime_log import VolumeServed, parse_runtime_log
from tdxd.core.runtime_rules import last_served
from tdxd.errors import DataError, EvidenceMalformedError
from tdxd.owner.appraisal.appraise import PckIdentity, TrustedRoot
from tdxd.owner.appraisal.judge import QUOTE_FORM, take_apart
from tdxd.owner.appraisal.offline import OfflineEvidence, judge_offline
from tdxd.owner.collateral import bundle
from tdxd.owner.collateral.pcs import PcsSource, fetch_collateral
from tdxd.owner.files import read_bytes
from tdxd.user.attested import Proof

__all__ = ["GetCollateral", "Verdict", "from_file", "from_pccs", "judge_endpoint"]

GetCollateral = Callable[[PckIdentity], str]
"""Gives one set of collateral as JSON for a platform."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Every check; `volumes` is what RTMR3 names as served last, proved if all checks passed."""

    checks: tuple[Check, ...]
    quote: Quote | None = None
    volumes: tuple[VolumeServed, ...] = ()

    @property
    def accepted(self) -> bool:
        """Whether data may be sent."""
        return bool(self.checks) and all(check.ok for check in self.checks)


def judge_endpoint(
    proof: Proof,
    policy: Policy,
    root: TrustedRoot,
    collateral: GetCollateral,
    now_s: int,
) -> Verdict:
    """Judge evidence for the connection that it came over, cheapest checks first.

    Collateral is got only for a quote that was made for this connection, under the trusted root.

    Raises: DataError, UnavailableError, ConfigError, HostError for collateral that cannot be had.
    """
    before, quote, pck = _connection(proof)
    if quote is None or pck is None or not all(check.ok for check in before):
        return Verdict(checks=before, quote=quote)
    genuine = _chain(pck, root)
    if genuine is not None:
        return Verdict(checks=(*before, genuine), quote=quote)
    evidence = OfflineEvidence(
        quote=proof.evidence.quote,
        collateral=collateral(pck),
        event_log=proof.evidence.event_log,
        runtime_log=proof.evidence.runtime_log,
        report_data=proof.report_data(),
    )
    checks = judge_offline(evidence, root, policy, now_s)
    named = {check.name for check in before}
    others = tuple(
        check for check in checks if check.name not in {*named, "report_data"}
    )
    verdict = Verdict(checks=(*before, *others), quote=quote)
    if not verdict.accepted:
        return verdict
    return dataclasses.replace(verdict, volumes=_served(proof.evidence.runtime_log))


def _connection(
    proof: Proof,
) -> tuple[tuple[Check, ...], Quote | None, PckIdentity | None]:
    """Check that the quote was made for this nonce and the key of this connection."""
    seen, meant = proof.key_sha256.hex(), proof.evidence.key_sha256.hex()
    certificate = Check(
        name="certificate",
        expected=f"the key sha256:{seen} of this connection",
        actual=f"the key sha256:{meant}",
        ok=seen == meant,
    )
    if certificate.ok:
        certificate = dataclasses.replace(certificate, actual=certificate.expected)
    try:
        quote, _exact, pck, form = take_apart(proof.evidence.quote)
    except EvidenceMalformedError as exc:
        bad = failed("quote_format", QUOTE_FORM, exc.message)
        return (certificate, bad), None, None
    wanted = proof.report_data()
    bound = Check(
        name="endpoint_proof",
        expected=wanted.hex(),
        actual=quote.report_data.hex(),
        ok=hmac.compare_digest(wanted, quote.report_data),
    )
    return (certificate, form, bound), quote, pck


def _chain(pck: PckIdentity, root: TrustedRoot) -> Check | None:
    """Return the check that failed before anything is fetched for this platform."""
    if pck.root_key_sha384 != root.key_sha384:
        actual = f"{pck.root_name} (key sha384:{pck.root_key_sha384[:16]}…)"
        return failed("root", root.name, actual)
    if pck.forged:
        wanted = f"certificates that lead to {root.name}"
        return failed("pck_chain", wanted, pck.forged)
    return None


def _served(runtime_log: bytes) -> tuple[VolumeServed, ...]:
    events = parse_runtime_log(runtime_log)
    return last_served({event: (index,) for index, event in enumerate(events)})


def from_pccs(source: PcsSource) -> GetCollateral:
    """Return what fetches collateral from a PCS or PCCS."""
    return lambda pck: fetch_collateral(source, pck.fmspc, pck.ca)


def from_file(path: Path, root: TrustedRoot) -> GetCollateral:
    """Return what takes collateral from a file: one set, or a bundle of `tdx-keyd collateral`.

    Raises: HostError, DataError.
    """
    data = read_bytes(path, max_bytes=bundle.BUNDLE_MAX_BYTES)
    if not _is_bundle(data):
        text = data.decode("utf-8", "replace")
        return lambda _pck: text
    sets = bundle.parse_bundle(data, source=str(path))

    def find(pck: PckIdentity) -> str:
        for one in sets:
            if (one.root, one.fmspc, one.ca) == (root.key_sha384, pck.fmspc, pck.ca):
                return one.text()
        text = f"{path}: no collateral for FMSPC {pck.fmspc} ({pck.ca}) in it"
        raise DataError(text, hint="tdx-keyd collateral fetch and export write another")

    return find


def _is_bundle(data: bytes) -> bool:
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError):
        return False  # refused as collateral later, with the reason
    return isinstance(value, dict) and value.get("format") == bundle.FORMAT
