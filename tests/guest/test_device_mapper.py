"""The contract tests on a kernel with device mapper: the guest's, as root."""

from __future__ import annotations

import pytest

from contrib.guest.machine import Machine

pytestmark = [pytest.mark.guest, pytest.mark.root]

LIMIT_S = 900.0
COMMAND = (
    "cd /opt/tools && HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis"
    " unshare --mount bin/python3 -m pytest -v -p no:cacheprovider --durations=5"
    " -m root tests/contract 2>&1"
)
"""In mounts of its own, as the daemon is."""


def test_every_contract_holds_in_the_guest(bare: Machine) -> None:
    """One run of pytest in there, whose report is shown."""
    done = bare.run(COMMAND, timeout_s=LIMIT_S, check=False)
    print(done.stdout)
    assert done.code == 0, (
        "the contract tests failed in the guest: their report is below"
    )
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    for mapper in ("dm", "memory"):
        assert any(f"[{mapper}] PASSED" in line for line in passed), done.stdout
    assert bare.output("dmsetup ls") == "No devices found"
    assert bare.output("losetup --list --noheadings") == ""
