"""What `tdxctl status` shows of an error."""

from __future__ import annotations

import re

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


VOLUME = {
    "id": "digits",
    "kind": "luks2",
    "writable": True,
    "state": "mounted",
    "since": "2026-11-25T16:50:30.123+00:00",
    "generation": 1,
    "integrity": "none",
    "header": "pinned",
    "mapper": "dm",
    "size_bytes": 8 * 2**20,
    "bytes_read": 3 * 2**10,
    "image": "/srv/digits.img",
    "lease_left_s": None,
    "lease_error": None,
    "error": None,
    "last_error": {
        "time": "2026-11-25T16:49:00.001+00:00",
        "code": "volume-passphrase",
        "message": "no keyslot opens",
        "hint": "type it again",
    },
}


def test_a_volume_and_its_last_error(capsys):
    status_tables._show_volumes([VOLUME])
    titles, row, *below = capsys.readouterr().out.splitlines()
    assert titles.split()[:6] == ["VOLUME", "KIND", "STATE", "SINCE", "GEN", "LEASE"]
    assert titles.split()[6:] == ["INTEGRITY", "MAPPER", "SIZE", "READ", "IMAGE"]
    cells = [*("digits", "luks2 rw", "mounted", "2026-11-25 16:50:30", "1", "-")]
    cells += ["none (pinned header)", "dm", "8.0 MiB", "3.0 KiB", "/srv/digits.img"]
    assert re.split(r" {2,}", row) == cells
    assert below == [
        "volume digits, last error at 2026-11-25 16:49:00: no keyslot opens",
        "  hint: type it again",
    ]


def test_an_error_of_now_hides_the_last_one(capsys):
    error = {"message": "no route", "hint": ""}
    status_tables._show_volumes([{**VOLUME, "error": error}])
    assert capsys.readouterr().out.splitlines()[2:] == ["volume digits: no route"]


def test_what_is_protected_and_what_is_not(capsys):
    good = {"name": "swap", "protected": True, "text": "there is no swap", "hint": ""}
    bad = {"name": "tdx", "protected": False, "text": "no TDX", "hint": "none helps"}
    status_tables._show_protection([bad, good])
    assert capsys.readouterr().out.splitlines() == [
        "protection: swap",
        "NOT protected: tdx: no TDX",
        "  hint: none helps",
    ]
    status_tables._show_protection([bad])
    assert capsys.readouterr().out.startswith("protection: none\nNOT protected: tdx")
    status_tables._show_protection([])  # a daemon of an older version
    assert capsys.readouterr().out == ""
