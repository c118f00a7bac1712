"""The units: systemd finds no fault in them, they are sandboxed, and they fit the programs."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tdxd.core.config import ControlConfig, PlatformConfig, ServingConfig
from tdxd.errors import EX_CONFIG
from tdxd.guest import daemon, isolation, standstill
from tests.systemd.units import (
    SYSTEMD,
    UNITS,
    command,
    install,
    seconds,
    setting,
    settings,
)

MAN = SYSTEMD.parent / "contrib" / "man"
MAX_EXPOSURE = {
    "tdxd.service": 3.8,
    "tdx-keyd.service": 1.3,
    "tdxd-boot-check.service": 0.5,
}
SERVICES = [unit for unit in UNITS if unit.endswith(".service")]
COMMANDS = [
    (unit, name)
    for unit in SERVICES
    for name in ("ExecStart", "ExecReload", "ExecStopPost")
    if settings(unit, name)
]

systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd is not installed"
)


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in argv]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a directory that looks like a root file system with our packages."""
    path = tmp_path_factory.mktemp("root")
    install(path)
    return path


# --- systemd's own word -------------------------------------------------------


@systemd
def test_systemd_finds_no_fault(root):
    done = run("systemd-analyze", "verify", "--man=no", f"--root={root}", *UNITS)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@systemd
@pytest.mark.parametrize("unit", SERVICES)
def test_exposure(unit):
    limit = round(MAX_EXPOSURE[unit] * 10)
    argv = ["systemd-analyze", "security", "--no-pager", "--offline=true"]
    done = run(*argv, f"--threshold={limit}", SYSTEMD / unit)
    assert done.returncode == 0, done.stdout


@systemd
def test_the_preset_enables_the_guest_s_units(root):
    done = run("systemctl", f"--root={root}", "preset", *UNITS)
    assert done.returncode == 0, done.stderr
    enabled = sorted(
        str(path.relative_to(root / "etc/systemd/system"))
        for path in root.glob("etc/systemd/system/*/*")
        if path.name.startswith("tdxd")
    )
    assert enabled == [
        "boot-complete.target.requires/tdxd-boot-check.service",
        "multi-user.target.wants/tdxd.service",
        "sockets.target.wants/tdxd.socket",
    ]


@systemd
@pytest.mark.root
def test_users_and_directories(root):
    """Made below a root of their own, twice, as at each boot."""
    for _ in range(2):
        for name in ("tdxd.conf", "tdx-keyd.conf"):
            done = run(
                "systemd-sysusers", f"--root={root}", SYSTEMD / "sysusers.d" / name
            )
            assert done.returncode == 0, done.stderr
        conf = SYSTEMD / "tmpfiles.d" / "tdxd.conf"
        done = run("systemd-tmpfiles", "--create", f"--root={root}", conf)
        assert (done.returncode, done.stderr) == (0, "")
    users = [line.split(":") for line in (root / "etc/passwd").read_text().splitlines()]
    assert sorted(user[0] for user in users) == ["tdx-keyd", "tdxd-front", "tdxd-serve"]
    assert all(user[2] != "0" and user[6].endswith("nologin") for user in users)
    groups = (root / "etc/group").read_text()
    assert f"\n{ControlConfig().group}:" in f"\n{groups}"
    models = (root / "srv/models").stat()
    assert (models.st_mode & 0o777, models.st_uid) == (0o755, 0)
    record = (root / "run/tdxd-record").stat()
    assert (record.st_mode & 0o777, record.st_uid) == (0o700, 0)


# --- units and programs fit ---------------------------------------------------


@pytest.mark.parametrize(("unit", "name"), COMMANDS)
def test_programs_understand_their_command_lines(unit, name):
    path, *arguments = command(unit, name)
    assert Path(path).parent == Path("/usr/bin")
    module = importlib.import_module("tdxd.cli." + Path(path).name.replace("-", "_"))
    module._parser().parse_args(arguments)


