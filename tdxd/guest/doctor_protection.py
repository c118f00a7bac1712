"""Judges what is protected: as `status` shows it, and whether tdxd can do its work so."""

from __future__ import annotations

from collections.abc import Iterator

from tdxd.core.config_trust import ConfigTrust
from tdxd.core.protection import judge as protections
from tdxd.core.protection import quotes_elsewhere
from tdxd.guest.finding import Facts, Finding, fail, ok, warn

__all__ = ["judge"]


def judge(facts: Facts) -> Iterator[Finding]:
    """Yield a finding for each matter of protection."""
    security = facts.config.security
    accepted = {
        "tdx": quotes_elsewhere(facts.config.platform),
        "trust": security.accept_unmeasured,
        "swap": security.accept_swap,
    }
    if facts.trust is ConfigTrust.CONTRADICTED:
        accepted["trust"] = False
    for one in protections(facts.observed, facts.config, facts.trust):
        if one.protected:
            yield ok(one.name, one.text)
        elif one.name not in accepted:
            yield warn(one.name, one.text, one.hint)
        elif accepted[one.name]:
            text = f"{one.text}; the configuration accepts that"
            yield warn(one.name, text, one.hint)
        else:
            yield fail(one.name, one.text, one.hint)
