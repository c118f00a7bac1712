"""What bad input gets: the message, the exit code, and nothing left half-open."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tdxd.core import luks2, wire
from tests.system.world import World, free_port, ok, our_loops, program, wait_for

pytestmark = [pytest.mark.root, pytest.mark.slow]


@pytest.fixture
def image(world: World) -> Path:
    """A copy of the image that a test may spoil."""
    path = world.directory / "spoilt.img"
    path.unlink(missing_ok=True)
    shutil.copy(world.directory / "m.img", path)
    return path


def volumes(path: Path, volume_id: str = "m") -> list[dict[str, Any]]:
    return [{"id": volume_id, "image": str(path)}]


def fails(
    world: World, state: str, code: str, exit_code: int, *texts: str, **config: Any
) -> None:
    """Start a daemon and expect its volume to rest in a state, for a reason that it tells."""
    with world.daemon(**config) as daemon:
        shown = daemon.until_volume(state)
        assert shown["error"]["code"] == code, shown
        for text in texts:
            assert text in shown["error"]["message"], shown
        assert shown["error"]["hint"], shown
        assert our_loops() == []
        health = daemon.ctl("health")
        assert health.returncode == exit_code
        assert "not ready: volume m is" in health.stdout
        told = daemon.ctl("status").stdout
        # A next attempt may have names of its own in its message.
        for text in (*texts, shown["error"]["hint"]):
            assert text in told


# --- configuration ------------------------------------------------------------


def check_config(world: World, text: str) -> Any:
    path = world.directory / "bad.toml"
    path.write_text(text)
    return program("tdxd", "--config", path)


def test_unknown_config_key(world: World) -> None:
    done = check_config(world, "[key_release]\nservres = []\n")
    assert done.returncode == 78
    assert "bad.toml: key_release.servres: unknown key" in done.stderr
    assert "hint: did you mean 'servers'" in done.stderr


def test_missing_config_file(world: World) -> None:
    done = program("tdxd", "--config", world.directory / "none.toml")
    assert done.returncode == 78
    assert "none.toml: cannot be read" in done.stderr


def test_unmeasured_config_must_be_accepted(world: World) -> None:
    from tests.system.world import toml

    done = check_config(world, toml(world.config(security={"accept_swap": True})))
    assert done.returncode == 78
    assert "unmeasured" in done.stderr
    assert "accept_unmeasured = true" in done.stderr


# --- images -------------------------------------------------------------------


def test_image_missing(world: World) -> None:
    with world.daemon(volume=volumes(world.directory / "none.img")) as daemon:
        shown = daemon.volume()
        assert shown["state"] == "absent"
        assert "no file matches" in shown["error"]["message"]
        done = daemon.ctl("mount", "m")
        assert done.returncode == 75
        assert "no file matches" in done.stderr


def test_image_truncated(world: World, image: Path) -> None:
    os.truncate(image, image.stat().st_size - 4096)
    with world.key_server():
        fails(
            world, "failed", "volume-integrity", 65, "spoilt.img", volume=volumes(image)
        )


@pytest.mark.parametrize("where", ["first", "last"])
def test_one_byte_of_the_payload_flipped(world: World, image: Path, where: str) -> None:
    data = bytearray(image.read_bytes())
    data[luks2.PAYLOAD_OFFSET_BYTES if where == "first" else -1] ^= 1
    image.write_bytes(data)
    with world.key_server():
        fails(
            world, "failed", "volume-integrity", 65, "spoilt.img", volume=volumes(image)
        )


def test_a_flipped_header_byte_has_no_effect_by_design(
    world: World, image: Path
) -> None:
    data = bytearray(image.read_bytes())
    data[100] ^= 1
    image.write_bytes(data)
    with world.key_server(), world.daemon(volume=volumes(image)) as daemon:
        daemon.until_volume("mounted")


def test_image_of_another_volume(world: World) -> None:
    path = world.directory / "other.img"
    with world.key_server():
        fails(
            world, "failed", "volume-integrity", 65, "other.img", volume=volumes(path)
        )


def test_image_of_an_older_generation(world: World) -> None:
    path = world.directory / "old.img"
    with world.key_server():
        fails(world, "failed", "volume-integrity", 65, "old.img", volume=volumes(path))


def test_a_good_image_delivered_later_is_opened_by_itself(
    world: World, image: Path
) -> None:
    good = image.read_bytes()
    image.write_bytes(good[: luks2.PAYLOAD_OFFSET_BYTES] + bytes(8192))
    with world.key_server(), world.daemon(volume=volumes(image)) as daemon:
        daemon.until_volume("failed")
        image.write_bytes(good)
        daemon.until_volume("mounted")


# --- key release --------------------------------------------------------------


def test_key_server_down_and_back(world: World) -> None:
    with world.daemon() as daemon:
        shown = daemon.until_volume("backoff")
        assert shown["error"]["code"] == "key-server-unreachable"
        assert f"localhost:{world.port}" in shown["error"]["message"]
        assert daemon.ctl("wait", "--timeout", "0.5").returncode == 75
        wait_for(
            lambda: (daemon.volume()["error"] or {}).get("attempts", 0) >= 2, "attempts"
        )
        with world.key_server():
            daemon.until_volume("mounted")


def test_key_server_with_a_certificate_of_another_ca(world: World) -> None:
    release = {**world.config()["key_release"], "ca": str(world.directory / "ca.pem")}
    with world.key_server():
        fails(
            world,
            "backoff",
            "key-server-unreachable",
            75,
            f"{world.port}",
            key_release=release,
        )


def test_key_server_with_another_signing_key(world: World) -> None:
    release = world.config()["key_release"]
    release["signing_key"] = "ed25519:" + "A" * 43 + "="
    with world.key_server():
        fails(world, "backoff", "key-bad-bundle", 75, key_release=release)


def test_no_policy_no_key(world: World) -> None:
    store = world.directory / "bare"
    shutil.rmtree(store, ignore_errors=True)
    pin = world.init_key_server("bare")
    ok("tdx-keyd", "add", store, world.directory / "m.bundle")
    release = {
        **world.config()["key_release"],
        "ca": pin["ca"],
        "signing_key": pin["signing_key"],
    }
    with world.key_server("bare"):
        fails(world, "denied", "key-denied", 77, key_release=release)


def test_bundle_of_another_image(world: World) -> None:
    """The owner adds the bundle of the old generation; the image is the new one."""
    store = world.directory / "swapped"
    shutil.rmtree(store, ignore_errors=True)
    pin = world.init_key_server("swapped")
    policy = world.directory / "policy.toml"
    ok("tdx-keyd", "add", store, world.directory / "old.bundle", "--policy", policy)
    release = {
        **world.config()["key_release"],
        "ca": pin["ca"],
        "signing_key": pin["signing_key"],
    }
    with world.key_server("swapped"):
        fails(world, "failed", "volume-integrity", 65, "m.img", key_release=release)


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ("unified kernel image 1", "unified kernel image 2", "rtmr"),
        ('["SEPT_VE_DISABLE"]', '["SEPT_VE_DISABLE", "DEBUG"]', ""),
    ],
    ids=["one RTMR differs", "debug TD"],
)
def test_quote_of_another_td_is_denied_and_explained(
    world: World, old: str, new: str, check: str
) -> None:
    """The same genuine platform, another TD on it."""
    strange = world.directory / "strange"
    shutil.rmtree(strange, ignore_errors=True)
    shutil.copytree(world.directory / "sim", strange)
    description = strange / "platform.toml"
    text = description.read_text()
    assert old in text
    description.write_text(text.replace(old, new))
    before = world.sim_ready
    with world.key_server():
        try:
            with world.simulator("strange"):
                fails(world, "denied", "key-denied", 77)
        finally:
            world.sim_ready = before
        store = world.directory / "keys"
        records = json.loads(
            ok("tdx-keyd", "audit", "show", store, "--denied", "--json")
        )
        newest = max(records, key=lambda record: record["seq"])
        explained = ok("tdx-keyd", "explain", store, newest["denial_id"])
        assert check in explained
        assert "m" in newest["volume"]


def test_quote_under_another_root_is_denied(world: World) -> None:
    other = world.directory / "sim2"
    if not other.exists():
        ok("tdx-sim", "init", other)
    before = world.sim_ready
    with world.key_server():
        try:
            with world.simulator("sim2"):
                fails(world, "denied", "key-denied", 77)
        finally:
            world.sim_ready = before


def test_platform_without_quotes(world: World) -> None:
    nowhere = world.directory / "nowhere"
    paths = {"tsm": str(nowhere), "tdx_guest": str(nowhere)}
    platform = {**paths, "extend": "never"}
    with world.key_server():
        fails(
            world, "backoff", "evidence-unavailable", 75, "nowhere", platform=platform
        )


# --- serving ------------------------------------------------------------------


def test_port_in_use(world: World) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        serving = {
            "listen": f"127.0.0.1:{port}",
            "user": "nobody",
            "drain_timeout_s": 1,
        }
        with world.key_server(), world.daemon(serving=serving) as daemon:
            shown = daemon.until_serving("backoff")
            assert (
                f"listen on 127.0.0.1:{port}: Address already in use"
                in shown["error"]["message"]
            )
            assert f"another program uses port {port}" in shown["error"]["hint"]
            assert daemon.volume()["state"] == "mounted"
            assert daemon.ctl("health").returncode == 75


def test_model_directory_without_a_version(world: World) -> None:
    source = world.make_directory("versionless", version="latest")
    world.seal(source, "versionless", generation=1, volume_id="versionless")
    bundle, policy = (
        world.directory / "versionless.bundle",
        world.directory / "policy.toml",
    )
    ok("tdx-keyd", "add", world.directory / "keys", bundle, "--policy", policy)
    serving = {"listen": f"127.0.0.1:{free_port()}", "user": "nobody"}
    image = volumes(world.directory / "versionless.img", "versionless")
    with world.key_server(), world.daemon(serving=serving, volume=image) as daemon:
        shown = daemon.until_serving("backoff")
        assert "model 'line'" in shown["error"]["message"]
        assert "no version directory" in shown["error"]["message"]
        assert shown["error"]["hint"].startswith("seal it as models/line/1/")


def test_certificate_missing_from_the_volume(world: World) -> None:
    source = world.make_directory("bare-model")
    shutil.rmtree(source / "tls")
    world.seal(source, "bare-model", generation=1, volume_id="bare-model")
    bundle, policy = (
        world.directory / "bare-model.bundle",
        world.directory / "policy.toml",
    )
    ok("tdx-keyd", "add", world.directory / "keys", bundle, "--policy", policy)
    serving = {"listen": f"127.0.0.1:{free_port()}", "user": "nobody"}
    image = volumes(world.directory / "bare-model.img", "bare-model")
    with world.key_server(), world.daemon(serving=serving, volume=image) as daemon:
        shown = daemon.until_serving("backoff")
        assert "has no tls/server.pem" in shown["error"]["message"]


# --- the control socket -------------------------------------------------------


def test_bad_control_frames(world: World) -> None:
    with world.daemon(volume=[]) as daemon:
        too_long = daemon.raw((2**31).to_bytes(4, "big"))
        assert "at most 1048576" in too_long["error"]["message"]
        garbage = daemon.raw((3).to_bytes(4, "big") + b"\xc1\xc1\xc1")
        assert "not valid msgpack" in garbage["error"]["message"]
        unknown = daemon.raw(wire.encode_frame(wire.request("explode", {})))
        assert "unknown command 'explode'" in unknown["error"]["message"]
        assert unknown["error"]["hint"].startswith("known: status")
        half = daemon.raw(b"\0\0")
        assert "in the middle of a frame" in half["error"]["message"]
        assert daemon.raw(b"") == {}
        assert daemon.ctl("version").returncode == 0


def test_a_user_without_rights(world: World) -> None:
    with world.daemon(volume=[]) as daemon:
        shut = daemon.ctl("status", user=65534, group=65534, extra_groups=[])
        assert shut.returncode == 77
        assert "not allowed to connect" in shut.stderr
        daemon.socket_path.chmod(0o666)
        assert (
            daemon.ctl("status", user=65534, group=65534, extra_groups=[]).returncode
            == 0
        )
        refused = daemon.ctl("reload", user=65534, group=65534, extra_groups=[])
        assert refused.returncode == 77
        assert "reload is for root, the caller has uid 65534" in refused.stderr
        assert "hint: sudo tdxctl reload" in refused.stderr


def test_unknown_volume(world: World) -> None:
    with world.daemon(volume=[]) as daemon:
        done = daemon.ctl("mount", "nope")
        assert done.returncode == 64
        assert "no volume 'nope'" in done.stderr


def test_a_second_daemon_on_the_same_socket(world: World) -> None:
    with world.daemon(volume=[]):
        done = program("tdxd", "--config", world.directory / "tdxd.toml")
        assert done.returncode == 71
        assert "another tdxd runs" in done.stderr


def test_no_daemon(world: World) -> None:
    done = program("tdxctl", "--socket", world.directory / "none.sock", "status")
    assert done.returncode == 69
    assert "no daemon at" in done.stderr
    assert "hint:" in done.stderr
