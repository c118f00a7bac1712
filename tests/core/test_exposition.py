"""Prometheus' text format, read back by Prometheus' own client library."""

from __future__ import annotations

import math

from prometheus_client.parser import text_string_to_metric_families

from tdxd.core.exposition import Family, Histogram, text


def read(*families: Family) -> dict[str, list[tuple[str, dict[str, str], float]]]:
    return {
        family.name: [(one.name, one.labels, one.value) for one in family.samples]
        for family in text_string_to_metric_families(text(families))
    }


def test_numbers_and_labels_come_back_as_they_were() -> None:
    family = Family("a_bytes", "gauge", "Help: with {signs}.")
    values = (0, 1, True, 2**60, 0.1, 1e-9, -3.5, math.inf)
    for index, value in enumerate(values):
        family.add(value, number=str(index))
    assert [one[2] for one in read(family)["a_bytes"]] == [float(one) for one in values]


def test_labels_are_escaped() -> None:
    family = Family("a", "gauge", "Help.")
    hostile = 'a"b\\c\nd{},="'
    family.add(1, volume=hostile, other="x")
    assert read(family)["a"] == [("a", {"volume": hostile, "other": "x"}, 1.0)]
    assert len(text([family]).splitlines()) == 3


def test_what_is_not_known_is_not_shown_but_told() -> None:
    family = Family("a_total", "counter", "Help.")
    family.add(None, volume="m")
    assert text([family]) == "# HELP a_total Help.\n# TYPE a_total counter\n"


def test_a_state_is_one_and_all_others_are_zero() -> None:
    family = Family("a_state", "gauge", "Help.")
    family.add_state("open", ["shut", "open"], volume="m")
    assert read(family)["a_state"] == [
        ("a_state", {"volume": "m", "state": "shut"}, 0.0),
        ("a_state", {"volume": "m", "state": "open"}, 1.0),
    ]


def test_buckets_are_cumulative_and_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((0.5, 1))
    for value in (0.25, 0.5, 1, 7):
        histogram.observe(value)
    family = Family("a_seconds", "histogram", "Help.")
    family.add_histogram(histogram, method="m")
    found = [
        (name, labels.get("le"), value)
        for name, labels, value in read(family)["a_seconds"]
    ]
    assert found == [
        ("a_seconds_bucket", "0.5", 2.0),
        ("a_seconds_bucket", "1", 3.0),
        ("a_seconds_bucket", "+Inf", 4.0),
        ("a_seconds_sum", None, 8.75),
        ("a_seconds_count", None, 4.0),
    ]
