"""The policy of one volume, and the pure appraisal of a quote that was already verified.

A policy is TOML text, decoded strictly. Every value of the TD report is either pinned by it or must
be zero; what stands nowhere is refused. The appraisal never stops at the first mismatch: its result
is the table that `tdx-keyd explain` prints.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from typing import Literal

from tdxd.core.decode import decode
from tdxd.core.quote import (
    TD_ATTRIBUTE_BITS,
    TdReport,
    td_attribute_names,
    td_attributes_bytes,
)
from tdxd.errors import ConfigError

__all__ = [
    "TCB_STATUSES",
    "Check",
    "Policy",
    "ReleaseRules",
    "RtmrSet",
    "TdxRules",
    "VerifiedQuote",
    "appraise_platform",
    "appraise_report",
    "parse_policy",
]

_NEVER = (
    "DEBUG",
    "HGS_PLUS_PROF",
    "PERF_PROF",
    "PMT_PROF",
    "SERVTD_EXT",
    "MIGRATABLE",
)
"""Attributes with which somebody outside can look into the TD; dcap-qvl refuses them always."""

TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
)
"""Source: Intel PCS API v4, TCB info, `tcbStatus`; `Revoked` is never acceptable."""

_TcbStatus = Literal[
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
]
_ANY = "any"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of an appraisal: what was expected, what was found, and whether it passed."""

    name: str
    expected: str
    actual: str
    ok: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RtmrSet:
    """The four runtime registers of one guest image, 48 bytes each in hex."""

    name: str
    rtmr0: str
    rtmr1: str
    rtmr2: str
    rtmr3: str

    def __post_init__(self) -> None:
        for index, value in enumerate(self.values):
            _hex(f"rtmr{index}", value, 48)

    @property
    def values(self) -> tuple[str, str, str, str]:
        """RTMR0 to RTMR3 in hex, as written."""
        return (self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TdxRules:
    """What a TD and its platform must be.

    Lists are sets of allowed values in hex, in the byte order of the quote. `xfam` and `mr_seam`
    are not compared where empty; `mr_config_id`, `mr_owner` and
    `mr_owner_config` must be zero then.
    `platforms` lists PPIDs, 16 bytes each in hex, or is the string "any": it must be written.
    """

    mrtd: tuple[str, ...]
    rtmr: tuple[RtmrSet, ...]
    td_attributes: tuple[str, ...]
    tcb_status: tuple[_TcbStatus, ...]
    platforms: tuple[str, ...]
    simulated: bool = False
    xfam: tuple[str, ...] = ()
    mr_seam: tuple[str, ...] = ()
    mr_config_id: tuple[str, ...] = ()
    mr_owner: tuple[str, ...] = ()
    mr_owner_config: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mrtd", "rtmr", "tcb_status", "platforms"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, so nothing could ever pass")
        for name in ("mrtd", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config"):
            for value in getattr(self, name):
                _hex(name, value, 48)
        for value in self.xfam:
            _hex("xfam", value, 8)
        if self.platforms != (_ANY,):
            for value in self.platforms:
                _hex("platforms", value, 16)
        for value in self.td_attributes:
            if value not in TD_ATTRIBUTE_BITS or value in _NEVER:
                known = ", ".join(n for n in TD_ATTRIBUTE_BITS if n not in _NEVER)
                raise ValueError(f"td_attributes: {value!r} is not one of {known}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRules:
    """How often and what is released; `current` is the highest generation in the store."""

    generations: Literal["current"] = "current"
    max_per_hour: int | None = None

    def __post_init__(self) -> None:
        if self.max_per_hour is not None and self.max_per_hour < 1:
            raise ValueError(f"max_per_hour {self.max_per_hour} is not greater than 0")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The policy of one volume."""

    tdx: TdxRules
    release: ReleaseRules = ReleaseRules()


def parse_policy(text: str, *, source: str = "policy") -> Policy:
    """Decode a policy file.

    Raises: ConfigError, naming the key path.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{source}: not valid TOML: {exc}") from exc
    tdx = table.get("tdx")
    if isinstance(tdx, dict) and tdx.get("platforms") == _ANY:
        table["tdx"] = {**tdx, "platforms": [_ANY]}
    return decode(Policy, table, source=source)


def _hex(name: str, value: str, size: int) -> None:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * size}}}", value):
        raise ValueError(f"{name}: {value!r} is not {size} bytes in hex")


