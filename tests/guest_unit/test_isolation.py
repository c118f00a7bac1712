"""What status says of isolation, and the users of model server and front."""

from __future__ import annotations

from tdxd.core.config import ServingConfig
from tdxd.guest import isolation
from tdxd.host import landlock


def test_status_says_what_this_kernel_enforces() -> None:
    config = ServingConfig(user="nobody", front_user="daemon")
    shown = isolation.shown(config, "")
    assert shown["landlock_abi"] == landlock.abi()
    assert shown["tcp_ports"] == (landlock.abi() >= landlock.ABI_TCP)
    assert (shown["front_user_apart"], shown["limits"]) == (True, None)
    same = isolation.shown(ServingConfig(user="nobody", front_user="nobody"), "")
    assert same["front_user_apart"] is False


def test_limits_that_are_not_in_force_are_told_with_the_reason() -> None:
    config = ServingConfig(memory_limit_bytes=2**30)
    assert isolation.shown(config, "")["limits"] == "in force"
    assert isolation.shown(config, "no group")["limits"] == "no group"


def test_the_front_may_connect_by_tcp_only_to_the_rest_ports() -> None:
    without = isolation.of_front(ServingConfig(), "/run/x/front")
    assert list(without.ports.connect) == []
    rest = isolation.of_front(ServingConfig(rest_listen="[::]:8501"), "/run/x/front")
    assert sorted(rest.ports.connect) == [8501, 8502]
    assert list(rest.files.write) == []
