"""The page that a benchmark draws."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from tdxd.user.bench import Report
from tdxd.user.load import Load
from tdxd.user.plot import render

SVG = "{http://www.w3.org/2000/svg}"


def report(count, *, clients=1, rate=None, errors=None):
    return Report(
        load=Load(clients=clients, loops=None, batch=2, warm_up=1, rate=rate),
        latencies_s=[0.001 * (1 + i % 97) for i in range(count)],
        ended_s=[0.01 * i for i in range(count)],
        errors=errors or {},
        elapsed_s=0.01 * max(count, 1),
        warm_up_s=1.0,
        client_cpu_s=0.1,
    )


def page(*reports, title="t"):
    text = render(title, reports)
    assert text.startswith("<!DOCTYPE html>")
    return text, ET.fromstring(text.partition("\n")[2])


def charts(tree):
    return {svg.find(f"{SVG}text").text: svg for svg in tree.iter(f"{SVG}svg")}


def test_one_run():
    _text, tree = page(report(500))
    found = charts(tree)
    assert list(found) == ["Latency by percentile", "Latency over time"]
    dots = list(found["Latency over time"].iter(f"{SVG}circle"))
    assert len(dots) == 500
    (line,) = found["Latency by percentile"].iter(f"{SVG}polyline")
    points = [tuple(map(float, one.split(","))) for one in line.get("points").split()]
    assert points == sorted(points)  # to the right
    heights = [y for _x, y in points]
    assert heights == sorted(heights, reverse=True)  # and up
    cells = [cell.text for cell in tree.iter("td")]
    assert cells == [
        "1 clients, batch 2",
        "500",
        "none",
        "100.0",
        "200.0",
        "47.00",
        "96.00",
    ]


def test_everything_stays_inside_its_chart():
    for count in (1, 2, 500):
        _text, tree = page(report(count), report(count, clients=3))
        for svg in tree.iter(f"{SVG}svg"):
            width, height = float(svg.get("width")), float(svg.get("height"))
            for dot in svg.iter(f"{SVG}circle"):
                assert 0 <= float(dot.get("cx")) <= width
                assert 0 <= float(dot.get("cy")) <= height
            for line in svg.iter(f"{SVG}polyline"):
                for point in line.get("points").split():
                    x, y = map(float, point.split(","))
                    assert 0 <= x <= width
                    assert 0 <= y <= height


def test_several_runs_and_their_throughput():
    text, tree = page(report(10), report(20, clients=4, rate=50.0), title="<a> & b")
    assert list(charts(tree))[-1] == "Throughput and latency"
    assert "4 clients, batch 2, 50/s" in text
    assert tree.find("body/h1").text == "<a> & b"


def test_many_points_become_fewer_and_the_slowest_stays():
    slow = report(20_000)
    slow.latencies_s[12_345] = 9.0
    _text, tree = page(slow)
    dots = list(charts(tree)["Latency over time"].iter(f"{SVG}circle"))
    assert len(dots) == 4000
    top = min(float(dot.get("cy")) for dot in dots)
    (line,) = charts(tree)["Latency by percentile"].iter(f"{SVG}polyline")
    highest = min(float(one.split(",")[1]) for one in line.get("points").split())
    assert top == pytest.approx(highest, abs=0.2)


def test_a_run_without_a_success_stands_in_the_table():
    _text, tree = page(report(0, errors={"UNAVAILABLE": 3}))
    assert charts(tree) == {}
    assert "UNAVAILABLE 3" in [cell.text for cell in tree.iter("td")]


def test_it_needs_nothing_else():
    text, _tree = page(report(100))
    assert "<script" not in text
    assert set(re.findall(r"https?://[^\"\s]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\b(src|href|@import|url\()", text)
