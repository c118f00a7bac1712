"""The pure appraisal of a quote that was already verified, against the policy of one volume.

Every value of the TD report and of the platform is compared or must have a fixed value, in a check
of its own. Nothing stops at the first mismatch: the result is the table that `tdx-keyd explain`
prints.
"""

from __future__ import annotations

import dataclasses
import functools

from tdxd.core.check import Check
from tdxd.core.event_rules import nearest_set
from tdxd.core.policy import ANY, ReleaseRules, RtmrSet, TdxRules
from tdxd.core.quote import TdReport, td_attribute_names, td_attributes_bytes
from tdxd.core.showing import when

__all__ = [
    "PckFlags",
    "VerifiedQuote",
    "appraise_platform",
    "appraise_report",
    "appraise_time",
    "passes_unpinned_xfam",
]

_XFAM_BITS = {
    "X87": 0,
    "SSE": 1,
    "AVX": 2,
    "AVX512_OPMASK": 5,
    "AVX512_ZMM_HI256": 6,
    "AVX512_HI16_ZMM": 7,
    "PKRU": 9,
    "CET_U": 11,
    "CET_S": 12,
    "UINTR": 14,
    "AMX_TILECFG": 17,
    "AMX_TILEDATA": 18,
    "APX": 19,
}
"""Source: Intel SDM volume 1, section 13.1 (state components). Left out on purpose: what traces
execution or reaches out of the TD (PT 8, PASID 10, HDC 13, LBR 15, HWP 16)."""
_XFAM_KNOWN = sum(1 << bit for bit in _XFAM_BITS.values())
_XFAM_ALWAYS = 0b11
"""The TDX module makes no TD without x87 and SSE."""
_DAY_S = 86400
_SHOWN_MAX = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PckFlags:
    """What the PCK certificate says of its platform; None where it does not say."""

    dynamic_platform: bool | None
    smt: bool | None
    cached_keys: bool | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedQuote:
    """What the verification of a quote as of `verified_at_s` proved about the TD and its platform.

    `tcb_date_s` is the date (unix seconds) of the TCB level of platform or TDX module, whichever is
    older, or of the quoting enclave's where that one is not up to date and older still.
    `ppid` and `fmspc` in hex; `root_key_sha384` names the root that signed; `simulated` says that
    this root is not Intel's.
    """

    report: TdReport
    verified_at_s: int
    tcb_status: str
    tcb_date_s: int
    advisory_ids: tuple[str, ...]
    tcb_evaluation: int
    ppid: str
    fmspc: str
    flags: PckFlags
    root_key_sha384: str
    simulated: bool


# --- the TD -------------------------------------------------------------------


def appraise_report(
    rules: TdxRules, report: TdReport, *, initial_rtmr3: bytes | None = None
) -> tuple[Check, ...]:
    """Compare every identity of a TD with the policy.

    `initial_rtmr3` is what RTMR3 held before the events of the runtime log; None: there are none.
    """
    rtmrs = report.rtmrs
    if initial_rtmr3 is not None:
        rtmrs = (*rtmrs[:3], initial_rtmr3)
    wanted = td_attributes_bytes(rules.td_attributes)
    return (
        _one_of("mr_td", rules.mrtd, report.mr_td),
        *_rtmrs(rules.rtmr, rtmrs),
        Check(
            name="td_attributes",
            expected=_attributes(wanted),
            actual=_attributes(report.td_attributes),
            ok=report.td_attributes == wanted,
        ),
        _xfam(rules.xfam, report.xfam),
        _mr_seam(rules.mr_seam, report.mr_seam),
        _zero("mr_signer_seam", report.mr_signer_seam),
        _zero("seam_attributes", report.seam_attributes),
        _tee_tcb_svn(rules.min_tee_tcb_svn, report.tee_tcb_svn),
        _zero_or("mr_config_id", rules.mr_config_id, report.mr_config_id),
        _zero_or("mr_owner", rules.mr_owner, report.mr_owner),
        _zero_or("mr_owner_config", rules.mr_owner_config, report.mr_owner_config),
        _zero("mr_service_td", report.mr_service_td),
        _zero("vmid", None if report.vmid is None else bytes([report.vmid])),
        _zero("td15_ex", report.ex_tail),
    )


