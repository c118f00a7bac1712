"""What `tdxctl status` shows of an error."""

from __future__ import annotations

import pytest

from tdxd.cli import status_tables


def shown(capsys, message):
    status_tables._show_error("volume digits", {"message": message, "hint": "do this"})
    return capsys.readouterr().out


def test_an_error_is_shown_with_what_it_is_of_and_its_hint(capsys):
    assert shown(capsys, "no route") == "volume digits: no route\n  hint: do this\n"


def test_an_error_that_names_its_volume_is_not_prefixed_twice(capsys):
    text = shown(capsys, "volume digits: no file matches /srv/x.img")
    assert text == "volume digits: no file matches /srv/x.img\n  hint: do this\n"


def test_what_keeps_quotes_from_showing_what_is_served(capsys):
    status_tables._show_runtime({"extend": "never", "events": 0, "error": None})
    assert capsys.readouterr().out == (
        "warning: quotes do not show what is served: RTMR3 is not extended\n"
    )
    error = {"code": "host", "message": "extend /sys/x: no", "hint": "Linux 6.16"}
    status_tables._show_runtime({"extend": "required", "events": 1, "error": error})
    assert capsys.readouterr().out == (
        "runtime log: extend /sys/x: no\n  hint: Linux 6.16\n"
    )
    status_tables._show_runtime({"extend": "required", "events": 1, "error": None})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("left_s", "shown"),
    [
        (None, "-"),
        (0, "0 s"),
        (119.9, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7200, "2 h"),
        (30 * 86400, "30 d"),
    ],
)
def test_a_lease_in_its_largest_unit(left_s, shown):
    assert status_tables._span(left_s) == shown
