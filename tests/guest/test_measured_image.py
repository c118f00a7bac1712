"""The measured image, its host hostile in every way at once: power on to serving; what is in it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guest.measured import VOLUME, MeasuredGuest

pytestmark = [pytest.mark.guest, pytest.mark.root]

# The front, health, and networkd's client, which asks for its lease again.
LISTENING = {("tcp", "8500"), ("tcp", "9640"), ("udp", "68")}
FILE_SYSTEMS = {
    *("bpf", "cgroup2", "configfs", "devpts", "devtmpfs", "erofs", "fuse", "mqueue"),
    *("proc", "pstore", "securityfs", "sysfs", "tmpfs", "ramfs", "fusectl"),
    "fuse.tdx-sim",  # in the tests alone
}
ON_ROOT = """\
from tdxd.host.measured_root import lie_on_measured_root as lie
print(lie(["/usr/bin/tdxd", "/usr/bin/python3.11", "/usr/lib/systemd/systemd"]),
      lie(["/etc/tdxd/tdxd.toml"]), lie(["/etc/hostname", "/tmp"]))
"""

CHANGED_MODULE = """\
import glob, lzma
(path,) = glob.glob("/usr/lib/modules/*/kernel/**/gve.ko.xz", recursive=True)
data = lzma.open(path).read()
open("same.ko", "wb").write(data)
place = data.index(b"description=") + 14
open("changed.ko", "wb").write(data[:place] + b"X" + data[place + 1 :])
"""


def test_power_on_to_serving(
    measured: MeasuredGuest, tell: Callable[[str], None]
) -> None:
    measured.until_serving()
    uptime_s = float(measured.machine.output("cut -d ' ' -f 1 /proc/uptime"))
    tell(
        f"answers {measured.machine.boot_s:.0f} s after power on, serves at {uptime_s}"
    )
    measured.predict_ok()
    shown = measured.status()
    assert shown["config"] == "measured (MRCONFIGID)"
    (volume,) = shown["volumes"]
    assert (volume["id"], volume["state"]) == (VOLUME, "mounted")
    assert (volume["mapper"], volume["integrity"]) == ("dm", "dm-verity")


def test_nothing_failed_in_the_boot(measured: MeasuredGuest) -> None:
    assert measured.machine.output("systemctl --failed --no-legend --plain") == ""


def test_programs_lie_on_the_root_that_the_command_line_pins(
    measured: MeasuredGuest,
) -> None:
    """The configuration of this guest does not: MRCONFIGID is what measures it."""
    command = f"cd /opt/tools && bin/python3 -c '{ON_ROOT}'"
    assert measured.machine.output(command).split() == ["True", "False", "False"]


def test_nothing_but_the_front_and_health_listens(measured: MeasuredGuest) -> None:
    measured.until_serving()
    lines = measured.machine.output("ss -Htuln").splitlines()
    found = {
        (line.split()[0], line.split()[4].rpartition(":")[2])
        for line in lines
        if not line.split()[4].startswith("127.")
    }
    assert found == LISTENING


def test_nobody_can_log_in(measured: MeasuredGuest) -> None:
    machine = measured.machine
    assert machine.output("who") == ""
    shells = "login|agetty|getty|sulogin|su|sshd|bash|cloud-init"
    assert machine.run(f"pgrep -x '{shells}'", check=False).code == 1
    for program in ("login", "agetty", "sulogin", "su", "sshd", "apt", "dpkg", "perl"):
        assert machine.run(f"command -v {program}", check=False).code != 0, program
    locked = machine.output("cut -d : -f 2 /etc/shadow | sort -u").split()
    assert all(one.startswith(("*", "!")) for one in locked), locked
    assert "ogin:" not in machine.serial_log.read_text(errors="replace")


def test_no_file_gives_rights_and_nothing_writable_is_executed(
    measured: MeasuredGuest,
) -> None:
    machine = measured.machine
    assert machine.output("find / -xdev -perm /6000 ! -type d") == ""
    for line in machine.output("cat /proc/mounts").splitlines():
        _what, place, kind, options, *_rest = line.split()
        words = options.split(",")
        if kind == "ext4":
            assert "ro" in words, line
            assert place.startswith(("/srv", "/opt/", "/usr/")), line
        elif place in {"/var", "/tmp"}:
            assert {"noexec", "nosuid", "nodev"} <= set(words), line
        else:
            assert kind in FILE_SYSTEMS, line
    assert machine.run("touch /usr/bin/there", check=False).code != 0
    assert machine.run("mount -o remount,rw /", check=False).code != 0


def test_the_kernel_is_locked_down(measured: MeasuredGuest) -> None:
    machine = measured.machine
    assert "[confidentiality]" in machine.output("cat /sys/kernel/security/lockdown")
    assert machine.output("cat /sys/module/module/parameters/sig_enforce") == "Y"
    assert machine.output("cat /proc/sys/kernel/sysrq") == "0"
    assert machine.output("wc -l < /proc/swaps") == "1"
    # A driver that is not loaded, and that anything but its very bytes cannot become.
    machine.run(f"cd /run && python3 -c '{CHANGED_MODULE}'")
    refused = machine.run("insmod /run/changed.ko", check=False)
    assert "rejected" in refused.stderr or "not permitted" in refused.stderr, refused
    machine.run("insmod /run/same.ko && rmmod gve")
    for absent in ("btrfs", "xfs", "vfat", "efivarfs", "qemu_fw_cfg", "iso9660"):
        assert machine.run(f"modprobe {absent}", check=False).code != 0, absent
