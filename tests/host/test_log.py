"""One event in the log: a line of text, or a datagram of the journal."""

from __future__ import annotations

import subprocess
import sys

from tdxd.host import log

EVENT = {
    "seq": 7,
    "time": "2026-01-01T00:00:00Z",
    "level": "warning",
    "event": "volume.failed",
    "volume": "model",
    "error": "first\nsecond",
}


def test_text_is_one_line_with_time_level_name_and_fields() -> None:
    assert log.text_line(EVENT) == (
        "2026-01-01T00:00:00Z [warning] volume.failed volume=model error='first\\nsecond'"
    )


def test_text_does_not_pass_terminal_escapes_on() -> None:
    line = log.text_line({**EVENT, "error": "\x1b]0;title\x07"})
    assert line.isprintable()


def test_without_a_journal_events_go_to_standard_error() -> None:
    code = f"from tdxd.host import log; log.configure(); log.open_log()({EVENT!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert done.stderr.endswith(log.text_line(EVENT).partition(" ")[2] + "\n")


def test_journal_fields_are_named_and_prioritised() -> None:
    entry = log.journal_entry(EVENT)
    assert b"PRIORITY=4\n" in entry
    assert b"TDXD_EVENT=volume.failed\nTDXD_VOLUME=model\n" in entry
    assert b"SEQ" not in entry


def test_journal_field_of_several_lines_carries_its_length() -> None:
    # Source: Native Journal Protocol: name, newline, little-endian 64-bit size, data, newline.
    size = (12).to_bytes(8, "little")
    assert b"TDXD_ERROR\n" + size + b"first\nsecond\n" in log.journal_entry(EVENT)


def test_journal_name_cannot_be_forged_by_a_value() -> None:
    entry = log.journal_entry({**EVENT, "error": "x\nPRIORITY=0"})
    assert b"\nPRIORITY=0\nTDXD" not in entry
    assert b"TDXD_ERROR\n" + (12).to_bytes(8, "little") + b"x\nPRIORITY=0\n" in entry
