"""From a model directory to a prediction over TLS, with every program running for real."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.system.test_measured import own_platform
from tests.system.world import World, free_port, program, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]


def predict(world: World, port: int, *more: object):
    return program(
        "tdx-infer",
        "predict",
        f"localhost:{port}",
        "--ca",
        world.directory / "ca.pem",
        "--model",
        "line",
        "--input",
        "-",
        "--json",
        *more,
        input="[[1, 2, 3, 4]]",
    )


def serving(port: int) -> dict[str, Any]:
    listen = f"127.0.0.1:{port}"
    return {"listen": listen, "user": "nobody", "drain_timeout_s": 1, "attest": True}


def answer(done) -> object:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["outputs"]["y"]["values"]


def test_a_prediction_over_tls_and_every_fault_on_the_way(world: World) -> None:
    """One long story, since a model server takes seconds to start."""
    port, health = free_port(), free_port()
    config: dict[str, Any] = {
        "serving": serving(port),
        "health": {"listen": f"127.0.0.1:{health}"},
    }
    with (
        world.key_server(),
        own_platform(world, "whole") as platform,
        world.daemon(platform=platform, **config) as daemon,
    ):
        waited = daemon.ctl("wait", "--timeout", "150")
        assert waited.returncode == 0, waited.stdout + daemon.log.read_text()
        assert answer(predict(world, port)) == [[3, 5, 7, 9]]

        shown = daemon.status()
        (volume,) = shown["volumes"]
        assert (volume["state"], volume["generation"]) == ("mounted", 2)
        assert (volume["mapper"], volume["integrity"]) == ("memory", "verified")
        assert shown["config"] == "unmeasured"
        assert "mounted" in daemon.ctl("status").stdout

        check_probes(daemon, health)
        check_isolation(daemon, shown)
        check_attested(world, daemon, port)
        check_killed_server(world, daemon, port)
        check_killed_front(world, daemon, port)
        check_unmount_and_mount(world, daemon, port)
        check_reload(world, daemon, port)
        check_secrets(world, daemon)
        assert daemon.process.poll() is None
    log = daemon.log.read_text()
    order = ["front.stopped", "server.stopped", "volume.absent", "daemon.stopped"]
    places = [log.rindex(event) for event in order]
    assert places == sorted(places)


def check_probes(daemon, health: int) -> None:
    for path in ("livez", "readyz", "metrics"):
        with urllib.request.urlopen(
            f"http://127.0.0.1:{health}/{path}", timeout=5
        ) as reply:
            body = reply.read().decode()
        assert reply.status == 200
    assert "tdxd_ready 1" in body
    assert daemon.ctl("health", "ready").stdout == "ready\n"
    assert daemon.ctl("health", "live").returncode == 0


def check_isolation(daemon, shown) -> None:
    """Children run unprivileged, in another network, and no volume is visible outside."""
    front, (server,) = shown["serving"]["front_pid"], shown["serving"]["servers"]
    for pid in (front, server["pid"]):
        status = Path(f"/proc/{pid}/status").read_text()
        assert "\nUid:\t65534\t65534\t65534\t65534\n" in status
        assert (
            os.stat(f"/proc/{pid}/ns/net").st_ino != os.stat("/proc/self/ns/net").st_ino
        )
    run = Path(f"/run/tdxd-system-{os.getpid()}")
    assert list((run / "volumes").iterdir()) == [run / "volumes" / "m@2"]
    assert list((run / "volumes" / "m@2").iterdir()) == []
    mounts = Path(f"/proc/{server['pid']}/mountinfo").read_text()
    assert f"{run}/models/m" in mounts
    assert "volumes" not in mounts


def check_attested(world: World, daemon, port: int) -> None:
    """The guest proves itself through the front, also after its program was replaced."""
    root = world.directory / "root.der"
    if not root.exists():
        shown = program("tdx-sim", "root", world.directory / "sim", "--der").stdout
        root.write_bytes(Path(shown.strip()).read_bytes())
    proof = (
        *("--attest", world.directory / "policy.toml", "--attest-root", root),
        *("--pccs", world.sim_ready["pccs"]),
    )
    for _ in range(2):
        done = predict(world, port, *proof, "--expect-volume", "m")
        assert answer(done) == [[3, 5, 7, 9]]
        assert "attested: volume m generation 2, manifest sha256:" in done.stderr
        daemon.reexec()
    other = predict(world, port, *proof, "--expect-volume", "other")
    assert other.returncode == 77
    assert "does not serve the volume that is expected" in other.stderr


def check_killed_server(world: World, daemon, port: int) -> None:
    (server,) = daemon.status()["serving"]["servers"]
    os.kill(server["pid"], signal.SIGKILL)
    wait_for(
        lambda: daemon.status()["serving"]["restarts"] == 1, "the end to be noticed"
    )
    daemon.until_serving("ready")
    assert answer(predict(world, port)) == [[3, 5, 7, 9]]
    text = daemon.ctl("events").stdout
    assert "the model server ended by signal 9" in text


def check_killed_front(world: World, daemon, port: int) -> None:
    os.kill(daemon.status()["serving"]["front_pid"], signal.SIGKILL)
    wait_for(
        lambda: daemon.status()["serving"]["restarts"] == 2, "the end to be noticed"
    )
    daemon.until_serving("ready")
    assert answer(predict(world, port)) == [[3, 5, 7, 9]]


def check_unmount_and_mount(world: World, daemon, port: int) -> None:
    gone = daemon.ctl("unmount", "m")
    assert gone.returncode == 0, gone.stderr
    assert daemon.volume()["state"] == "absent"
    assert predict(world, port, "--timeout", "3").returncode != 0
    assert daemon.ctl("health").returncode != 0
    assert daemon.ctl("mount", "m").returncode == 0
    daemon.until_serving("ready")
    assert answer(predict(world, port)) == [[3, 5, 7, 9]]


def check_reload(world: World, daemon, port: int) -> None:
    """A new volume is mounted, a removed one unmounted, a bad config changes nothing."""
    path = world.directory / "tdxd.toml"
    before = path.read_text()
    image = world.directory / "other.img"
    other = f'[[volume]]\nid = "other"\nimage = "{image}"\nrequired = false\n'
    path.write_text(before + other)
    unclear = daemon.ctl("reload")
    assert unclear.returncode == 78
    assert "serving.tls_volume is missing: which of m, other" in unclear.stderr
    named = before.replace("[serving]\n", '[serving]\ntls_volume = "m"\n')
    path.write_text(named + other)
    clash = daemon.ctl("reload")
    assert clash.returncode == 75, clash.stderr  # both volumes hold a model called line
    told = daemon.ctl("status").stdout
    assert "model 'line' is in volumes" in told, clash.stderr + told
    assert answer(predict(world, port)) == [[3, 5, 7, 9]]  # the old server goes on
    path.write_text(before)
    back = daemon.ctl("reload")
    assert back.returncode == 0, back.stderr
    assert [one["id"] for one in daemon.status()["volumes"]] == ["m"]
    path.write_text(before + "[serving2]\n")
    bad = daemon.ctl("reload")
    assert bad.returncode == 78
    assert "serving2: unknown key" in bad.stderr
    path.write_text(before)
    assert answer(predict(world, port)) == [[3, 5, 7, 9]]


def check_secrets(world: World, daemon) -> None:
    """No key material in arguments, environments, logs or files of the runtime directory."""
    pem = (world.directory / "server.pem").read_bytes()
    key_line = pem.splitlines()[2]
    secret = (world.directory / "m.bundle").read_bytes()[-32:]
    shown = daemon.status()["serving"]
    pids = [daemon.process.pid, shown["front_pid"], shown["servers"][0]["pid"]]
    places = [
        Path(f"/proc/{pid}/{name}") for pid in pids for name in ("cmdline", "environ")
    ]
    run = Path(f"/run/tdxd-system-{os.getpid()}")
    places += [path for path in run.rglob("*") if path.is_file()]
    places += [daemon.log, world.directory / "keyd.log", world.directory / "sim.log"]
    for place in places:
        data = place.read_bytes()
        for canary in (key_line, secret, secret.hex().encode()):
            assert canary not in data, place
