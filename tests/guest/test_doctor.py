"""The doctor in a guest: the installed programs, with device mapper and systemd, without TDX."""

from __future__ import annotations

import json

import pytest

from contrib.guest.machine import Machine

pytestmark = [pytest.mark.guest, pytest.mark.root]


def test_the_doctor_tells_what_this_guest_lacks(bare: Machine) -> None:
    done = bare.run(
        "tdxd doctor --config /nonexistent.toml --json", timeout_s=120, check=False
    )
    assert done.code == 69, done.stderr
    shown = json.loads(done.stdout)
    found = {one["name"]: one for one in shown["findings"]}
    levels = {name: one["level"] for name, one in found.items()}
    assert levels["config"] == "fail"
    assert levels["tdx"] == "fail"
    assert levels["quotes-by"] == "fail"
    assert levels["swap"] == "ok"
    assert levels["mapper"] == "ok"
    assert levels["agents"] == "warn"  # the harness commands this guest by one
    assert "qemu-guest-agent" in found["agents"]["text"]
    assert levels["unit"] in ("ok", "warn")


def test_tdxctl_asks_tdxd_where_there_is_no_daemon(bare: Machine) -> None:
    done = bare.run(
        "tdxctl --socket /nowhere doctor --json", timeout_s=120, check=False
    )
    assert done.code == 69, done.stderr
    assert "asking tdxd doctor instead" in done.stderr
    assert json.loads(done.stdout)["exit"] == 69
