"""The verb `doctor`: by the daemon over the control socket, and without one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from tdxd.guest import control
from tests.contract.test_tsm import make_platform
from tests.daemon.test_daemon import World
from tests.keyserver import opened_owner
from tests.sim_process import running_sim

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


def argv(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"tdxd.cli.{program}", *map(str, arguments)]


def check_report(shown: dict[str, Any]) -> dict[str, str]:
    """Check a report's form; return the level of each finding."""
    assert shown["exit"] in (0, 69)
    levels = {one["name"]: one["level"] for one in shown["findings"]}
    assert ("fail" in levels.values()) == (shown["exit"] == 69)
    for one in shown["findings"]:
        assert one["text"]
        assert bool(one["todo"]) == (one["level"] != "ok")
    return levels


async def ask(path: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        argv("tdxctl", "--socket", path, *arguments),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        env=ENV,
        cwd=ROOT,
    )


@pytest.mark.root
async def test_the_daemon_examines_its_machine(tmp_path: Path) -> None:
    world = World(tmp_path)
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(control.serve, listener, world.make_daemon(nursery))
            done = await ask(path, "doctor", "--json")
            status = await ask(path, "status", "--json")
            nursery.cancel_scope.cancel()
    shown = json.loads(done.stdout)
    assert done.returncode == shown["exit"]
    levels = check_report(shown)
    assert levels["config"] == "ok"
    assert levels["key-server"] == "fail"  # its CA is /ca, which is not there
    for one in json.loads(status.stdout)["protection"]:
        assert one["protected"] == (levels[one["name"]] == "ok"), one


@pytest.mark.root
def test_without_a_daemon_tdxd_itself_is_asked(tmp_path: Path) -> None:
    """On this very machine, which has no daemon, no configuration and no TDX."""
    place = tmp_path / "tdxd"
    place.write_text(
        f"#!/bin/sh\nexec {sys.executable} -m tdxd.cli.tdxd "
        f'"$1" --config {tmp_path}/none.toml "$2"\n'
    )
    place.chmod(0o755)
    env = {**ENV, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        argv("tdxctl", "--socket", tmp_path / "nobody", "doctor", "--json"),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=env,
        cwd=ROOT,
    )
    assert "asking tdxd doctor instead" in done.stderr
    shown = json.loads(done.stdout)
    levels = check_report(shown)
    assert levels["config"] == "fail"
    assert done.returncode == 69


def doctor(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv("tdxd", *arguments),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=ENV,
        cwd=ROOT,
    )


def test_a_configuration_that_is_wrong_is_a_finding(tmp_path: Path) -> None:
    config = tmp_path / "tdxd.toml"
    config.write_text("[key_release]\nservres = []\n")
    done = doctor("doctor", "--config", config)
    assert done.returncode == 69
    first = done.stdout.splitlines()[0]
    assert first.startswith("fail  config")
    assert "unknown key" in first
    assert done.stderr == ""


def test_the_config_may_be_named_before_the_verb(tmp_path: Path) -> None:
    for order in (
        ("--config", tmp_path / "x.toml", "doctor"),
        ("doctor", "--config", tmp_path / "x.toml"),
    ):
        done = doctor(*order, "--json")
        assert f"{tmp_path}/x.toml: cannot be read" in done.stdout


@pytest.mark.root
@pytest.mark.parametrize("way", ["configfs", "ioctl"])
def test_a_guest_that_has_all_is_well(tmp_path: Path, way: str) -> None:
    """Platform, quoting service and key server are there: only what is simulated is warned of."""
    (tmp_path / "o").mkdir()
    with opened_owner(tmp_path / "o") as owner:
        make_platform(tmp_path / "p", "", events=True)
        mount, qgs = tmp_path / "m", f"unix:{tmp_path}/q"
        config = tmp_path / "tdxd.toml"
        config.write_text(
            f"""\
[key_release]
servers = ["{owner.address}"]
ca = "{owner.pin.ca}"
signing_key = "{owner.pin.signing_key}"
[platform]
evidence = "{way}"
tsm = "{mount}/report"
tdx_guest = "{mount}/tdx_guest"
qgs = "{qgs}"
event_log = "{mount}/CCEL"
rtmr = "{mount}/measurements"
[security]
accept_unmeasured = true
"""
        )
        arguments = ("--mount", mount, "--device-only", "--qgs", qgs)
        with running_sim(tmp_path / "p", *arguments):
            done = doctor("doctor", "--config", config, "--json")
    levels = check_report(json.loads(done.stdout))
    assert {
        name: levels[name]
        for name in ("tdx", "quotes-by", "quote", "event-log", "rtmr3", "trust")
    } == {
        "tdx": "warn",
        "quotes-by": "ok",
        "quote": "ok",
        "event-log": "ok",
        "rtmr3": "ok",
        "trust": "warn",
    }
    assert levels[f"key-server {owner.address}"] == "ok"
    assert "fail" not in levels.values()
    assert done.returncode == 0


CANARY = "canary-0123456789abcdef"


def test_the_doctor_shows_no_content_of_files(tmp_path: Path) -> None:
    """Neither the CA's file nor an image is quoted, whatever is wrong with them."""
    (tmp_path / "ca.pem").write_text(CANARY)
    (tmp_path / "m.img").write_text(CANARY)
    config = tmp_path / "tdxd.toml"
    config.write_text(
        f"""\
[key_release]
servers = ["127.0.0.1:1"]
ca = "{tmp_path}/ca.pem"
signing_key = "ed25519:{"A" * 43}="
[[volume]]
id = "m"
image = "{tmp_path}/m.img"
[platform]
tsm = "{tmp_path}/report"
"""
    )
    done = doctor("doctor", "--config", config)
    assert CANARY not in done.stdout + done.stderr
    assert "127.0.0.1:1" in done.stdout
    assert done.returncode == 69
