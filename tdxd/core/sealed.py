"""Runs of sealed blocks, and the public record beside an image."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Literal

from tdxd.core.decode import decode
from tdxd.core.runs import (
    RUN_SLACK_BYTES,
    decrypt_run,
    encrypt_run,
    first_bad_block,
    open_run,
)
from tdxd.core.volume_id import check_volume_id
from tdxd.errors import DataError

__all__ = [
    "RUN_SLACK_BYTES",
    "PublicRecord",
    "decrypt_run",
    "encrypt_run",
    "first_bad_block",
    "open_run",
]

_RECORD_MAX_BYTES = 4096
_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PublicRecord:
    """What `NAME.img.json` says of an image, so that anyone can check a copy.

    `sha256` is that of the whole file, in hex; `created` is UTC, as RFC 3339. The guest never
    relies on any of it.
    """

    format: Literal[1] = 1
    id: str
    generation: int
    size_bytes: int
    sha256: str
    created: str

    def __post_init__(self) -> None:
        check_volume_id(self.id)
        if self.generation < 1 or self.size_bytes < 1:
            msg = "generation and size_bytes must be at least 1"
            raise ValueError(msg)
        if not _HEX_DIGEST.fullmatch(self.sha256):
            msg = f"sha256 {self.sha256!r} is not 64 lower-case hex digits"
            raise ValueError(msg)

    def encode(self) -> bytes:
        """Encode as indented JSON with a final newline."""
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, *, source: str) -> PublicRecord:
        """Decode JSON; unknown, missing and duplicate keys are refused.

        Raises: DataError.
        """
        if len(data) > _RECORD_MAX_BYTES:
            text = f"{source}: {len(data)} bytes, at most {_RECORD_MAX_BYTES} allowed"
            raise DataError(text)
        try:
            value = json.loads(data.decode(), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError) as exc:
            hint = "this file is written by tdx-seal create"
            raise DataError(f"{source}: not valid JSON", hint=hint) from exc
        return decode(cls, value, source=source, error=DataError)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        msg = "duplicate key"
        raise ValueError(msg)
    return made
