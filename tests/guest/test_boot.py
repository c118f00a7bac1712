"""Power on, and the guest serves with nobody logging in; then what may be asked of it."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable

import pytest

from tests.guest.observed import Observed

pytestmark = [pytest.mark.guest]
LOOKER = "setpriv --reuid looker --regid looker --init-groups -- tdxctl"
OTHER = "setpriv --reuid 65534 --regid 65534 --clear-groups -- tdxctl"


def test_power_on_to_serving(served: Observed) -> None:
    served.predict_ok()
    shown = served.status()
    (volume,) = shown["volumes"]
    assert (volume["mapper"], volume["integrity"]) == ("dm", "dm-verity")
    assert shown["ready"]
    assert served.machine.output("who") == ""


def test_boot_complete_waits_for_the_boot_check(served: Observed) -> None:
    required = served.machine.output("systemctl show -P Requires boot-complete.target")
    assert "tdxd-boot-check.service" in required
    served.machine.run("systemctl start boot-complete.target", timeout_s=300)
    units = "boot-complete.target tdxd-boot-check.service"
    assert (
        served.machine.output(f"systemctl is-active {units}").split() == ["active"] * 2
    )


def test_nothing_failed_in_the_boot(served: Observed) -> None:
    assert served.machine.output("systemctl --failed --no-legend --plain") == ""


def test_the_unit_has_a_status_line(served: Observed) -> None:
    assert (
        served.machine.output("systemctl show -P StatusText tdxd.service") == "serving"
    )


def test_the_journal_has_structured_fields(served: Observed) -> None:
    mounted = served.events("volume.mounted")[0]
    assert mounted["TDXD_VOLUME"] == "m"
    assert mounted["TDXD_GENERATION"] == "1"
    assert mounted["SYSLOG_IDENTIFIER"] == "tdxd"
    assert mounted["_SYSTEMD_UNIT"] == "tdxd.service"


def test_udev_keeps_off_the_devices_of_the_volume(served: Observed) -> None:
    """Nobody parsed bytes that the host chose, or put what is inside into a database."""
    for device in ("/dev/dm-0", "/dev/dm-1", "/dev/loop0"):
        told = served.machine.output(f"udevadm info --query=property --name={device}")
        assert "ID_FS_" not in told
        links = served.machine.run(f"find /dev/disk -lname '*/{device[5:]}'").stdout
        assert links == ""


def test_systemctl_reload_returns_when_the_reload_is_done(served: Observed) -> None:
    before = len(served.events("config.reloaded"))
    served.machine.run("systemctl reload tdxd.service", timeout_s=120)
    assert len(served.events("config.reloaded")) == before + 1
    assert served.status()["ready"]


def test_a_broken_config_fails_the_reload_and_goes_on_serving(served: Observed) -> None:
    served.machine.run("cp /etc/tdxd/tdxd.toml /run/kept.toml")
    try:
        served.machine.run("echo 'nonsense = 1' >> /etc/tdxd/tdxd.toml")
        done = served.machine.run("systemctl reload tdxd.service", check=False)
        assert done.code != 0
        assert "nonsense" in served.said()
    finally:
        served.machine.run("cp /run/kept.toml /etc/tdxd/tdxd.toml")
    served.predict_ok()


def test_a_member_of_the_group_looks_and_changes_nothing(served: Observed) -> None:
    served.machine.run("id looker >/dev/null 2>&1 || useradd -M -G tdxd looker")
    assert json.loads(served.machine.output(f"{LOOKER} status --json"))["ready"]
    for verb in ("unmount m", "mount m", "reload", "retry", "reexec"):
        refused = served.machine.run(f"{LOOKER} {verb}", check=False)
        assert refused.code == 77, refused
        assert "is for root" in refused.stderr


def test_others_do_not_even_look(served: Observed) -> None:
    refused = served.machine.run(f"{OTHER} status", check=False)
    assert refused.code == 77, refused
    assert "tdxctl: hint:" in refused.stderr


@pytest.mark.parametrize("path", ["livez", "readyz", "metrics"])
def test_health_answers_from_outside(served: Observed, path: str) -> None:
    url = f"http://127.0.0.1:{served.machine.health_port}/{path}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(("unit", "limit"), [("tdxd.service", 38)])
def test_exposure(
    served: Observed, unit: str, limit: int, tell: Callable[[str], None]
) -> None:
    command = f"systemd-analyze security --no-pager --threshold={limit} {unit}"
    done = served.machine.run(command, check=False)
    tell(done.stdout.splitlines()[-1].strip("→ "))
    assert done.code == 0, done.stdout