@functools.lru_cache(maxsize=256)
def _attributes(value: bytes) -> str:
    return " ".join(td_attribute_names(value)) or "none"


def _one_of(name: str, allowed: tuple[str, ...], actual: bytes) -> Check:
    values = tuple(item.lower() for item in allowed)
    found = actual.hex()
    ok = found in values
    return Check(name=name, expected=_listed(values, found), actual=found, ok=ok)


def _listed(values: tuple[str, ...], found: str) -> str:
    """Show a list of allowed values; of a long one what matters, for every check is recorded."""
    if len(values) <= _SHOWN_MAX:
        return " or ".join(values)
    shown = (found,) if found in values else values[:_SHOWN_MAX]
    return " or ".join((*shown, f"{len(values) - len(shown)} others"))


def _zero(name: str, actual: bytes | None) -> Check:
    """A field that means somebody else takes part in the TD; None: the quote has no such field."""
    if actual is None:
        return Check(name=name, expected="zero", actual="no such field", ok=True)
    zero = not any(actual)
    return Check(
        name=name, expected="zero", actual="zero" if zero else actual.hex(), ok=zero
    )


def _zero_or(name: str, allowed: tuple[str, ...], actual: bytes) -> Check:
    return _one_of(name, allowed, actual) if allowed else _zero(name, actual)


def _xfam(allowed: tuple[str, ...], actual: bytes) -> Check:
    if allowed:
        return _one_of("xfam", allowed, actual)
    surplus = int.from_bytes(actual, "little") & ~_XFAM_KNOWN
    bits = ", ".join(str(bit) for bit in range(64) if surplus >> bit & 1)
    note = f" (bits {bits})" if surplus else ""
    return Check(
        name="xfam",
        expected="x87, SSE and any known feature that does not trace (not pinned)",
        actual=actual.hex() + note,
        ok=passes_unpinned_xfam(actual),
    )


def passes_unpinned_xfam(value: bytes) -> bool:
    """Say whether a policy without `xfam` lets this value (8 bytes) pass."""
    features = int.from_bytes(value, "little")
    return not features & ~_XFAM_KNOWN and features & _XFAM_ALWAYS == _XFAM_ALWAYS


def _mr_seam(allowed: tuple[str, ...], actual: bytes) -> Check:
    if allowed and allowed != (ANY,):
        return _one_of("mr_seam", allowed, actual)
    return Check(
        name="mr_seam",
        expected="any module that Intel's TCB info knows (not pinned)",
        actual=actual.hex(),
        ok=True,
    )


def _tee_tcb_svn(floor: str | None, actual: bytes) -> Check:
    if floor is None:
        expected, high = "as the TCB levels demand (no floor)", True
    else:
        least = bytes.fromhex(floor)
        expected = f"each byte at least {floor.lower()}"
        high = all(have >= want for have, want in zip(actual, least, strict=True))
    return Check(name="tee_tcb_svn", expected=expected, actual=actual.hex(), ok=high)


def _rtmrs(sets: tuple[RtmrSet, ...], actual: tuple[bytes, ...]) -> tuple[Check, ...]:
    """Compare with the set that agrees in most registers; only a whole set passes."""
    found = tuple(value.hex() for value in actual)
    nearest = nearest_set(sets, actual)
    return tuple(
        Check(
            name=f"rtmr{index}",
            expected=f"{want.lower()} ({nearest.name})",
            actual=have,
            ok=want.lower() == have,
        )
        for index, (want, have) in enumerate(zip(nearest.values, found, strict=True))
    )


# --- the platform -------------------------------------------------------------


