"""Settings of all tests."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from hypothesis import settings

from tests.guest.groups import guest_of

# Deterministic: the same examples in every run; `make fuzz` looks further.
settings.register_profile("derandomize", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=20_000, deadline=None)
settings.load_profile("fuzz" if os.environ.get("TDXD_FUZZ") else "derandomize")

# A background job of a shell ignores SIGINT, and whatever the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


MACHINE = tuple(
    f"tests/{name}" for name in ("system", "contract", "systemd", "attacks/test_image")
)
"""What runs daemons and mappers: a daemon sweeps what it takes for left by another one."""


@pytest.hookimpl(optionalhook=True)  # of the plugin that runs tests in several workers
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Give each file to one worker, and all that holds the machine's devices, or one guest."""
    from xdist.scheduler import LoadScopeScheduling

    def group(nodeid: str) -> str:
        file, _, _ = nodeid.partition("::")
        if file.startswith("tests/guest/"):
            return f"guest {guest_of(file)}"
        return "machine" if file.startswith(MACHINE) else file

    scheduler: object = LoadScopeScheduling(config, log)
    scheduler._split_scope = group  # type: ignore[attr-defined]
    return scheduler


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        if item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs uid 0"))
