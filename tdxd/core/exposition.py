"""Prometheus' text format: families of samples, and histograms that are counted here.

Every family tells its HELP and TYPE also while it has no sample, so that whoever scrapes sees what
there is. prometheus-client would take 10 MiB of the daemon's memory for that, to keep values that
stand in its status already; tests read the text back with it.
Source: Prometheus, "Exposition formats", text format 0.0.4; "Metric and label naming".
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

__all__ = ["CONTENT_TYPE", "Family", "Histogram", "text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclasses.dataclass(slots=True)
class Family:
    """A metric: its name, kind, one line of help, and its samples."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    samples: list[str] = dataclasses.field(default_factory=list)

    def add(self, value: float | None, *, suffix: str = "", **labels: str) -> None:
        """Add a sample; what is not known (`None`) is not shown."""
        if value is None:
            return
        pairs = ",".join(f'{key}="{_escaped(one)}"' for key, one in labels.items())
        shown = f"{{{pairs}}}" if pairs else ""
        number = int(value) if isinstance(value, bool) else value
        self.samples.append(f"{self.name}{suffix}{shown} {number!r}")

    def add_state(self, value: str, known: Iterable[str], **labels: str) -> None:
        """Add a sample for each known state: 1 for the one that it is, else 0."""
        for one in known:
            self.add(one == value, **labels, state=one)

    def add_histogram(self, one: Histogram, **labels: str) -> None:
        """Add a histogram's buckets, sum and count."""
        total = 0
        for bound, count in zip([*one.bounds, None], one.counts, strict=True):
            total += count
            limit = "+Inf" if bound is None else f"{bound:g}"
            self.add(total, suffix="_bucket", **labels, le=limit)
        self.add(one.sum, suffix="_sum", **labels)
        self.add(total, suffix="_count", **labels)


class Histogram:
    """How often a value was at most each bound; the last count is of all beyond."""

    def __init__(
        self, bounds: Sequence[float], counts: Sequence[int] = (), total: float = 0.0
    ) -> None:
        self.bounds = tuple(bounds)
        self.counts = list(counts) or [0] * (len(self.bounds) + 1)
        self.sum = total

    def observe(self, value: float) -> None:
        """Count one more value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


def text(families: Iterable[Family]) -> str:
    """Return what a scrape answers."""
    return "".join(f"{line}\n" for family in families for line in _lines(family))


def _lines(family: Family) -> Iterator[str]:
    yield f"# HELP {family.name} {family.help}"
    yield f"# TYPE {family.name} {family.kind}"
    yield from family.samples


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
