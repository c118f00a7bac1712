"""Run blocking calls side by side, and give up on those that do not end in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

__all__ = ["in_time"]

_T = TypeVar("_T")


def in_time(calls: Sequence[Callable[[], _T]], timeout_s: float) -> list[_T | None]:
    """Return what each call returns; None for one that raises, or is not done after `timeout_s`.

    Such a call goes on in a thread that no exit waits for.
    """
    results: list[_T | None] = [None] * len(calls)

    def run(index: int) -> None:
        results[index] = calls[index]()

    threads = [
        threading.Thread(target=run, args=(index,), name="in-time", daemon=True)
        for index in range(len(calls))
    ]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    return list(results)
