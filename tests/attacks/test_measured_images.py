"""The host chooses which image it boots; the policy, computed from images, says which may be."""

from __future__ import annotations

import dataclasses

import pytest

from tdxd.core.appraisal import appraise_report
from tdxd.core.measure.boot import predict
from tdxd.core.measure.gpt import parse_gpt
from tdxd.core.measure.machines import MACHINES
from tdxd.core.measure.uki import parse_uki
from tdxd.core.policy import parse_policy
from tdxd.core.quote import TdReport
from tests.core.test_policy import REPORT
from tests.measured_parts import ESP, make_gpt, make_kernel, make_uki

ROOTS = {"old": "a0" * 32, "new": "b1" * 32}


def booted(root: str, *, more: str = "") -> TdReport:
    """What the TDX module reports of a machine that booted the image with this root hash."""
    line = f"quiet roothash={ROOTS[root]}{more}".encode()
    uki = make_uki(kernel=make_kernel(cc=True), command_line=line)
    disk = make_gpt([(ESP, 2048, 4095)])
    found = predict(parse_uki(uki), parse_gpt(disk), MACHINES["edk2"])
    one, two = found.value(1), found.value(2)
    assert one is not None
    assert two is not None
    return dataclasses.replace(REPORT, rtmrs=(bytes(48), one, two, bytes(48)))


def policy(*roots: str) -> str:
    text = (
        f'[tdx]\nmrtd = ["{REPORT.mr_td.hex()}"]\nplatforms = "any"\n'
        'td_attributes = ["SEPT_VE_DISABLE"]\ntcb_status = ["UpToDate"]\n'
    )
    for root in roots:
        values = booted(root).rtmrs
        lines = [f'rtmr{n} = "{value.hex()}"' for n, value in enumerate(values)]
        text += f'[[tdx.rtmr]]\nname = "{root}"\n' + "\n".join(lines) + "\n"
    return text + '[release]\ngenerations = "current"\nmax_per_hour = 600\n'


def refused(text: str, report: TdReport) -> list[str]:
    checks = appraise_report(parse_policy(text).tdx, report)
    return [check.name for check in checks if not check.ok]


def test_an_old_image_after_its_set_left_the_policy() -> None:
    """It is genuine, and the owner accepted it once: what it has are holes that are known now."""
    assert refused(policy("old", "new"), booted("old")) == []
    assert refused(policy("new"), booted("new")) == []
    assert refused(policy("new"), booted("old")) == ["rtmr1", "rtmr2"]


def test_a_new_image_before_its_set_is_in_the_policy() -> None:
    assert refused(policy("old"), booted("new")) == ["rtmr1", "rtmr2"]


@pytest.mark.parametrize(
    "more", [" init=/bin/sh", " systemd.debug_shell=1", " quiet", " tdxd.root_blocks=1"]
)
def test_an_edited_command_line(more: str) -> None:
    """In the kernel image itself, whose initrd could then accept it."""
    assert refused(policy("new"), booted("new", more=more)) == ["rtmr1", "rtmr2"]
