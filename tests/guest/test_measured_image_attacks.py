"""What the host of a measured guest tries, while it boots and while it runs.

The guest booted with all of it: credentials in SMBIOS and fw_cfg, options in a firmware variable,
disks that look like swap, home and root, and a data disk with units, programs and links.
"""

from __future__ import annotations

import time

import pytest

from tests.guest.measured import EVIL, MeasuredGuest

pytestmark = [pytest.mark.guest, pytest.mark.root]
_BLOCK_BYTES = 4096


def test_nothing_of_the_hosts_left_a_trace(measured: MeasuredGuest) -> None:
    """Units, tmpfiles, sysctls, users and options that were offered: none was taken."""
    machine = measured.machine
    assert machine.run(f"ls /run/{EVIL}", check=False).code == 2
    looked = machine.run(f"grep -rls -D skip {EVIL} /etc /run/systemd", check=False)
    assert looked.stdout == ""
    units = machine.output("systemctl list-units --all --plain --no-legend")
    assert "evil" not in units
    assert "debug-shell" not in units


def test_credentials_of_smbios_and_fw_cfg_are_not_taken(
    measured: MeasuredGuest,
) -> None:
    machine = measured.machine
    assert machine.run("ls /run/credentials/@system", check=False).code == 2
    assert machine.run("ls /sys/firmware/qemu_fw_cfg", check=False).code == 2
    offered = "grep -a -c io.systemd.credential /sys/firmware/dmi/tables/DMI"
    assert int(machine.output(offered)) > 0  # they were there
    assert machine.output("cat /proc/sys/kernel/sysrq") == "0"


def test_options_in_a_firmware_variable_are_not_read(measured: MeasuredGuest) -> None:
    """systemd reads `SystemdOptions` where it can; here nothing can."""
    machine = measured.machine
    assert "SystemdOptions".encode("utf-16-le") in (machine.variables.read_bytes())
    assert machine.output("ls /sys/firmware/efi/efivars | wc -l") == "0"
    assert machine.output("systemctl get-default") == "multi-user.target"
    assert machine.output("systemctl is-active tdxd.service") == "active"


def test_the_firmware_adds_nothing_to_the_command_line(measured: MeasuredGuest) -> None:
    """SMBIOS offered `io.systemd.stub.kernel-cmdline-extra`."""
    facts = measured.machine.facts
    assert measured.machine.output("cat /proc/cmdline") == facts["command_line"]


def test_the_data_disk_is_data(measured: MeasuredGuest) -> None:
    machine = measured.machine
    (line,) = [
        one
        for one in machine.output("cat /proc/mounts").splitlines()
        if one.split()[1] == "/srv"
    ]
    options = set(line.split()[3].split(","))
    assert {"ro", "nodev", "nosuid", "noexec", "nosymfollow"} <= options
    link = machine.run("cat /srv/models/link/hostname", check=False)
    assert "Too many levels" in link.stderr
    program = machine.run("/srv/models/program", check=False)
    assert program.code == 126, program
    device = machine.run("cat /srv/models/device", check=False)
    assert "ermission denied" in device.stderr
    assert machine.run(f"ls /run/{EVIL}", check=False).code == 2


def test_no_other_disk_is_used_or_named(measured: MeasuredGuest) -> None:
    """No swap, no home, no probing: udev has no names of what the host wrote."""
    machine = measured.machine
    assert machine.output("wc -l < /proc/swaps") == "1"
    assert machine.run("ls /home/* /dev/disk/by-label", check=False).stdout == ""
    told = machine.output("udevadm info --export-db")
    assert "ID_FS_" not in told
    assert "ID_PART_ENTRY" not in told


def test_a_configuration_that_was_swapped_is_refused(measured: MeasuredGuest) -> None:
    """A byte of a comment, on the host's side of the disk; then it is put back."""
    machine = measured.machine
    disk, file = machine.disk("data"), "/config/tdxd.toml"
    place = len(disk.read(file)) - 100
    disk.flip(file, place)
    machine.run("echo 3 > /proc/sys/vm/drop_caches")
    assert machine.run("systemctl restart tdxd.service", check=False).code != 0
    assert "MRCONFIGID is that of another one" in measured.said()
    failed = machine.output("systemctl show -P ExecMainStatus tdxd.service")
    assert failed == "78"
    disk.flip(file, place)
    machine.run("echo 3 > /proc/sys/vm/drop_caches")
    machine.run("systemctl restart tdxd.service", timeout_s=120)
    measured.until_volume("mounted")


@pytest.mark.ends_the_guest
def test_a_changed_byte_of_the_root_ends_the_machine(measured: MeasuredGuest) -> None:
    """Nothing else: no other code, and no error that a program could pass over."""
    machine = measured.machine
    facts = machine.facts
    partition = facts["disk"]["partitions"][1]
    block = facts["root_blocks"] // 2
    read = f"dd if=/dev/dm-0 of=/dev/null bs=4096 skip={block} count=1"
    machine.flip_root(partition["first_byte"] + block * _BLOCK_BYTES + 5)
    machine.agent.execute("guest-exec", path="sh", arg=["-c", read])
    deadline = time.monotonic() + 60
    while machine.running and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not machine.running
    assert "dm-verity device corrupted" in machine.serial_tail()
