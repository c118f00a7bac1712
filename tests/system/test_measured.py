"""What later quotes show of this guest: which volumes it served, and its configuration."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tdxd.core.runtime_log import read_volume_event, replay_runtime
from tdxd.core.runtime_record import RuntimeHistory, parse_history
from tests.system.world import World, free_port, ok, program, toml, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]

RUN = Path("/run") / f"tdxd-system-{os.getpid()}"


@contextlib.contextmanager
def own_platform(
    world: World, name: str, *, faults: str = "", config_id: str = ""
) -> Iterator[dict[str, Any]]:
    """Run the same genuine platform with registers of its own; yields `[platform]`."""
    directory = world.directory / name
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(world.directory / "sim", directory)
    description = directory / "platform.toml"
    text = description.read_text()
    if faults:
        text = text.replace('rtmr = "none"', faults)
    if config_id:
        pattern = r'mr_config_id = "\w+"'
        text = re.sub(pattern, f'mr_config_id = "{config_id}"', text)
    description.write_text(text)
    before = world.sim_ready
    try:
        with world.simulator(name):
            yield platform_of(world, name)
    finally:
        world.sim_ready = before


def platform_of(world: World, name: str) -> dict[str, Any]:
    mount = world.directory / f"{name}-mnt"
    return {
        "tsm": f"{mount}/report",
        "event_log": f"{mount}/CCEL",
        "rtmr": f"{mount}/measurements",
        "runtime_log": str(world.directory / f"{name}-log"),
    }


def history(platform: dict[str, Any]) -> RuntimeHistory:
    return parse_history(Path(platform["runtime_log"]).read_bytes())


def register(platform: dict[str, Any]) -> Path:
    return Path(platform["rtmr"]) / "rtmr3:sha384"


def test_what_was_served_stays_on_record_over_a_crash(world: World) -> None:
    with world.key_server(), own_platform(world, "recorded") as platform:
        before = register(platform).read_bytes()
        with world.daemon(killed=True, platform=platform) as daemon:
            daemon.until_volume("mounted")
            assert daemon.status()["runtime"] == {
                "extend": "required",
                "events": 1,
                "error": None,
            }
            after = register(platform).read_bytes()
            assert after != before
        (event,) = history(platform).events
        served = read_volume_event(event)
        assert served is not None
        assert (served.volume_id, served.generation) == ("m", 2)
        assert replay_runtime(before, [event]) == after
        config = world.directory / "tdxd.toml"
        assert program("tdxd", "--config", config, "--sweep").returncode == 0

        # The next daemon shows the log with its quote, and is given the key again.
        with world.daemon(platform=platform) as daemon:
            daemon.until_volume("mounted")
            daemon.reexec()
            assert daemon.volume()["state"] == "mounted"
            assert register(platform).read_bytes() == after
            assert daemon.ctl("unmount", "m").returncode == 0

            register(platform).write_bytes(b"x" * 48)  # another program in the guest
            assert daemon.ctl("mount", "m").returncode == 77
            shown = daemon.status()["runtime"]["error"]
            assert shown["code"] == "runtime-record"
            assert "runtime log: RTMR3 is " in daemon.ctl("status").stdout
        assert len(history(platform).events) == 1


def test_a_kernel_that_cannot_extend_must_be_named(world: World) -> None:
    faults = 'rtmr = "absent"'
    with world.key_server(), own_platform(world, "old", faults=faults) as platform:
        with world.daemon(platform=platform) as daemon:
            shown = daemon.until_volume("backoff")
            assert "rtmr3:sha384" in shown["error"]["message"]
            assert 'platform.extend = "never"' in shown["error"]["hint"]
        with world.daemon(platform={**platform, "extend": "if-possible"}) as daemon:
            daemon.until_volume("mounted")
            assert daemon.status()["runtime"]["error"]["code"] == "host"
        with world.daemon(platform={**platform, "extend": "never"}) as daemon:
            daemon.until_volume("mounted")
            assert "warning: quotes do not show what is served" in (
                daemon.ctl("status").stdout
            )


def test_a_module_that_refuses_keeps_the_volume_closed(world: World) -> None:
    faults = 'rtmr = "fails"'
    with (
        world.key_server(),
        own_platform(world, "refusing", faults=faults) as platform,
        world.daemon(platform=platform) as daemon,
    ):
        shown = daemon.until_volume("backoff")
        assert "the TDX module refused" in shown["error"]["hint"]
        assert daemon.ctl("health").returncode == 75


def test_a_configuration_that_mrconfigid_measures(world: World) -> None:
    """It starts without being told to accept it, and not once a byte of it is changed."""
    platform = platform_of(world, "measured")
    tables: dict[str, Any] = {
        "security": {"accept_swap": True},
        "platform": platform,
    }
    control = {"socket": f"{RUN}.sock", "runtime_dir": str(RUN)}
    path = world.directory / "tdxd.toml"
    path.write_text(toml(world.config(control=control, **tables)))
    digest = ok("tdxd", "config-digest", "--config", path).strip()
    with own_platform(world, "measured", config_id=digest), world.key_server():
        with world.daemon(**tables) as daemon:
            assert daemon.status()["config"] == "measured (MRCONFIGID)"
            assert "config: measured (MRCONFIGID)" in daemon.ctl("status").stdout
            # The policy of this volume pins another MRCONFIGID, so it is denied.
            daemon.until_volume("denied")

            path.write_text(path.read_text() + "\n")
            done = daemon.ctl("reload")
            assert done.returncode == 78
            assert "is unmeasured" in done.stderr
            path.write_text(path.read_text()[:-1])
        policy = world.directory / "policy-measured.toml"
        store, old = world.directory / "keys", world.directory / "policy.toml"
        policy.write_text(f'{old.read_text()}mr_config_id = ["{digest}"]\n')
        ok("tdx-keyd", "policy", "set", store, "m", policy)
        try:
            with world.daemon(**tables) as daemon:
                daemon.until_volume("mounted")
        finally:
            ok("tdx-keyd", "policy", "set", store, "m", old)


def test_revocation_reaches_a_guest_that_runs(world: World) -> None:
    """A lease of a minute; the owner takes the policy away; then nothing is open any more."""
    policy, text = world.directory / "leased.toml", (world.directory / "policy.toml")
    policy.write_text(text.read_text() + "\n[release]\nlease_s = 60\n")
    store = world.directory / "keys"
    ok("tdx-keyd", "policy", "set", store, "m", policy)
    try:
        listen = f"127.0.0.1:{free_port()}"
        serving = {"listen": listen, "user": "nobody", "drain_timeout_s": 1}
        with world.key_server(), world.daemon(serving=serving) as daemon:
            assert 50 < daemon.until_volume("mounted")["lease_left_s"] <= 60

            def heard(name: str) -> bool:
                lines = daemon.ctl("events", "--json", "--all").stdout.splitlines()
                return name in [json.loads(line)["event"] for line in lines]

            wait_for(lambda: heard("lease.renewed"), "a renewal", 60)
            daemon.until_serving("ready")
            elsewhere = f'platforms = ["{"ab" * 16}"]'
            changed = re.sub("platforms = .*", elsewhere, policy.read_text())
            policy.write_text(changed)
            ok("tdx-keyd", "policy", "set", store, "m", policy)
            wait_for(lambda: heard("lease.not_renewed"), "a refusal", 60)
            assert daemon.volume()["state"] == "mounted"
            wait_for(lambda: daemon.volume()["state"] == "denied", "the end", 70)
            shown = daemon.volume()
            assert "ran out, its renewal was refused" in shown["error"]["message"]
            assert (
                str(RUN) not in Path(f"/proc/{daemon.process.pid}/mounts").read_text()
            )
    finally:
        ok("tdx-keyd", "policy", "set", store, "m", text)
