"""Power cuts, things that are absent at boot, a wrong clock.

Each test boots a guest of its own, and waits for the mounted volume only: a model server takes a
minute here, and what serving adds is tested on the guest that serves.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.guest.conftest import Boots
from tests.guest.observed import Observed

pytestmark = [pytest.mark.guest]


@contextmanager
def silent_server() -> Iterator[int]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


def cut_and_boot(guest: Observed) -> None:
    """Take the power away, and boot the same disks with everything in order around."""
    guest.machine.power_cut()
    guest.machine.route_keys_to(guest.world.port)
    guest.machine.boot()
    guest.until_volume("mounted")
    assert guest.holdings().counts() == (2, 1, 0)
    assert guest.machine.output("systemctl --failed --no-legend --plain") == ""


def test_power_cut_while_attesting(boots: Boots) -> None:
    guest = boots.guest()
    with silent_server() as port:
        guest.machine.route_keys_to(port)
        guest.machine.boot()
        guest.until_volume("attesting")
        cut_and_boot(guest)


def test_power_cut_while_mapping(boots: Boots) -> None:
    """The key has come, and the disk gives a block of the image in half a minute.

    Whether the mapping or the mount reads the first block from the disk is the kernel's choice.
    """
    guest = boots.guest()
    guest.machine.route_keys_to(None)
    guest.machine.boot()
    guest.until(lambda: guest.attempts() > 0, "an attempt")
    guest.machine.run("sync; echo 3 > /proc/sys/vm/drop_caches")
    others = dict.fromkeys(("bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0)
    guest.machine.qmp("block_set_io_throttle", device="delivery", bps=128, **others)
    guest.machine.route_keys_to(guest.world.port)
    guest.until_volume("keyed", "mapped")
    cut_and_boot(guest)


def test_a_key_server_that_comes_back_is_found(boots: Boots) -> None:
    guest = boots.guest()
    guest.machine.route_keys_to(None)
    guest.machine.boot()
    guest.until(lambda: guest.attempts() >= 3, "three attempts")
    assert guest.volume()["state"] in ("backoff", "attesting")
    assert guest.volume()["error"]["code"] == "key-server-unreachable"
    guest.machine.route_keys_to(guest.world.port)
    guest.until_volume("mounted")


def test_a_network_that_comes_up_is_used_within_two_seconds(
    boots: Boots, tell: Callable[[str], None]
) -> None:
    """By netlink: the next attempt by the clock is more than ten seconds away."""
    guest = boots.guest(backoff_max_s=600.0)
    guest.machine.route_keys_to(guest.world.port)
    guest.machine.boot(link_up=False)

    def waits_long() -> bool:
        error = guest.volume()["error"]
        return error is not None and (error["retry_in_s"] or 0) > 10

    guest.until(waits_long, "a long wait", timeout_s=300)
    guest.machine.set_link(up=True)
    guest.until_volume("mounted", timeout_s=30)
    networkd = guest.machine.journal("-u", "systemd-networkd.service")
    leased = [one for one in networkd if "DHCPv4 address" in one["MESSAGE"]]
    # The route follows the lease. Routes of IPv6 come earlier and are tried, too.
    attempt = guest.events("volume.attesting")[-1]
    gap_s = seconds(attempt) - seconds(leased[-1])
    tell(f"lease to the attempt that got the key: {gap_s:.3f} s")
    assert gap_s < 2


def seconds(entry: dict[str, Any]) -> float:
    """Return when a journal entry was written, by the guest's monotonic clock."""
    return int(entry["__MONOTONIC_TIMESTAMP"]) / 1e6


def test_an_image_that_is_delivered_later_is_opened(boots: Boots) -> None:
    """No key is asked for before: none waits in memory."""
    guest = boots.guest(images=(), later=("m",))
    guest.machine.route_keys_to(guest.world.port)
    guest.machine.boot()
    guest.until(lambda: guest.volume()["state"] == "absent", "absent")
    assert guest.volume()["error"]["code"] == "volume-missing"
    time.sleep(5)
    assert guest.events("volume.attesting") == []
    guest.machine.run("mv /srv/later/m.img /srv/models/")
    guest.until_volume("mounted")


def test_a_clock_that_is_ten_years_wrong_does_not_matter(boots: Boots) -> None:
    """Neither at power on, nor when it is set back under way."""
    guest = boots.guest(clock="2036-11-25T12:00:00")
    guest.machine.route_keys_to(guest.world.port)
    guest.machine.boot()
    assert guest.machine.output("date +%Y") == "2036"
    guest.until_volume("mounted")
    # systemd lets no clock be older than itself at boot.
    guest.machine.run("date --set 2016-11-25; systemctl restart tdxd.service")
    assert guest.machine.output("date +%Y") == "2016"
    guest.until_volume("mounted")
    # What this boot extended RTMR3 with outlived the daemon, or the key server had refused.
    recorded = {"extend": "required", "events": 1, "error": None}
    assert guest.status()["runtime"] == recorded
