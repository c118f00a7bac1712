"""What goes wrong in a running guest, one fault a test. What crashes stands in `test_secrets`.

The tests that need no model server come last: its start takes a minute here.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.guest.observed import Observed

pytestmark = [pytest.mark.guest]

PAYLOAD_BYTE = 16 * 2**20 + 4096


def test_a_full_disk_does_not_matter(opened: Observed) -> None:
    """Nothing of the daemon's state is on a disk."""
    opened.machine.run(
        "cat /dev/zero > /var/lib/full 2>/dev/null; sync", check=False, timeout_s=120
    )
    try:
        assert opened.machine.run("echo x > /var/lib/more", check=False).code != 0
        opened.restart()
        opened.until_serving()
        opened.predict_ok()
    finally:
        opened.machine.run("rm -f /var/lib/full /var/lib/more")


@contextmanager
def flipped_byte(served: Observed) -> Iterator[None]:
    """Change the image on the host's side of the disk, then change it back."""
    disk = served.machine.disk("delivery")
    disk.flip("/models/m.img", PAYLOAD_BYTE)
    try:
        yield
    finally:
        disk.flip("/models/m.img", PAYLOAD_BYTE)


def test_a_flipped_byte_fails_the_volume_and_stops_serving(served: Observed) -> None:
    """dm-verity meets the byte when it is next read from the disk; the volume is closed."""
    with flipped_byte(served):
        read = served.read_all()
        assert read.code != 0
        assert "Input/output error" in read.stderr
        served.until_volume("failed")
        served.until(lambda: served.serving()["state"] == "stopped", "serving stopped")
        error = served.volume()["error"]
        assert error["code"] == "volume-integrity"
        assert "changed after it was opened" in error["message"]
        assert served.predict().returncode != 0
        assert served.holdings().counts() == (0, 0, 0)
        assert served.ctl("health", "ready", check=False).code == 65
    served.machine.run("echo 3 > /proc/sys/vm/drop_caches")
    served.ctl("retry", "m")
    served.until_serving()
    served.predict_ok()


def test_a_stopped_daemon_is_restarted_by_the_watchdog(opened: Observed) -> None:
    old = opened.main_pid()
    opened.machine.run(f"kill -STOP {old}")
    opened.until_pid_changes(old, timeout_s=120)
    opened.until_volume("mounted")
    assert "Watchdog timeout" in opened.said()


def test_swap_is_refused_with_the_reason(opened: Observed) -> None:
    """The daemon asks for no key, ends with 78, and is not started again."""
    opened.machine.run("systemctl stop tdxd.service", timeout_s=90)
    try:
        opened.machine.run(
            "dd if=/dev/zero of=/swap bs=1M count=16 status=none && chmod 600 /swap && "
            "mkswap -q /swap && swapon /swap"
        )
        assert opened.machine.run("systemctl start tdxd.service", check=False).code != 0
        status = opened.machine.output("systemctl show -P ExecMainStatus tdxd.service")
        assert status == "78"
        time.sleep(5)
        assert opened.machine.run("systemctl is-active tdxd.service", check=False).code
        words = "this machine swaps to /swap: keys and models could land there"
        assert words in opened.said()
    finally:
        opened.machine.run("swapoff /swap; rm -f /swap")
        opened.restart()
