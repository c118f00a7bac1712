"""What goes wrong in a running guest, one fault a test. What crashes stands in `test_secrets`.

The order counts: a model server takes a minute here until it serves, and is waited for twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.guest.observed import Observed

pytestmark = [pytest.mark.guest]

PAYLOAD_BYTE = 16 * 2**20 + 4096


def test_power_cut_while_serving(served: Observed) -> None:
    served.predict_ok()
    served.machine.power_cut()
    served.machine.boot()
    served.until_serving()
    served.predict_ok()


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
    served.until_volume("mounted")


def test_root_unmounts_and_mounts(opened: Observed) -> None:
    """No fault, but here a model server is on its way that goes with the volume."""
    opened.until(lambda: opened.server_pid() is not None, "a model server")
    opened.ctl("unmount", "m")
    assert opened.volume()["state"] == "absent"
    assert opened.holdings().counts() == (0, 0, 0)
    opened.ctl("mount", "m")
    opened.until_volume("mounted")


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
