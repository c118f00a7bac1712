"""A judge without a server: a simulated platform, its collateral, and a policy enrolled from it.

The judge is the product's own: token, report data, collateral cache, dcap-qvl and policy; only gRPC
and the store are left out, which tests/attacks/test_release_evidence.py have.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdxd.core import keyrelease as protocol
from tdxd.core.check import Check
from tdxd.core.policy import Policy, parse_policy
from tdxd.owner.appraisal.appraise import load_root
from tdxd.owner.appraisal.enroll import Reference, enroll
from tdxd.owner.appraisal.judge import (
    Finding,
    Judge,
    Judgement,
    judge_volume,
    reason_of,
)
from tdxd.owner.collateral.cache import CollateralCache, SetRules, Trust
from tdxd.owner.collateral.files import CollateralFiles
from tdxd.sim.collateral import Collateral
from tdxd.sim.platform import SimPlatform

__all__ = ["NOW", "Court", "policy_of", "resigned"]

NOW = 1_790_000_000
"""A moment of 2026, in seconds since 1970."""
_TOKEN_KEY = bytes(range(32))
_DEPLOYMENT = b"deployment 16 by"
_SIGNING_KEY = b"\7" * 32


class Floors:
    """Floors in memory."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def get(self) -> dict[str, int]:
        return dict(self.values)

    def raise_to(self, floors: Any) -> None:
        for name, value in floors.items():
            self.values[name] = max(value, self.values.get(name, 0))


def policy_of(platform: SimPlatform, **changes: str) -> str:
    """The policy that is enrolled from a platform; `changes` replace lines, by their key."""
    reference = Reference(
        quote=platform.quote(bytes(64)), event_log=platform.event_log, simulated=True
    )
    lines = []
    for line in enroll(reference).text.splitlines():
        key = line.partition(" = ")[0]
        lines.append(f"{key} = {changes.pop(key)}" if key in changes else line)
    added = [f"{key} = {value}" for key, value in changes.items()]
    at = lines.index("[tdx]") + 1
    return "\n".join([*lines[:at], *added, *lines[at:]]) + "\n"


def resigned(
    platform: SimPlatform, collateral: Collateral, edit: Callable[[Any], None]
) -> Collateral:
    """Edit the TCB info, and sign it again as Intel would."""
    import json

    fields = json.loads(collateral.tcb_info)
    edit(fields)
    text = json.dumps(fields, separators=(",", ":"))
    signature = platform.pki.tcb_signer.sign_raw(text.encode())
    return dataclasses.replace(collateral, tcb_info=text, tcb_info_signature=signature)


class Court:
    """One platform before one judge; `state` and `mangle` change its collateral."""

    def __init__(self, directory: Path, platform: SimPlatform | None = None) -> None:
        self.platform = platform or SimPlatform.create()
        self.state: dict[str, Any] = {}
        self.mangle: Callable[[Collateral], Collateral] = lambda one: one
        self.event_log = self.platform.event_log
        self.runtime_log = b""
        self.known: set[tuple[str, int, bytes]] = set()
        self.policy: Policy = parse_policy(policy_of(self.platform))
        self.root = load_root(self.platform.root_der, simulated=True, source="root")
        self._directory = directory
        self.floors = Floors()
        self.renew()

    def renew(self) -> None:
        """Start with an empty cache of collateral, as after a restart."""
        cache = CollateralCache(
            lambda _fmspc, _ca: self.collateral().to_json(),
            trust=Trust(name=self.root.name, key_sha384=self.root.key_sha384),
            floors=self.floors,
            files=CollateralFiles(self._kept(), "00" * 48),
            rules=SetRules(),
            refresh_s=0.5,
            source="test",
        )
        self.judge = Judge(
            token_keys=lambda: (_TOKEN_KEY,),
            deployment=_DEPLOYMENT,
            signing_key_sha256=_SIGNING_KEY,
            roots={self.root: cache},
        )

    def _kept(self) -> Path:
        kept = self._directory / os.urandom(4).hex()
        kept.mkdir()
        return kept

    def collateral(self) -> Collateral:
        return self.mangle(self.platform.collateral(NOW, **self.state))

    def evidence(self, quote: Any = None, **overrides: Any) -> protocol.Evidence:
        """A request; `overrides` are of the quote, `quote` makes it from report data instead."""
        claims = protocol.TokenClaims(
            nonce=os.urandom(32), expiry_s=NOW + 60, deployment=_DEPLOYMENT
        )
        token = protocol.encode_token(claims, key=_TOKEN_KEY, iv=os.urandom(12))
        fields: dict[str, Any] = {
            "token": token,
            "public_key": b"\1" * 1216,
            "volume_ids": ("v",),
            "event_log": self.event_log,
            "runtime_log": self.runtime_log,
        }
        data = protocol.report_data(signing_key_sha256=_SIGNING_KEY, **fields)
        shape = {"report_data": data, **overrides}
        made = quote(data) if quote else self.platform.quote(**shape)
        return protocol.Evidence(quote=made, **fields)

    def judgement(self, *args: Any, **overrides: Any) -> Judgement:
        return self.judge.judge(self.evidence(*args, **overrides), NOW)

    def checks(self, *args: Any, **overrides: Any) -> tuple[Check, ...]:
        """The whole table of one volume."""
        finding = Finding(known=True, policy=self.policy)
        judgement = self.judgement(*args, **overrides)
        return judge_volume(
            "v", judgement, finding, lambda *one: tuple(one) in self.known
        )

    def failed(self, *args: Any, **overrides: Any) -> dict[str, str]:
        """Each check that failed, with what was found."""
        table = self.checks(*args, **overrides)
        return {one.name: one.actual for one in table if not one.ok}

    def reason(self, *args: Any, **overrides: Any) -> str:
        return reason_of(self.checks(*args, **overrides))

    def rules(self, **changes: str) -> None:
        """Change the policy."""
        self.policy = parse_policy(policy_of(self.platform, **changes))
