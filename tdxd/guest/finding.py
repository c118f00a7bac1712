"""What the doctor knows, and how it says what it finds."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tdxd.core.config import Config
from tdxd.core.config_trust import ConfigTrust
from tdxd.core.protection import Observed
from tdxd.host.evidence_facts import EvidenceFacts
from tdxd.host.facts import MachineFacts, Problem
from tdxd.host.key_server_facts import KeyServerFacts

__all__ = ["Facts", "Finding", "ImageFact", "fail", "ok", "warn"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One sentence on one matter, and what to do about it; `fail`: tdxd cannot do its work so."""

    name: str
    level: Literal["ok", "warn", "fail"]
    text: str
    todo: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFact:
    """A volume's id, its pattern, and the sizes of the files that match now."""

    volume_id: str
    pattern: str
    sizes_bytes: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that findings are made of."""

    config: Config
    trust: ConfigTrust
    machine: MachineFacts
    observed: Observed
    evidence: EvidenceFacts
    ca: Problem | None
    """Why the key servers' CA cannot be read."""
    servers: tuple[KeyServerFacts, ...]
    haproxy: str | None
    model_server: str | None
    model_server_problem: Problem | None
    images: tuple[ImageFact, ...]


def ok(name: str, text: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(name=name, level="ok", text=text)


def warn(name: str, text: str, todo: str) -> Finding:
    """Return a finding that tdxd can live with."""
    return Finding(name=name, level="warn", text=text, todo=todo)


def fail(name: str, text: str, todo: str) -> Finding:
    """Return a finding that keeps tdxd from its work."""
    return Finding(name=name, level="fail", text=text, todo=todo)
