"""What `tdxctl status` shows of an error."""

from __future__ import annotations

from tdxd.cli import status_tables


def shown(capsys, message):
    status_tables._show_error("volume digits", {"message": message, "hint": "do this"})
    return capsys.readouterr().out


def test_an_error_is_shown_with_what_it_is_of_and_its_hint(capsys):
    assert shown(capsys, "no route") == "volume digits: no route\n  hint: do this\n"


def test_an_error_that_names_its_volume_is_not_prefixed_twice(capsys):
    text = shown(capsys, "volume digits: no file matches /srv/x.img")
    assert text == "volume digits: no file matches /srv/x.img\n  hint: do this\n"
