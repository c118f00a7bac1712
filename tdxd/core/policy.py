"""The policy of one volume: what a TD and its platform must be, and what is released to it.

A policy is TOML text, decoded strictly: an unknown key is an error, and so is a value that could
never let anything pass. What stands nowhere is refused: see `core.appraisal`.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
import tomllib
from collections.abc import Sequence
from typing import Any, Literal

from tdxd.core.check import Check
from tdxd.core.decode import decode
from tdxd.core.event_rules import EventLogRules, ReferenceLog, RuntimeRules
from tdxd.core.quote import TD_ATTRIBUTE_BITS
from tdxd.core.showing import LATEST_S
from tdxd.core.volume_id import GENERATIONS_MAX
from tdxd.errors import ConfigError

__all__ = [
    "ANY",
    "FATAL_ATTRIBUTES",
    "LEASE_S",
    "TCB_STATUSES",
    "Check",
    "Policy",
    "ReleaseRules",
    "RtmrSet",
    "ServedGenerations",
    "TdxRules",
    "parse_policy",
]

FATAL_ATTRIBUTES = (
    "DEBUG",
    "HGS_PLUS_PROF",
    "PERF_PROF",
    "PMT_PROF",
    "SERVTD_EXT",
    "MIGRATABLE",
)
"""Attributes with which somebody outside can look into the TD; dcap-qvl refuses them always."""
NEEDED_ATTRIBUTE = "SEPT_VE_DISABLE"
"""Without it the host can make the guest run its own exception handler; dcap-qvl wants it."""

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
ANY = "any"
"""Written in place of a list: no value is compared, on purpose."""
_MAY_BE_ANY = ("platforms", "mr_seam")
GRACE_DAYS_MAX = 3650
LEASE_S = (60, 30 * 86400)
"""A shorter lease could not be renewed in time; a longer one would revoke nothing."""
_TIMES = ("not_before", "not_after")
_NUMBER_END = 2**31
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")
_ADVISORY = re.compile(r"INTEL-[A-Z]{2,8}-\d{1,8}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RtmrSet:
    """The four runtime registers of one guest image, 48 bytes each in hex.

    `rtmr3` is what the boot left there: extensions by a guest that serves stand in its runtime log.
    """

    name: str
    rtmr0: str
    rtmr1: str
    rtmr2: str
    rtmr3: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            text = f"name {self.name!r} is not 1 to 64 of A-Z a-z 0-9 . _ + -"
            raise ValueError(text)
        for index, value in enumerate(self.values):
            _hex(f"rtmr{index}", value, 48)

    @property
    def values(self) -> tuple[str, str, str, str]:
        """RTMR0 to RTMR3 in hex, as written."""
        return (self.rtmr0, self.rtmr1, self.rtmr2, self.rtmr3)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TdxRules:
    """What a TD and its platform must be.

    Lists are sets of allowed values in hex, in the byte order of the quote. `platforms` lists
    PPIDs, 16 bytes each, or is the string "any": it must be written. `mr_seam` is compared unless
    it is absent or "any"; without `xfam` the known features pass, but for those that trace;
    `mr_config_id`, `mr_owner` and `mr_owner_config` must be zero unless given.

    A status of `tcb_status` with an entry in `tcb_grace_days` passes only for so many days after
    the date of the platform's TCB level, the oldest where several count. `advisories_allowed`
    absent allows all that are not refused. `min_tee_tcb_svn`: 16 bytes, each at least so high.
    `dynamic_platform` (several packages, or packages may be added), `smt` (hyper-threading) and
    `cached_keys` say which platforms may be so: practically all of the clouds' are.
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
    tcb_grace_days: dict[str, int] = dataclasses.field(default_factory=dict)
    advisories_allowed: tuple[str, ...] | None = None
    advisories_refused: tuple[str, ...] = ()
    min_tcb_evaluation: int = 0
    min_tee_tcb_svn: str | None = None
    dynamic_platform: bool = True
    smt: bool = True
    cached_keys: bool = True

    def __post_init__(self) -> None:
        for name in ("mrtd", "rtmr", "tcb_status", "platforms"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty, so nothing could ever pass")
        for name in ("mrtd", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config"):
            _hexes(name, getattr(self, name), 48)
        _hexes("xfam", self.xfam, 8)
        _hexes("platforms", self.platforms, 16)
        if self.min_tee_tcb_svn is not None:
            _hex("min_tee_tcb_svn", self.min_tee_tcb_svn, 16)
        _unique("rtmr", [item.name for item in self.rtmr])
        self._check_attributes()
        self._check_tcb()

    def _check_attributes(self) -> None:
        for value in self.td_attributes:
            if value not in TD_ATTRIBUTE_BITS or value in FATAL_ATTRIBUTES:
                known = ", ".join(
                    name for name in TD_ATTRIBUTE_BITS if name not in FATAL_ATTRIBUTES
                )
                raise ValueError(f"td_attributes: {value!r} is not one of {known}")
        if NEEDED_ATTRIBUTE not in self.td_attributes:
            text = (
                f"td_attributes has no {NEEDED_ATTRIBUTE}, so nothing could ever pass"
            )
            raise ValueError(text)

    def _check_tcb(self) -> None:
        for status, days in self.tcb_grace_days.items():
            if status not in self.tcb_status or status == "UpToDate":
                old = [one for one in self.tcb_status if one != "UpToDate"]
                known = ", ".join(old) or "none: tcb_status lists UpToDate alone"
                text = f"tcb_grace_days: {status!r} is not one of tcb_status ({known})"
                raise ValueError(text)
            if not 0 <= days <= GRACE_DAYS_MAX:
                text = f"tcb_grace_days.{status} {days} is not 0 to {GRACE_DAYS_MAX}"
                raise ValueError(text)
        allowed = self.advisories_allowed or ()
        for value in (*allowed, *self.advisories_refused):
            if not _ADVISORY.fullmatch(value):
                raise ValueError(f"advisory {value!r} is not like INTEL-SA-00837")
        both = sorted(set(allowed) & set(self.advisories_refused))
        if both:
            raise ValueError(f"advisory {both[0]} is both allowed and refused")
        if not 0 <= self.min_tcb_evaluation < _NUMBER_END:
            text = f"min_tcb_evaluation {self.min_tcb_evaluation} is not 0 to 2^31 - 1"
            raise ValueError(text)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedGenerations:
    """Which generations of a volume guests may serve: the `newest` so many, or those of a list.

    In a policy it is "current" (the newest one), a number, or the list itself. What was removed
    from the store counts for neither.
    """

    newest: int = 1
    listed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.newest <= GENERATIONS_MAX:
            text = f"{self.newest} generations are not 1 to {GENERATIONS_MAX}"
            raise ValueError(text)
        if len(self.listed) > GENERATIONS_MAX:
            text = f"{len(self.listed)} generations are more than {GENERATIONS_MAX}"
            raise ValueError(text)
        for number in self.listed:
            if not 1 <= number < 2**63:
                raise ValueError(f"{number} is no generation")
        if len(set(self.listed)) != len(self.listed):
            raise ValueError("a generation stands there twice")

    def of(self, present: Sequence[int]) -> tuple[int, ...]:
        """Return those that may be served of the generations in the store, the newest first."""
        ordered = sorted(present, reverse=True)
        if self.listed:
            return tuple(one for one in ordered if one in self.listed)
        return tuple(ordered[: self.newest])

    def __str__(self) -> str:
        if self.listed:
            return ", ".join(str(one) for one in sorted(self.listed, reverse=True))
        return "current" if self.newest == 1 else f"the newest {self.newest}"


_CURRENT = ServedGenerations()
_CURRENT_TEXT = "current"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRules:
    """How often, when and what is released.

    `not_before` and `not_after` are unix seconds: releases happen in between, both included.
    `lease_s`: the guest closes the volume when it ran out without another release; None: never.
    """

    generations: ServedGenerations = _CURRENT
    max_per_hour: int | None = None
    lease_s: int | None = None
    not_before: int | None = None
    not_after: int | None = None

    def __post_init__(self) -> None:
        if self.max_per_hour is not None and not 0 < self.max_per_hour < _NUMBER_END:
            raise ValueError(f"max_per_hour {self.max_per_hour} is not 1 to 2^31 - 1")
        low, high = LEASE_S
        if self.lease_s is not None and not low <= self.lease_s <= high:
            raise ValueError(f"lease_s {self.lease_s} is not {low} to {high}")
        for name in _TIMES:
            moment = getattr(self, name)
            if moment is not None and not 0 <= moment < LATEST_S:
                raise ValueError(f"{name} is not in the years 1970 to 9998")
        if (
            self.not_before is not None
            and self.not_after is not None
            and self.not_before > self.not_after
        ):
            raise ValueError("not_before is later than not_after: nothing could pass")


_NO_LOG_RULES = EventLogRules()
_VOLUMES_ONLY = RuntimeRules()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The policy of one volume.

    A `reference` names a set of `tdx.rtmr`: it says which event departs, and decides nothing.
    """

    tdx: TdxRules
    release: ReleaseRules = ReleaseRules()
    event_log: EventLogRules = _NO_LOG_RULES
    runtime: RuntimeRules = _VOLUMES_ONLY
    reference: tuple[ReferenceLog, ...] = ()

    def __post_init__(self) -> None:
        names = [item.name for item in self.tdx.rtmr]
        _unique("reference", [item.name for item in self.reference])
        for item in self.reference:
            if item.name not in names:
                text = f"reference {item.name!r} is no set of tdx.rtmr ({', '.join(names)})"
                raise ValueError(text)


def parse_policy(text: str, *, source: str = "policy") -> Policy:
    """Decode a policy file.

    Raises: ConfigError, naming the key path.
    """
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # also of numbers of too many digits
        raise ConfigError(f"{source}: not valid TOML: {exc}") from exc
    tdx = table.get("tdx")
    if isinstance(tdx, dict):
        table["tdx"] = {
            key: [ANY] if key in _MAY_BE_ANY and value == ANY else value
            for key, value in tdx.items()
        }
    release = table.get("release")
    if isinstance(release, dict):
        table["release"] = {
            key: _seconds(f"{source}: release.{key}", value) if key in _TIMES else value
            for key, value in release.items()
        }
        if "generations" in release:
            where = f"{source}: release.generations"
            found = _generations(where, release["generations"])
            table["release"]["generations"] = found
    return decode(Policy, table, source=source)


def _generations(where: str, value: Any) -> dict[str, Any]:
    """Turn the three ways to write it into the fields of `ServedGenerations`."""
    if value == _CURRENT_TEXT:
        return {}
    if type(value) is int:
        return {"newest": value}
    if isinstance(value, list) and value:
        return {"listed": value}
    shown = repr(value[:60]) if isinstance(value, str) else type(value).__name__
    raise ConfigError(
        f'{where}: expected "{_CURRENT_TEXT}", a number or a list of generations, got {shown}'
    )


def _seconds(where: str, value: Any) -> int:
    """Read a moment: a TOML date-time with an offset, or RFC 3339 text."""
    hint = "write it like 2026-11-30T00:00:00Z"
    moment = value
    if isinstance(value, str):
        try:
            moment = dt.datetime.fromisoformat(value)
        except ValueError as exc:
            raise ConfigError(f"{where}: {value!r} is no moment", hint=hint) from exc
    if not isinstance(moment, dt.datetime) or moment.utcoffset() is None:
        shown = repr(value) if isinstance(value, str | int | float) else str(value)
        text = f"{where}: {shown[:60]} is not a date with time and UTC offset"
        raise ConfigError(text, hint=hint)
    return int(moment.timestamp())


def _hexes(name: str, values: tuple[str, ...], size: int) -> None:
    if name in _MAY_BE_ANY and values == (ANY,):
        return
    for value in values:
        _hex(name, value, size)
    _unique(name, [value.lower() for value in values])


def _hex(name: str, value: str, size: int) -> None:
    if not re.fullmatch(rf"[0-9a-fA-F]{{{2 * size}}}", value):
        raise ValueError(f"{name}: {value!r} is not {size} bytes in hex")


def _unique(name: str, values: list[str]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{name}: {value!r} stands there twice")
        seen.add(value)
