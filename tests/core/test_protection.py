"""Which facts of a machine leave what unprotected; facts are changed one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tdxd.core.config import (
    Config,
    HealthConfig,
    KeyReleaseConfig,
    PlatformConfig,
    ServingConfig,
    VolumeConfig,
)
from tdxd.core.config_trust import ConfigTrust
from tdxd.core.protection import (
    Observed,
    Protection,
    RootFact,
    judge,
    opens_a_shell,
)

CONFIG = Config(
    key_release=KeyReleaseConfig(
        servers=("keys.example:50051",),
        ca="/etc/ca.pem",
        signing_key="ed25519:" + "A" * 43 + "=",
    ),
    volume=(VolumeConfig(id="m", image="/srv/m.img"),),
    serving=ServingConfig(listen="[::]:8500", rest_listen="[::]:8501"),
    health=HealthConfig(listen="0.0.0.0:9640"),
)
MEASURED = Observed(
    tdx_cpu=True,
    root=RootFact("erofs", writable=False, measured=True),
    command_line="roothash=00 rd.shell=0 systemd.debug_shell=no lockdown=integrity",
    swap=(),
    logins=(),
    ports=(8500, 8501, 9640),
    agents=(),
    lockdown="integrity",
)


def lacks(
    config: Config = CONFIG,
    trust: ConfigTrust = ConfigTrust.ROOT_FILE_SYSTEM,
    **changes: Any,
) -> dict[str, Protection]:
    """Return what is not protected, after a look at what each must say."""
    found = judge(dataclasses.replace(MEASURED, **changes), config, trust)
    for one in found:
        assert one.text
        assert "\n" not in one.text + one.hint
        assert bool(one.hint) is not one.protected, one
    names = [one.name for one in found]
    assert len(set(names)) == len(names) == 9
    return {one.name: one for one in found if not one.protected}


def test_on_the_measured_image_everything_is_protected() -> None:
    assert lacks() == {}
    assert lacks(trust=ConfigTrust.CONFIG_ID) == {}


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"tdx_cpu": False}, "tdx", "no flag tdx_guest"),
        (
            {"root": RootFact("ext4", writable=True, measured=False)},
            "rootfs",
            "(ext4, writable) is measured by nothing",
        ),
        (
            {"root": RootFact("erofs", writable=False, measured=False)},
            "rootfs",
            "(erofs, read-only) is measured by nothing",
        ),
        (
            {"root": RootFact("ext4", writable=True, measured=True)},
            "rootfs",
            "(ext4, writable)",
        ),
        ({"trust": ConfigTrust.UNMEASURED}, "trust", "config: unmeasured"),
        ({"trust": ConfigTrust.CONTRADICTED}, "trust", "of another configuration"),
        ({"swap": ("/dev/vda2",)}, "swap", "swaps to /dev/vda2"),
        ({"logins": ("getty@tty1.service",)}, "logins", "by getty@tty1.service"),
        ({"command_line": "rw rd.shell quiet"}, "logins", "by rd.shell"),
        ({"ports": (22, 111, 8500)}, "ports", "on TCP port 22, 111"),
        ({"agents": ("cloud-init",)}, "agents", "by cloud-init"),
        ({"lockdown": "none"}, "lockdown", "lockdown is off"),
        ({"lockdown": None}, "lockdown", "lockdown is off"),
    ],
)
def test_each_fact_leaves_its_matter_unprotected(
    changes: dict[str, Any], name: str, words: str
) -> None:
    found = lacks(**changes)
    assert list(found) == [name]
    assert words in found[name].text


@pytest.mark.parametrize("tdx_cpu", [True, False])
def test_quotes_from_another_place_are_a_simulation(tdx_cpu: bool) -> None:
    platform = PlatformConfig(tsm="/run/sim/report")
    found = lacks(dataclasses.replace(CONFIG, platform=platform), tdx_cpu=tdx_cpu)
    assert "from a place of their own" in found["tdx"].text
    assert "trying things out only" in found["tdx"].hint


def test_foreign_volumes_have_no_integrity() -> None:
    volumes = (
        *CONFIG.volume,
        VolumeConfig(id="old", image="/srv/o.img", kind="luks2"),
    )
    serving = ServingConfig(tls_volume="m", rest_listen="[::]:8501")
    config = dataclasses.replace(CONFIG, volume=volumes, serving=serving)
    assert "integrity: none for volume old" in lacks(config)["volumes"].text


def test_ports_of_what_is_not_configured_are_strange() -> None:
    config = dataclasses.replace(CONFIG, serving=None, health=HealthConfig())
    assert "8500, 8501, 9640" in lacks(config)["ports"].text


@pytest.mark.parametrize(
    "word",
    [
        *("systemd.debug_shell", "systemd.debug-shell=1", "rd.break=pre-mount"),
        *("init=/bin/sh", "rdinit=/usr/bin/bash", "single", "rd.shell=true"),
        *("systemd.unit=rescue.target", "emergency", "SYSTEMD_SULOGIN_FORCE=1"),
        *("s", "S", "1", "-s", "-b", 'systemd.debug_shell="1"'),
        *("rd.systemd.debug-shell", "systemd.wants=debug-shell.service"),
        *("rd.systemd.unit=emergency.target", "-- single", "-- systemd.debug_shell"),
    ],
)
def test_words_that_open_a_shell(word: str) -> None:
    """Also behind "--": systemd reads the whole line."""
    found = opens_a_shell(f"BOOT_IMAGE=/vmlinuz {word} quiet")
    assert found == (word.removeprefix("-- "),)


@pytest.mark.parametrize(
    "word",
    [
        *("rd.shell=0", "systemd.debug_shell=no", "init=/usr/lib/systemd/systemd"),
        *("console=ttyS0", "systemd.unit=multi-user.target", "shell", "S1"),
        "x=single",
    ],
)
def test_words_that_open_none(word: str) -> None:
    assert opens_a_shell(f"quiet {word}") == ()
