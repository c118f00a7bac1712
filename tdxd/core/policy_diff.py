"""What differs between two policies in meaning, and what of it lets more pass than before.

Order, spelling and comments do not count. Where it is not certain that a change only tightens, it
counts as loosening.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from tdxd.core.appraisal import passes_unpinned_xfam
from tdxd.core.decode import plain
from tdxd.core.event_rules import ANY_VOLUME
from tdxd.core.policy import ANY, Policy, ServedGenerations, TdxRules

__all__ = ["Change", "diff"]

_ZERO = "zero"
_UNPINNED = "unpinned"
_ALLOW = {
    "mrtd": "",
    "td_attributes": "",
    "tcb_status": "",
    "platforms": "",
    "xfam": _UNPINNED,
    "mr_seam": ANY,
    "mr_config_id": _ZERO,
    "mr_owner": _ZERO,
    "mr_owner_config": _ZERO,
    "advisories_allowed": ANY,
}
"""Lists of `[tdx]` where more is looser, and what an absent one stands for."""
_MAY = ("simulated", "dynamic_platform", "smt", "cached_keys")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference; `looser`: it lets something pass that did not before."""

    path: str
    kind: Literal["added", "removed", "changed"]
    old: str
    new: str
    looser: bool


def diff(old: Policy, new: Policy) -> tuple[Change, ...]:
    """Return every difference, by key path."""
    return (
        *_tdx(old.tdx, new.tdx),
        *_release(old, new),
        *_others(old, new),
    )


def _change(path: str, old: Any, new: Any, *, looser: bool) -> Change:
    kind: Literal["added", "removed", "changed"] = "changed"
    if old is None or new is None:
        kind = "added" if old is None else "removed"
    texts = {"old": _text(old), "new": _text(new)}
    return Change(path=path, kind=kind, looser=looser, **texts)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


# --- [tdx] --------------------------------------------------------------------


def _tdx(old: TdxRules, new: TdxRules) -> Iterator[Change]:
    for name in _ALLOW:
        yield from _allow_list(name, _members(old, name), _members(new, name))
    yield from _rtmrs(old, new)
    refused = set(old.advisories_refused), set(new.advisories_refused)
    for item in sorted(refused[1] - refused[0]):
        yield _change("tdx.advisories_refused", None, item, looser=False)
    for item in sorted(refused[0] - refused[1]):
        yield _change("tdx.advisories_refused", item, None, looser=True)
    for name in _MAY:
        was, now = getattr(old, name), getattr(new, name)
        if was != now:
            yield _change(f"tdx.{name}", was, now, looser=now)
    yield from _graces(old, new)
    was, now = old.min_tcb_evaluation, new.min_tcb_evaluation
    if was != now:
        yield _change("tdx.min_tcb_evaluation", was, now, looser=now < was)
    yield from _module_floor(old.min_tee_tcb_svn, new.min_tee_tcb_svn)


def _members(rules: TdxRules, name: str) -> set[str]:
    value: Sequence[str] | None = getattr(rules, name)
    if value is None or (not value and _ALLOW[name] and name != "advisories_allowed"):
        return {_ALLOW[name]}
    keep = name in {"td_attributes", "tcb_status", "advisories_allowed"}
    return {item if keep else item.lower() for item in value}


def _allow_list(name: str, old: set[str], new: set[str]) -> Iterator[Change]:
    # Attributes are compared as a whole: without one of them, other guests pass than before.
    for item in sorted(old - new):
        yield _change(f"tdx.{name}", item, None, looser=name == "td_attributes")
    for item in sorted(new - old):
        covered = ANY in old or (
            _UNPINNED in old and passes_unpinned_xfam(bytes.fromhex(item))
        )
        yield _change(f"tdx.{name}", None, item, looser=not covered)


def _rtmrs(old: TdxRules, new: TdxRules) -> Iterator[Change]:
    before = {item.name: item for item in old.rtmr}
    after = {item.name: item for item in new.rtmr}
    known = {tuple(value.lower() for value in item.values) for item in old.rtmr}
    for name in sorted(before.keys() | after.keys()):
        path = f"tdx.rtmr[{name}]"
        if name not in after:
            yield _change(path, "a set of four registers", None, looser=False)
            continue
        values = tuple(value.lower() for value in after[name].values)
        if name not in before:
            looser = values not in known
            yield _change(path, None, "a set of four registers", looser=looser)
            continue
        pairs = zip(before[name].values, values, strict=True)
        for index, (was, now) in enumerate(pairs):
            if was.lower() != now:
                looser = values not in known
                yield _change(f"{path}.rtmr{index}", was.lower(), now, looser=looser)


