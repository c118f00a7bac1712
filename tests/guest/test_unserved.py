"""Faults after which hardly a test waits for a model server: they come late, like `test_owner`."""

from __future__ import annotations

import time

import pytest

from tests.guest.hostile import Hostile
from tests.guest.observed import Observed
from tests.guest.world import CPU_LIMIT, MEMORY_LIMIT_BYTES

pytestmark = [pytest.mark.guest]

GROUPS = "/sys/fs/cgroup/system.slice/tdxd.service"


def counts(served: Observed, file: str, name: str) -> int:
    """Return one number of a file of the model servers' groups, added up."""
    lines = served.machine.output(f"cat {GROUPS}/model-server-*/{file}").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] == name)


def test_a_killed_front_is_started_again(served: Observed) -> None:
    old = served.serving()["front_pid"]
    served.machine.run(f"kill -9 {old}")
    served.until(
        lambda: served.serving().get("front_pid") not in (None, old), "a new front"
    )
    served.until_serving()
    served.predict_ok()


def test_a_model_gets_no_more_than_its_share(
    served: Observed, hostile: Hostile
) -> None:
    """Of processors; beyond its memory it ends, and nothing else does: it is started again."""
    server, daemon = served.server_pid(), served.main_pid()
    group = served.machine.output(f"cut -d: -f3 /proc/{server}/cgroup")
    assert group.rpartition("/")[2] in ("model-server-a", "model-server-b")
    shown = served.machine.output(
        f"cd /sys/fs/cgroup{group} && cat memory.max memory.swap.max cpu.max pids.max"
    )
    quota = f"{round(CPU_LIMIT * 100_000)} 100000"
    assert shown.splitlines() == [str(MEMORY_LIMIT_BYTES), "0", quota, "4096"]
    throttled = counts(served, "cpu.stat", "nr_throttled")
    for _ in range(20):
        hostile.outputs("fill", count=4 * 2**20)
        if counts(served, "cpu.stat", "nr_throttled") > throttled:
            break
    else:
        pytest.fail("never throttled")
    assert hostile.refusal("fill", count=2**29) == "UNAVAILABLE"
    served.until(lambda: served.server_pid() not in (None, server), "a new server")
    assert counts(served, "memory.events", "oom_kill") > 0
    assert served.main_pid() == daemon


def test_a_killed_model_server_is_started_again(opened: Observed) -> None:
    opened.until(lambda: opened.server_pid() is not None, "a model server")
    old = opened.server_pid()
    opened.machine.run(f"kill -9 {old}")
    opened.until(lambda: opened.server_pid() not in (None, old), "a new model server")
    assert "the model server ended by signal 9" in opened.said()


def test_a_killed_daemon_is_swept_and_opens_again(opened: Observed) -> None:
    """It attests anew; no mapping, loop device, child or namespace of the first one is left."""
    opened.until(lambda: opened.server_pid() is not None, "a model server")
    before, old = opened.holdings(), opened.main_pid()
    attested = len(opened.events("volume.attesting"))
    opened.machine.run(f"kill -9 {old}")
    opened.until_pid_changes(old)
    opened.until_volume("mounted")
    opened.until(lambda: opened.server_pid() is not None, "a new model server")
    assert len(opened.events("volume.attesting")) > attested
    after = opened.holdings()
    assert (after.mappings, len(after.loops)) == (before.mappings, len(before.loops))
    assert after.networks == before.networks
    assert not set(after.children) & set(before.children)


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
