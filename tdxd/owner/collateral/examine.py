"""Every check of a set of collateral, and what is said of one that fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tdxd.core.check import Check
from tdxd.core.showing import when
from tdxd.errors import UnavailableError
from tdxd.owner.collateral.floors import floor_check, floor_values
from tdxd.owner.collateral.prepared import Prepared
from tdxd.owner.collateral.verify import Trust, verify_set

__all__ = ["COLLATERAL_REASONS", "SetRules", "examine", "refusal"]

COLLATERAL_REASONS = {
    "tcb_info_signer": "collateral-signer",
    "qe_identity_signer": "collateral-signer",
    "pck_crl_issuer": "collateral-signer",
    "root_crl_issuer": "collateral-signer",
    "collateral_signature": "collateral-signature",
    "collateral_revocation": "collateral-revoked",
    "collateral_scope": "collateral-unavailable",
    "collateral_dates": "collateral-unavailable",
    "collateral_age": "collateral-unavailable",
    "collateral_floor": "collateral-rollback",
}
"""The reason code of a denial, by the check that failed."""
_HINTS = {
    "collateral_dates": "is the clock of this machine right? does the PCCS refresh its cache?",
    "collateral_age": "the PCCS must refresh its cache more often, or max_age_s be higher",
    "collateral_floor": "the source offers an older state than was seen before: refresh the "
    "PCCS, or suspect it",
}
_OTHER_HINT = (
    "the source answers with what Intel did not sign for this: do not trust it"
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SetRules:
    """What the config says about a set: see `CollateralConfig`."""

    max_age_s: float | None = None
    crl_rollback_s: float = 604800.0


def examine(
    prepared: Prepared,
    *,
    trust: Trust,
    fmspc: str,
    ca: str,
    now_s: float,
    rules: SetRules,
    floors: Mapping[str, int],
) -> Prepared:
    """Return the set with every check but those of its `signers` in its `gap_checks`."""
    values = floor_values(prepared, trust.key_sha384, ca)
    checks = [
        *verify_set(prepared, trust=trust, fmspc=fmspc, ca=ca, now_s=now_s),
        _dates(prepared, now_s),
    ]
    if rules.max_age_s is not None:
        checks.append(_age(prepared, now_s, rules.max_age_s))
    checks.append(floor_check(values, floors, crl_rollback_s=rules.crl_rollback_s))
    return dataclasses.replace(prepared, gap_checks=tuple(checks))


def _dates(prepared: Prepared, now_s: float) -> Check:
    early = [
        f"{name} issued {when(at_s)}"
        for name, at_s in prepared.issued.items()
        if at_s > now_s
    ]
    late = [
        f"{name} expired {when(at_s)}"
        for name, at_s in prepared.expires.items()
        if at_s <= now_s
    ]
    valid = f"issued {when(prepared.issued_s)}, expires {when(prepared.expires_s)}"
    return Check(
        name="collateral_dates",
        expected=f"issued before {when(int(now_s))}, expires after",
        actual="; ".join([*early, *late]) or valid,
        ok=not early and not late,
    )


def _age(prepared: Prepared, now_s: float, max_age_s: float) -> Check:
    # The root CA's list is issued once a year.
    parts = {
        name: at_s for name, at_s in prepared.issued.items() if name != "root_ca_crl"
    }
    name, oldest_s = min(parts.items(), key=lambda part: part[1])
    return Check(
        name="collateral_age",
        expected=f"at most {max_age_s:.0f} s",
        actual=f"{name} {now_s - oldest_s:.0f} s",
        ok=now_s - oldest_s <= max_age_s,
    )


def refusal(fmspc: str, ca: str, prepared: Prepared) -> UnavailableError:
    """Return the error that says which check failed first."""
    failed = next(check for check in prepared.checks if not check.ok)
    return UnavailableError(
        f"collateral for {fmspc} ({ca}): {failed.name} is {failed.actual}, "
        f"expected {failed.expected}",
        hint=_HINTS.get(failed.name, _OTHER_HINT),
    )