def _graces(old: TdxRules, new: TdxRules) -> Iterator[Change]:
    """A status without an entry passes at any age; one that is not listed, never."""
    before, after = old.tcb_grace_days, new.tcb_grace_days
    for status in sorted(before.keys() | after.keys()):
        was, now = before.get(status), after.get(status)
        if was != now:
            listed = status in old.tcb_status and status in new.tcb_status
            longer = was is not None and (now is None or now > was)
            path = f"tdx.tcb_grace_days.{status}"
            yield _change(path, was, now, looser=listed and longer)


def _module_floor(old: str | None, new: str | None) -> Iterator[Change]:
    was, now = (value and value.lower() for value in (old, new))
    if was == now:
        return
    looser = was is not None
    if was and now:
        pairs = zip(bytes.fromhex(was), bytes.fromhex(now), strict=True)
        looser = any(high > low for high, low in pairs)
    yield _change("tdx.min_tee_tcb_svn", was, now, looser=looser)


# --- [release] and the rest ---------------------------------------------------


def _more_generations(old: ServedGenerations, new: ServedGenerations) -> bool:
    if old.listed and new.listed:
        return not set(new.listed) <= set(old.listed)
    # Between a list and a number it depends on what the store has, now and later.
    return bool(old.listed or new.listed) or new.newest > old.newest


def _release(old: Policy, new: Policy) -> Iterator[Change]:
    served = old.release.generations, new.release.generations
    if str(served[0]) != str(served[1]):
        looser = _more_generations(*served)
        yield _change("release.generations", *served, looser=looser)
    for name, sign in (
        ("max_per_hour", 1),
        ("lease_s", 1),
        ("not_after", 1),
        ("not_before", -1),
    ):
        was, now = getattr(old.release, name), getattr(new.release, name)
        if was != now:
            looser = was is not None and (now is None or (now - was) * sign > 0)
            yield _change(f"release.{name}", was, now, looser=looser)


_LISTS = {
    ("event_log", "require"): "fewer",
    ("event_log", "forbid"): "fewer",
    ("event_log", "only"): "fewer",
    ("runtime", "volumes"): "more",
    ("runtime", "allow"): "more",
    ("runtime", "operator_volumes"): "more",
    ("runtime", "expect"): "fewer",
}
"""Whether more or fewer entries let more pass."""


def _others(old: Policy, new: Policy) -> Iterator[Change]:
    was, now = old.event_log.required, new.event_log.required
    if was != now:
        yield _change("event_log.required", was, now, looser=was)
    for (table, name), looser in _LISTS.items():
        before = getattr(getattr(old, table), name)
        after = getattr(getattr(new, table), name)
        all_before = ANY_VOLUME in before
        for item in before:
            if item not in after:
                path, text = f"{table}.{name}", _shown(item)
                demanded = getattr(item, "required", False)
                fewer = looser == "fewer" or demanded
                yield _change(path, text, None, looser=fewer)
        for item in after:
            if item not in before:
                path, text = f"{table}.{name}", _shown(item)
                more = looser == "more" and not all_before
                yield _change(path, None, text, looser=more)
    yield from _references(old, new)


def _references(old: Policy, new: Policy) -> Iterator[Change]:
    """They serve diagnosis alone."""
    before = {item.name: item for item in old.reference}
    after = {item.name: item for item in new.reference}
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was != now:
            path, texts = f"reference[{name}]", [one and "events" for one in (was, now)]
            yield _change(path, *texts, looser=False)


def _shown(item: object) -> str:
    """Show an entry of a list: one of text, or a small table."""
    if not dataclasses.is_dataclass(item):
        return _text(item)
    fields = plain(item)
    assert isinstance(fields, dict)
    return ", ".join(
        f"{key} = {value}" for key, value in fields.items() if value not in ("", None)
    )
