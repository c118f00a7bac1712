"""A newer package replaces the running daemon's code in place, under load."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.guest.conftest import NEWER
from tests.guest.observed import Observed
from tests.guest.world import FRONT_NAME
from tests.system.users import Users

pytestmark = [pytest.mark.guest]


def test_a_newer_package_takes_over_in_place(
    served: Observed, tell: Callable[[str], None]
) -> None:
    machine, pid, before = served.machine, served.main_pid(), served.holdings()
    with Users(
        served.world.directory / "ca.pem",
        port=machine.front_port,
        health=machine.health_port,
        name=FRONT_NAME,
        timeout_s=90.0,  # the emulated machine takes seconds to start a program
        pause_s=0.2,
    ) as users:
        users.more(5)
        usual = dict(users.gaps_s)
        told = machine.output("dpkg --install /srv/more/tdxd_*.deb", timeout_s=300)
        assert f"-> {NEWER}, pid {pid}" in told
        users.more(2)
    assert users.failures == []
    for kind, gap_s in users.gaps_s.items():
        tell(
            f"{kind} calls: {users.answers[kind]} answers, the longest time between two "
            f"{gap_s:.1f} s, before the upgrade {usual[kind]:.1f} s"
        )
    assert served.status()["version"] == NEWER
    assert served.status()["ready"]
    assert served.main_pid() == pid
    after = served.holdings()
    assert (after.mappings, after.children) == (before.mappings, before.children)
    assert after.networks == before.networks
    served.predict_ok()
