"""Which versions of a model to serve, from the names in its directory. Pure.

Source: tensorflow_serving/sources/storage_path/file_system_storage_path_source.cc.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

__all__ = ["Policy", "choose", "index_versions"]

_NUMBER = re.compile(r"[0-9]{1,19}")
_INT64_MAX = 2**63 - 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Serve the `count` highest versions, all, or those of `versions` that exist."""

    kind: Literal["latest", "all", "specific"] = "latest"
    count: int = 1
    versions: frozenset[int] = frozenset()


def index_versions(names: Iterable[str]) -> dict[int, str]:
    """Return the directory name of each version; names that are no number are skipped.

    Of several spellings of one number (`1`, `01`), the last in order of the alphabet is taken.
    """
    found: dict[int, str] = {}
    for name in sorted(names):
        if _NUMBER.fullmatch(name) and int(name) <= _INT64_MAX:
            found[int(name)] = name
    return found


def choose(policy: Policy, found: Mapping[int, str]) -> tuple[int, ...]:
    """Return the versions to serve, in ascending order."""
    ordered = sorted(found)
    if policy.kind == "all":
        return tuple(ordered)
    if policy.kind == "specific":
        return tuple(version for version in ordered if version in policy.versions)
    return tuple(ordered[-max(policy.count, 1) :])
