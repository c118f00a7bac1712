"""Contracts and attacks on images on the kernel of the guest, which has device mapper and vsock."""

from __future__ import annotations

import pytest

from contrib.guest.machine import Machine

pytestmark = [pytest.mark.guest, pytest.mark.root]

LIMIT_S = 900.0
FOREIGN, SEALED = (
    f"tests/attacks/test_image_{one}.py" for one in ("foreign", "sealed")
)
KERNEL = ("confinement", "loop", "mounts", "measured_root")
MAPPERS = ("mapper", "dm_mapper", "foreign_mapper")
CGROUP = "tests/host/test_cgroup.py"
VSOCK = "tests/contract/test_vsock.py"
TESTS = (
    *(f"tests/contract/test_{one}.py" for one in (*KERNEL, *MAPPERS)),
    *(FOREIGN, SEALED),
    VSOCK,  # evidence without configfs-tsm, over the guest's loopback
    CGROUP,
    *(f"tests/attacks/test_image_{one}.py" for one in ("slow", "scarce")),
)
"""What depends on the kernel. The platform's tests are the same here, and slower."""
COMMAND = (
    "modprobe vsock_loopback && cd /opt/tools && HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis"
    " unshare --mount bin/python3 -m pytest -v -p no:cacheprovider --durations=15"
    f" -m root -k 'not memory' {' '.join(TESTS)} 2>&1"
)
"""In mounts of its own, as the daemon is. What the memory mapper does is tried outside."""


def test_every_contract_holds_and_every_attack_fails_in_the_guest(
    bare: Machine,
) -> None:
    """One run of pytest in there, whose report is shown."""
    done = bare.run(COMMAND, timeout_s=LIMIT_S, check=False)
    print(done.stdout)
    assert done.code == 0, f"tests failed in the guest: {done.stdout[-3000:]}"
    passed = [line for line in done.stdout.splitlines() if "PASSED" in line]
    assert any("[dm] PASSED" in line for line in passed), done.stdout
    for attacks in (FOREIGN, SEALED):
        ran = [line for line in passed if line.startswith(attacks) and "[dm" in line]
        assert ran, done.stdout
    assert len([line for line in passed if line.startswith(VSOCK)]) >= 15
    assert f"{CGROUP}::test_the_kernel_enforces_them PASSED" in done.stdout
    assert "tdx-sim" not in bare.output("cat /proc/mounts")
    assert bare.output("dmsetup ls") == "No devices found"
    assert bare.output("losetup --list --noheadings") == ""
