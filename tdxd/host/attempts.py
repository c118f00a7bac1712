"""Ask for evidence several times, where a failure may pass."""

from __future__ import annotations

import time
from collections.abc import Callable

from tdxd.core.quote import REPORT_DATA_BYTES
from tdxd.errors import EvidenceUnavailableError

__all__ = [
    "ANSWER_S",
    "ATTEMPTS",
    "LONGEST_QUOTE_S",
    "PAUSE_S",
    "TransientError",
    "quote_by_attempts",
]

ATTEMPTS = 4
PAUSE_S = 0.25
ANSWER_S = 30.0
"""How long the host's quoting service may take each time; by configfs the kernel sees to it."""
LONGEST_QUOTE_S = ATTEMPTS * (ANSWER_S + PAUSE_S)
"""How long asking for a quote can take where the host does not answer."""


class TransientError(Exception):
    """This attempt failed in a way that another may not."""

    def __init__(self, error: EvidenceUnavailableError) -> None:
        super().__init__(str(error))
        self.error = error


def quote_by_attempts(
    once: Callable[[bytes], bytes], report_data: bytes, *, attempts: int, pause_s: float
) -> bytes:
    """Return what `once` makes of 64 bytes of report data, asked `attempts` times at most.

    Raises: EvidenceUnavailableError; ValueError for report data of another size.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise ValueError(f"report data is {len(report_data)} bytes long, not 64")
    for left in reversed(range(attempts)):
        try:
            return once(report_data)
        except TransientError as exc:
            if not left:
                raise exc.error from exc
            time.sleep(pause_s)
    raise AssertionError("attempts is at least 1")  # pragma: no cover
