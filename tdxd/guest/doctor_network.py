"""Judges the way to the key servers, their pins, and the clock."""

from __future__ import annotations

from collections.abc import Iterator

from tdxd.core import keyrelease
from tdxd.errors import RemoteProtocolError
from tdxd.guest.answer import parse_challenge
from tdxd.guest.finding import Facts, Finding, fail, ok, warn
from tdxd.host.key_server_facts import KeyServerFacts

__all__ = ["judge"]

_CLOCK_TOLERANCE_S = 60.0
_HARMLESS = (
    "keys do not depend on this clock, but users' certificates and the times in logs do"
)
_SET_CLOCK = "run a time service: systemctl enable --now systemd-timesyncd"


def judge(facts: Facts) -> Iterator[Finding]:
    """Yield one finding for each key server; all of them failing is what keeps keys away."""
    if facts.ca is not None:
        yield fail("key-server", facts.ca.message, facts.ca.hint)
    good = [one for one in facts.servers if _reachable(facts, one) is None]
    for one in facts.servers:
        finding = _reachable(facts, one)
        name = f"key-server {one.server}"
        if finding is None:
            yield ok(name, "it answers, and signs with a pinned key")
        elif good:
            yield warn(name, f"{finding.text}; another one answers", finding.todo)
        else:
            yield finding
    yield _clock(facts)


def _reachable(facts: Facts, one: KeyServerFacts) -> Finding | None:
    """Return what keeps keys of this server away."""
    name = f"key-server {one.server}"
    if one.problem is not None:
        words = {
            "name": "its name is not found",
            "connection": "it cannot be reached",
            "certificate": "it does not prove itself to key_release.ca",
            "challenge": "it does not answer as a key server",
        }
        text = f"{words.get(one.step, one.step)}: {one.problem.message}"
        return fail(name, text, one.problem.hint)
    try:
        key_id = parse_challenge(one.challenge).signing_key_sha256
    except RemoteProtocolError as exc:
        return fail(name, exc.message, "is that tdx-keyd, of the same version?")
    pins = facts.config.key_release.accepted_signing_keys()
    if key_id not in {keyrelease.signing_key_id(pin) for pin in pins}:
        return fail(
            name,
            f"it signs with the key sha256:{key_id.hex()}, which is not pinned",
            "compare key_release.signing_key with the line that tdx-keyd init printed",
        )
    return None


def _clock(facts: Facts) -> Finding:
    ahead = [
        one.clock_ahead_s for one in facts.servers if one.clock_ahead_s is not None
    ]
    worst = max(ahead, key=abs, default=None)
    if worst is not None and abs(worst) > _CLOCK_TOLERANCE_S:
        where = "ahead of" if worst > 0 else "behind"
        text = f"this clock is {_duration(abs(worst))} {where} the key server's"
        return warn("clock", f"{text}; {_HARMLESS}", _SET_CLOCK)
    if worst is not None:
        return ok("clock", "this clock agrees with the key server's within a minute")
    machine = facts.machine
    if machine.clock_s < machine.built_s:
        text = "this clock stands before the day this program was installed"
        return warn("clock", f"{text}; {_HARMLESS}", _SET_CLOCK)
    if machine.clock_set is False:
        text = "no time service keeps this clock"
        return warn("clock", f"{text}; {_HARMLESS}", _SET_CLOCK)
    return ok("clock", "nothing says that this clock is wrong")


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"