@pytest.mark.parametrize("unit", UNITS)
def test_man_pages_exist(unit):
    for page in setting(unit, "Documentation").split():
        title, section = page.removeprefix("man:").rstrip(")").split("(")
        assert (MAN / f"{title}.{section}").exists(), page


def test_names_are_the_defaults_of_the_configuration():
    control = ControlConfig()
    assert setting("tdxd.socket", "ListenStream") == control.socket
    assert setting("tdxd.socket", "SocketGroup") == control.group
    assert setting("tdxd-boot-check.service", "SupplementaryGroups") == control.group
    assert f"/run/{setting('tdxd.service', 'RuntimeDirectory')}" == control.runtime_dir
    platform = PlatformConfig()
    record = str(Path(platform.runtime_log).parent)
    groups = "/sys/fs/cgroup/system.slice/tdxd.service"
    writable = [f"-{path}" for path in (groups, platform.tsm, platform.rtmr, record)]
    assert settings("tdxd.service", "ReadWritePaths") == writable
    tmpfiles = (SYSTEMD / "tmpfiles.d" / "tdxd.conf").read_text()
    assert f"\nd {record} 0700 root root -\n" in tmpfiles
    made = (SYSTEMD / "sysusers.d" / "tdxd.conf").read_text()
    assert f"g {control.group} " in made
    assert f"u {ServingConfig().user} " in made
    assert f"u {isolation.FRONT_USER} " in made


def test_the_key_server_s_store_is_its_state_directory():
    store = f"/var/lib/{setting('tdx-keyd.service', 'StateDirectory')}"
    assert command("tdx-keyd.service", "ExecStart")[2:] == [store]


def test_times_fit_the_daemon():
    """A reload may wait until models are loaded; a stop takes what the daemon gives itself."""
    unit = "tdxd.service"
    assert seconds(setting(unit, "TimeoutStartSec")) > ServingConfig().ready_timeout_s
    assert seconds(setting(unit, "TimeoutStopSec")) > daemon._STOP_DEADLINE_S
    assert seconds(setting(unit, "WatchdogSec")) >= standstill.SILENT_S
    wait, limit = command("tdxd-boot-check.service", "ExecStart")[-2:]
    assert wait == "--timeout"
    timeout = setting("tdxd-boot-check.service", "TimeoutStartSec")
    assert seconds(timeout) > seconds(limit)


@pytest.mark.parametrize("unit", ["tdxd.service", "tdx-keyd.service"])
def test_a_wrong_configuration_ends_the_restarts_and_nothing_else_does(unit):
    assert setting(unit, "RestartPreventExitStatus") == str(EX_CONFIG)
    assert setting(unit, "StartLimitIntervalSec") == "0"
    assert setting(unit, "Restart") == "on-failure"


# --- what must not come back --------------------------------------------------


def test_the_swap_check_is_not_blinded():
    """Without /proc/swaps the daemon takes the kernel for one that cannot swap."""
    assert settings("tdxd.service", "ProcSubset") == []


def test_a_model_server_may_compile():
    assert settings("tdxd.service", "MemoryDenyWriteExecute") == []


def test_no_disk_can_be_written_to():
    unit = "tdxd.service"
    assert setting(unit, "ProtectSystem") == "strict"
    for name in ("PrivateTmp", "StateDirectory", "CacheDirectory", "LogsDirectory"):
        assert settings(unit, name) == []
    allowed = [value.split() for value in settings(unit, "DeviceAllow")]
    assert {mode for name, mode in allowed if name.startswith("block-")} == {"r"}


def test_drivers_of_the_device_list_are_loaded_before():
    """A class that /proc/devices does not name at the start is left out silently."""
    loaded = (SYSTEMD / "modules-load.d" / "tdxd.conf").read_text().splitlines()
    allowed = [value.split()[0] for value in settings("tdxd.service", "DeviceAllow")]
    for module, name in (("loop", "block-loop"), ("dm_mod", "block-device-mapper")):
        assert name in allowed
        assert module in loaded
