"""Latency plots of benchmark runs: one HTML file that needs nothing else, no script, no network."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

from tdxd.user.bench import Report, percentile

__all__ = ["render"]

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 30, 44
_COLOURS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#ff7f0e",
    "#9467bd",
    "#8c564b",
    "#17becf",
    "#7f7f7f",
)
_MAX_POINTS = 4000
"""Dots of one run in the plot over time; more would hide each other."""
_NINES = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)

_PAGE = """\
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><title>{title}</title>
<style>
body {{ font: 14px sans-serif; margin: 2em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
td, th {{ padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #ddd; }}
svg {{ display: block; margin: 1em 0; }}
svg text {{ font: 12px sans-serif; fill: #222; }}
.grid {{ stroke: #ddd; }} .axis {{ stroke: #222; }}
.line {{ fill: none; stroke-width: 1.6; }} .dot {{ fill-opacity: 0.5; }}
</style></head><body>
<h1>{title}</h1>
{parts}
</body></html>
"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    name: str
    points: Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Axis:
    """`place` gives 0 to 1 for a value; `ticks` are (value, text)."""

    title: str
    place: Callable[[float], float]
    ticks: Sequence[tuple[float, str]]


def render(title: str, reports: Sequence[Report]) -> str:
    """Return an HTML page on some runs: a table, latency by percentile, latency over time.

    With several runs also their throughput against latency. Runs without a success stand in the
    table alone.
    """
    names = [_name(report) for report in reports]
    measured = [
        (name, report)
        for name, report in zip(names, reports, strict=True)
        if report.latencies_s
    ]
    parts = [_table(names, reports)]
    if measured:
        parts.append(_by_percentile(measured))
        parts.append(_over_time(measured))
    if len(measured) > 1:
        parts.append(_throughput(measured))
    return _PAGE.format(title=html.escape(title), parts="\n".join(parts))


def _name(report: Report) -> str:
    load = report.load
    rate = "" if load.rate is None else f", {load.rate:g}/s"
    return f"{load.clients} clients, batch {load.batch}{rate}"


def _table(names: Sequence[str], reports: Sequence[Report]) -> str:
    head = ("run", "requests", "errors", "requests/s", "rows/s", "p50 ms", "p99 ms")
    rows = ["".join(f"<th>{one}</th>" for one in head)]
    for name, report in zip(names, reports, strict=True):
        spread = report.spread_ms()
        errors = ", ".join(f"{code} {n}" for code, n in sorted(report.errors.items()))
        cells = (
            name,
            str(report.requests),
            errors or "none",
            f"{report.requests_per_s:.1f}",
            f"{report.rows_per_s:.1f}",
            f"{spread['p50']:.2f}" if spread else "-",
            f"{spread['p99']:.2f}" if spread else "-",
        )
        rows.append("".join(f"<td>{html.escape(one)}</td>" for one in cells))
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table>\n{body}\n</table>"


def _by_percentile(measured: Sequence[tuple[str, Report]]) -> str:
    """Draw percentiles so far apart that the slowest few can be seen: by their nines."""
    series, longest = [], 0
    for name, report in measured:
        ordered = sorted(report.latencies_s)
        longest = max(longest, len(ordered))
        count = min(len(ordered), 400)
        deepest = math.log10(len(ordered))
        shares = [100 * (1 - 10 ** (-deepest * i / count)) for i in range(count + 1)]
        points = [(share, percentile(ordered, share) * 1000) for share in shares[:-1]]
        points.append((shares[-1], ordered[-1] * 1000))
        series.append(_Series(name=name, points=points))
    deepest = max(math.log10(longest), 1.0)
    axis = _Axis(
        title="percentile",
        place=lambda share: min(-math.log10(max(1 - share / 100, 1e-9)) / deepest, 1.0),
        ticks=[
            (share, f"{share:g}")
            for share in _NINES
            if -math.log10(1 - share / 100) <= deepest + 1e-9
        ],
    )
    return _chart("Latency by percentile", axis, _log_axis(series), series, dots=False)


def _over_time(measured: Sequence[tuple[str, Report]]) -> str:
    series = []
    for name, report in measured:
        points = list(
            zip(
                report.ended_s,
                (one * 1000 for one in report.latencies_s),
                strict=False,
            )
        )
        series.append(_Series(name=name, points=_fewer(points)))
    longest = max(report.elapsed_s for _name, report in measured)
    axis = _linear_axis("seconds since the start", longest)
    return _chart("Latency over time", axis, _log_axis(series), series, dots=True)


def _fewer(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep of each stretch of points the slowest: what must not be lost."""
    size = math.ceil(len(points) / _MAX_POINTS) or 1
    return [
        max(points[at : at + size], key=lambda point: point[1])
        for at in range(0, len(points), size)
    ]


def _throughput(measured: Sequence[tuple[str, Report]]) -> str:
    series = []
    for share in ("p50", "p99"):
        points = [
            (report.rows_per_s, report.spread_ms()[share]) for _, report in measured
        ]
        series.append(_Series(name=share, points=points))
    axis = _linear_axis("rows per second", max(one.rows_per_s for _, one in measured))
    return _chart("Throughput and latency", axis, _log_axis(series), series, dots=True)


def _linear_axis(title: str, greatest: float) -> _Axis:
    whole = greatest or 1.0
    step = 10 ** math.floor(math.log10(whole))
    if whole / step < 2:
        step /= 5
    elif whole / step < 5:
        step /= 2
    ticks = [
        (step * number, f"{step * number:g}") for number in range(int(whole / step) + 1)
    ]
    return _Axis(title=title, place=lambda value: value / whole, ticks=ticks)


def _log_axis(series: Sequence[_Series]) -> _Axis:
    values = [max(y, 1e-3) for one in series for _x, y in one.points] or [1.0]
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    ticks = [
        (factor * 10.0**power, f"{factor * 10.0**power:g}")
        for power in range(low, high + 1)
        for factor in ((1,) if power == high or high - low > 3 else (1, 2, 5))
    ]
    return _Axis(
        title="ms",
        place=lambda value: (math.log10(max(value, 1e-3)) - low) / (high - low),
        ticks=ticks,
    )


def _chart(
    title: str, across: _Axis, up: _Axis, series: Sequence[_Series], *, dots: bool
) -> str:
    parts = [_text(_LEFT, 18, title), *_axes(across, up)]
    for number, one in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        places = [(_x(across, x), _y(up, y)) for x, y in one.points]
        parts += _drawn(places, colour, dots=dots)
        x, y = _WIDTH - _RIGHT + 10, _TOP + 16 * number
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(x + 16, y + 10, one.name))
    tall = max(_HEIGHT, _TOP + 16 * len(series))
    size = f'width="{_WIDTH + 110}" height="{tall}"'
    body = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>'


def _axes(across: _Axis, up: _Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        _text((_LEFT + right) / 2, _HEIGHT - 8, across.title, "middle"),
        _text(8, (_TOP + bottom) / 2, up.title),
    ]
    for value, text in across.ticks:
        x = _x(across, value)
        parts.append(_line("grid", x, _TOP, x, bottom))
        parts.append(_text(x, bottom + 16, text, "middle"))
    for value, text in up.ticks:
        y = _y(up, value)
        parts.append(_line("grid", _LEFT, y, right, y))
        parts.append(_text(_LEFT - 6, y + 4, text, "end"))
    parts.append(_line("axis", _LEFT, bottom, right, bottom))
    parts.append(_line("axis", _LEFT, _TOP, _LEFT, bottom))
    return parts


def _x(axis: _Axis, value: float) -> float:
    return _LEFT + axis.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: _Axis, value: float) -> float:
    return _HEIGHT - _BOTTOM - axis.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    shown = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>'


def _drawn(
    places: Sequence[tuple[float, float]], colour: str, *, dots: bool
) -> list[str]:
    if dots:
        return [
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>'
            for x, y in places
        ]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return [f'<polyline class="line" stroke="{colour}" points="{points}"/>']


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
