"""How a benchmark is getting on, on a terminal; nothing elsewhere."""

from __future__ import annotations

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdxd.user.bench import Query
    from tdxd.user.load import Load

__all__ = ["live_view"]

_REFRESH_S = 0.25
_RECENT = 1000
"""Of how many calls the shown percentiles are."""


@contextlib.contextmanager
def live_view(load: Load, *, wanted: bool) -> Iterator[Callable[[Query], None]]:
    """Yield a function that is told each call, and shows the figures so far on standard error.

    It is another process that calls and takes time: this disturbs no figure.
    """
    if not (wanted and sys.stderr.isatty()):
        yield lambda _query: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with (
        Progress(
            *columns,
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # what is printed meanwhile are figures, for another place
            redirect_stderr=False,
        ) as bars
    ):
        total = load.requests if load.duration_s is None else load.duration_s
        task = bars.add_task("warming up", total=total)

        def show(text: str, done: float) -> None:
            bars.update(task, description=text, completed=done)

        yield _Recent(load, show).add


class _Recent:
    """Figures of the calls so far, brought up to date a few times a second."""

    def __init__(self, load: Load, show: Callable[[str, float], None]) -> None:
        self._load, self._show = load, show
        self._latencies_s: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._calls = self._errors = 0
        self._started_s = time.monotonic()
        self._shown_s = 0.0

    def add(self, query: Query) -> None:
        """Count a call."""
        self._calls += 1
        if query.code == "OK":
            self._latencies_s.append(query.latency_s)
        else:
            self._errors += 1
        if self._calls == 1:
            self._started_s = query.ended_s - query.latency_s
        now_s = time.monotonic()
        if now_s - self._shown_s >= _REFRESH_S:
            self._shown_s = now_s
            elapsed_s = query.ended_s - self._started_s
            done = self._calls if self._load.duration_s is None else elapsed_s
            self._show(self._text(elapsed_s), done)

    def _text(self, elapsed_s: float) -> str:
        from tdxd.user.bench import percentile

        text = f"{self._calls} requests, {self._calls / max(elapsed_s, 1e-9):.1f}/s"
        if self._latencies_s:
            ordered = sorted(self._latencies_s)
            p50_ms, p99_ms = (percentile(ordered, one) * 1000 for one in (50.0, 99.0))
            text += f", p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms"
        return f"{text}, {self._errors} errors"
