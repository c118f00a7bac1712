"""A collateral cache for tests: a service that a test steers, and floors that it sees."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tdxd.errors import UnavailableError
from tdxd.owner.appraisal.appraise import TrustedRoot, appraise, load_root, read_quote
from tdxd.owner.collateral.bundle import CollateralSet
from tdxd.owner.collateral.cache import (
    CollateralCache,
    Prepared,
    SetRules,
    Trust,
    examine,
)
from tdxd.owner.collateral.files import CollateralFiles
from tdxd.owner.collateral.floors import Floors
from tdxd.owner.collateral.prepared import prepare
from tdxd.owner.collateral.roots import trust_of
from tdxd.sim.platform import SimPlatform

__all__ = [
    "DAY",
    "NOW",
    "MemoryFloors",
    "Service",
    "a_set",
    "cache_of",
    "examined",
    "failed",
    "root_of",
    "trust",
    "verdict",
]

NOW = 1_790_000_000
DAY = 86400


class MemoryFloors:
    """Floors that live as long as the test."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def get(self) -> Mapping[str, int]:
        return dict(self.values)

    def raise_to(self, values: Mapping[str, int]) -> None:
        for name, value in values.items():
            self.values[name] = max(value, self.values.get(name, value))


class Service:
    """Fetches from the platform, as of a moment and a state that the test moves; may be down."""

    def __init__(self, platform: SimPlatform) -> None:
        self.platform = platform
        self.now_s = NOW
        self.state: dict[str, Any] = {}
        self.down = False
        self.asked = 0

    def __call__(self, fmspc: str, ca: str) -> str:
        self.asked += 1
        if self.down:
            raise UnavailableError("collateral: down")
        return self.platform.collateral_json(self.now_s, **self.state)


def root_of(platform: SimPlatform) -> TrustedRoot:
    return load_root(platform.root_der, simulated=True, source="root")


def trust(platform: SimPlatform) -> Trust:
    return trust_of(root_of(platform))


def cache_of(
    service: Any,
    directory: Path,
    platform: SimPlatform,
    floors: Floors | None = None,
    **changes: Any,
) -> CollateralCache:
    root = trust(platform)
    options: dict[str, Any] = {
        "trust": root,
        "floors": floors or MemoryFloors(),
        "files": CollateralFiles(directory, root.key_sha384),
        "rules": SetRules(),
        "refresh_s": DAY,
        "source": "http://pccs.test",
        **changes,
    }
    return CollateralCache(service, **options)


def examined(
    platform: SimPlatform,
    text: str,
    *,
    now_s: float = NOW,
    rules: SetRules | None = None,
    floors: Mapping[str, int] | None = None,
    ca: str = "platform",
    fmspc: str | None = None,
) -> Prepared:
    return examine(
        prepare(text),
        trust=trust(platform),
        fmspc=fmspc or platform.fmspc,
        ca=ca,
        now_s=now_s,
        rules=rules or SetRules(),
        floors=floors or {},
    )


def failed(prepared: Prepared) -> dict[str, str]:
    """Actual value of each failed check."""
    return {check.name: check.actual for check in prepared.checks if not check.ok}


def a_set(platform: SimPlatform, now_s: int = NOW, **state: Any) -> CollateralSet:
    """A set as it stands in a bundle."""
    prepared = prepare(platform.collateral_json(now_s, **state))
    return CollateralSet(
        root=root_of(platform).key_sha384,
        fmspc=platform.fmspc,
        ca="platform",
        source="http://pccs.test",
        fetched_s=now_s,
        collateral=dict(prepared.fields),
    )


def verdict(cache: CollateralCache, platform: SimPlatform, now_s: int = NOW) -> Any:
    """Appraise a good quote of the platform with what the cache gives."""
    report, exact = read_quote(platform.quote(bytes(64)))
    prepared = cache.get(platform.fmspc, "platform", now_s)
    return appraise(exact, report, prepared, now_s, root_of(platform))
