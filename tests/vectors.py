"""The real quotes and event logs, read in place; tests skip where they are absent."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
needs_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason=f"no real quotes at {VECTORS}"
)


def quote_names() -> list[str]:
    """Names of the real quotes; one that skips where there are none."""
    folder = VECTORS / "quotes"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ["-"]


def quote_bytes(name: str) -> bytes:
    return (VECTORS / "quotes" / name / "quote.bin").read_bytes()


@functools.cache
def expected(name: str) -> dict[str, Any]:
    text = (VECTORS / "quotes" / name / "expected.json").read_text()
    value: dict[str, Any] = json.loads(text)
    return value