def appraise_platform(
    rules: TdxRules, verified: VerifiedQuote, now_s: float
) -> tuple[Check, ...]:
    """Compare what was proved about the machine with the policy, as of `now_s` (unix time)."""
    flags = verified.flags
    return (
        Check(
            name="tcb_status",
            expected=" or ".join(rules.tcb_status),
            actual=verified.tcb_status,
            ok=verified.tcb_status in rules.tcb_status,
        ),
        _grace(rules, verified, now_s),
        Check(
            name="tcb_clock",
            expected="judged at the time of the verification",
            actual=f"{int(now_s) - verified.verified_at_s} s apart",
            ok=int(now_s) == verified.verified_at_s,
        ),
        _advisories(rules, verified.advisory_ids),
        Check(
            name="tcb_evaluation",
            expected=f"at least {rules.min_tcb_evaluation}",
            actual=str(verified.tcb_evaluation),
            ok=verified.tcb_evaluation >= rules.min_tcb_evaluation,
        ),
        _allowance(
            "dynamic_platform", flags.dynamic_platform, may=rules.dynamic_platform
        ),
        _allowance("smt", flags.smt, may=rules.smt),
        _allowance("cached_keys", flags.cached_keys, may=rules.cached_keys),
        _platform(rules.platforms, verified.ppid),
        _allowance("simulated", verified.simulated, may=rules.simulated),
    )


def _platform(allowed: tuple[str, ...], ppid: str) -> Check:
    ppids = tuple(item.lower() for item in allowed)
    return Check(
        name="platform",
        expected=_listed(ppids, ppid),
        actual=ppid,
        ok=ppids == (ANY,) or ppid in ppids,
    )


def _grace(rules: TdxRules, verified: VerifiedQuote, now_s: float) -> Check:
    days = rules.tcb_grace_days.get(verified.tcb_status)
    age_days = (now_s - verified.tcb_date_s) / _DAY_S
    if days is None:
        expected = f"any age where {verified.tcb_status}"
    else:
        expected = f"at most {days} days where {verified.tcb_status}"
    return Check(
        name="tcb_grace",
        expected=expected,
        actual=f"{age_days:.0f} days: level of {_date(verified.tcb_date_s)}",
        ok=days is None or age_days <= days,
    )


def _advisories(rules: TdxRules, found: tuple[str, ...]) -> Check:
    refused = rules.advisories_refused
    allowed = rules.advisories_allowed
    if allowed is None:
        expected = f"none of {' '.join(refused)}" if refused else "any"
    else:
        expected = f"none but {' '.join(allowed)}" if allowed else "none"
    bad = [
        one
        for one in found
        if one in refused or (allowed is not None and one not in allowed)
    ]
    note = f" (refused: {' '.join(bad)})" if bad else ""
    actual = (" ".join(found) or "none") + note
    return Check(name="advisories", expected=expected, actual=actual, ok=not bad)


def _allowance(name: str, value: bool | None, *, may: bool) -> Check:  # noqa: FBT001
    """A property of the platform that a policy may rule out; unknown is not "no"."""
    return Check(
        name=name,
        expected="yes or no" if may else "no",
        actual={True: "yes", False: "no", None: "unknown"}[value],
        ok=may or value is False,
    )


# --- the time -----------------------------------------------------------------


def appraise_time(rules: ReleaseRules, now_s: float) -> tuple[Check, ...]:
    """Compare the server's time with `not_before` and `not_after`, where the policy has them."""
    limits = (
        ("not_before", rules.not_before, "or later", 1),
        ("not_after", rules.not_after, "or earlier", -1),
    )
    return tuple(
        Check(
            name=name,
            expected=f"{when(limit)} {words}",
            actual=when(int(now_s)),
            ok=(int(now_s) - limit) * sign >= 0,
        )
        for name, limit, words, sign in limits
        if limit is not None
    )


def _date(at_s: int) -> str:
    return when(at_s)[:10]