# --- the appraisal ------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedQuote:
    """What the verification of a quote proved about the TD and its platform.

    `ppid` and `fmspc` in hex; `root_key_sha384` names the root that signed; `simulated` says that
    this root is not Intel's.
    """

    report: TdReport
    tcb_status: str
    advisory_ids: tuple[str, ...]
    tcb_evaluation: int
    ppid: str
    fmspc: str
    root_key_sha384: str
    simulated: bool


def appraise_report(rules: TdxRules, report: TdReport) -> tuple[Check, ...]:
    """Compare every identity of a TD with the policy."""
    wanted = td_attributes_bytes(rules.td_attributes)
    return (
        _one_of("mr_td", rules.mrtd, report.mr_td),
        *_rtmrs(rules.rtmr, report.rtmrs),
        Check(
            name="td_attributes",
            expected=_attributes(wanted),
            actual=_attributes(report.td_attributes),
            ok=report.td_attributes == wanted,
        ),
        _pinned("xfam", rules.xfam, report.xfam),
        _pinned("mr_seam", rules.mr_seam, report.mr_seam),
        _zero_or("mr_config_id", rules.mr_config_id, report.mr_config_id),
        _zero_or("mr_owner", rules.mr_owner, report.mr_owner),
        _zero_or("mr_owner_config", rules.mr_owner_config, report.mr_owner_config),
        _zero_or("mr_service_td", (), report.mr_service_td or bytes(48)),
        _zero_or("vmid", (), bytes([report.vmid or 0])),
    )


def appraise_platform(rules: TdxRules, verified: VerifiedQuote) -> tuple[Check, ...]:
    """Compare what was proved about the machine with the policy."""
    anywhere = rules.platforms == (_ANY,)
    ppids = tuple(item.lower() for item in rules.platforms)
    return (
        Check(
            name="tcb_status",
            expected=" or ".join(rules.tcb_status),
            actual=" ".join((verified.tcb_status, *verified.advisory_ids)),
            ok=verified.tcb_status in rules.tcb_status,
        ),
        Check(
            name="platform",
            expected=" or ".join(ppids),
            actual=verified.ppid,
            ok=anywhere or verified.ppid in ppids,
        ),
        Check(
            name="simulated",
            expected="yes or no" if rules.simulated else "no",
            actual="yes" if verified.simulated else "no",
            ok=rules.simulated or not verified.simulated,
        ),
    )


def _attributes(value: bytes) -> str:
    return " ".join(td_attribute_names(value)) or "none"


def _one_of(name: str, allowed: tuple[str, ...], actual: bytes) -> Check:
    values = tuple(item.lower() for item in allowed)
    found = actual.hex()
    expected = " or ".join(values)
    return Check(name=name, expected=expected, actual=found, ok=found in values)


def _pinned(name: str, allowed: tuple[str, ...], actual: bytes) -> Check:
    if not allowed:
        return Check(name=name, expected="not pinned", actual=actual.hex(), ok=True)
    return _one_of(name, allowed, actual)


def _zero_or(name: str, allowed: tuple[str, ...], actual: bytes) -> Check:
    return _one_of(name, allowed or (bytes(len(actual)).hex(),), actual)


def _rtmrs(
    sets: tuple[RtmrSet, ...], actual: tuple[bytes, bytes, bytes, bytes]
) -> tuple[Check, ...]:
    """Compare with the set that agrees in most registers; only a whole set passes."""
    found = tuple(value.hex() for value in actual)

    def agreement(item: RtmrSet) -> int:
        pairs = zip(item.values, found, strict=True)
        return sum(want.lower() == have for want, have in pairs)

    nearest = max(sets, key=agreement)
    return tuple(
        Check(
            name=f"rtmr{index}",
            expected=f"{want.lower()} ({nearest.name})",
            actual=have,
            ok=want.lower() == have,
        )
        for index, (want, have) in enumerate(zip(nearest.values, found, strict=True))
    )
