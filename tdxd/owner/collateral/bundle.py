"""A file of collateral: sets for several platforms, for the disk cache and for air-gapped owners.

Canonical JSON with a SHA-256 over the whole, which finds damage. It proves nothing: each set
proves itself by Intel's signatures, whoever carried it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence

from tdxd.core.decode import decode
from tdxd.errors import DataError
from tdxd.owner.collateral.pcs import check_question
from tdxd.owner.collateral.prepared import SET_MAX_CHARS

__all__ = [
    "BUNDLE_MAX_BYTES",
    "SETS_MAX",
    "CollateralSet",
    "encode_bundle",
    "parse_bundle",
]

FORMAT = "tdxd/collateral/v1"
BUNDLE_MAX_BYTES = 16 * 1024 * 1024
SETS_MAX = 256
_SOURCE_MAX_CHARS = 512


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CollateralSet:
    """One set as it was fetched: what was asked, where, and when (unix seconds).

    `root` is the SHA-384 of the root's public point in hex. Nothing here is proved.
    """

    root: str
    fmspc: str
    ca: str
    source: str
    fetched_s: int
    collateral: dict[str, str] = dataclasses.field(repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{96}", self.root):
            raise ValueError(f"root {self.root!r:.120} is not a SHA-384 in hex")
        try:
            check_question(self.fmspc, self.ca)
        except DataError as exc:
            raise ValueError(exc.message) from exc
        if len(self.source) > _SOURCE_MAX_CHARS or not self.source.isprintable():
            raise ValueError("source is too long or not printable")
        if not 0 <= self.fetched_s < 2**40:
            raise ValueError(f"fetched_s {self.fetched_s} is no time")

    def text(self) -> str:
        """Return the set as `prepared.prepare` reads it."""
        return json.dumps(self.collateral)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Bundle:
    format: str
    sets: tuple[CollateralSet, ...]
    sha256: str


def encode_bundle(sets: Sequence[CollateralSet]) -> bytes:
    """Return the file that holds these sets."""
    body = {"format": FORMAT, "sets": [dataclasses.asdict(one) for one in sets]}
    return _canonical({**body, "sha256": _digest(body)}) + b"\n"


def parse_bundle(data: bytes, *, source: str) -> tuple[CollateralSet, ...]:
    """Take a file apart; it must be exactly as `encode_bundle` writes it.

    Raises: DataError, naming the file.
    """
    if len(data) > BUNDLE_MAX_BYTES:
        raise DataError(f"{source}: {len(data)} bytes, at most {BUNDLE_MAX_BYTES}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise DataError(
            f"{source} is no collateral bundle: {_short(exc)}",
            hint="tdx-keyd collateral export writes one",
        ) from exc
    bundle = decode(_Bundle, value, source=source, error=DataError)
    if bundle.format != FORMAT:
        raise DataError(f"{source}: format {bundle.format!r:.60} is not {FORMAT!r}")
    if len(bundle.sets) > SETS_MAX:
        raise DataError(f"{source}: {len(bundle.sets)} sets, at most {SETS_MAX}")
    for one in bundle.sets:
        if sum(map(len, one.collateral.values())) > SET_MAX_CHARS:
            raise DataError(f"{source}: the set for {one.fmspc} is too large")
    if data != encode_bundle(bundle.sets):
        raise DataError(
            f"{source} is damaged: its SHA-256 does not fit its content",
            hint="copy or export it again",
        )
    return bundle.sets


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(body: object) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()


def _short(exc: Exception) -> str:
    return str(exc)[:200] or type(exc).__name__
