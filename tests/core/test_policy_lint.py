"""Warnings about policies that are valid and still worth a second look."""

from __future__ import annotations

import pytest

from tdxd.core.policy import parse_policy
from tdxd.core.policy_lint import lint

NOW = 1_790_000_000
CLEAN = f"""
[tdx]
mrtd = ["{"11" * 48}"]
td_attributes = ["SEPT_VE_DISABLE"]
xfam = ["e702060000000000"]
mr_seam = ["{"55" * 48}"]
tcb_status = ["UpToDate", "OutOfDate"]
tcb_grace_days = {{ OutOfDate = 700 }}
platforms = ["{"ab" * 16}"]
min_tcb_evaluation = 17
[[tdx.rtmr]]
name = "image-1"
rtmr0 = "{"a0" * 48}"
rtmr1 = "{"a1" * 48}"
rtmr2 = "{"a2" * 48}"
rtmr3 = "{"00" * 48}"
[release]
max_per_hour = 60
lease_s = 3600
[[reference]]
name = "image-1"
"""


def paths(text, now_s=NOW):
    return [one.path for one in lint(parse_policy(text), now_s)]


def test_a_careful_policy_has_no_warnings():
    assert paths(CLEAN) == []


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        (f'["{"ab" * 16}"]', '"any"', "tdx.platforms"),
        ("[tdx]", "[tdx]\nsimulated = true", "tdx.simulated"),
        ("OutOfDate = 700", "OutOfDate = 901", "tdx.tcb_grace_days.OutOfDate"),
        ("OutOfDate = 700", "OutOfDate = 90", "tdx.tcb_grace_days.OutOfDate"),
        ("tcb_grace_days = { OutOfDate = 700 }", "", "tdx.tcb_status"),
        (f'mr_seam = ["{"55" * 48}"]', "", "tdx.mr_seam"),
        ('xfam = ["e702060000000000"]', "", "tdx.xfam"),
        ('["SEPT_VE_DISABLE"]', '["SEPT_VE_DISABLE", "PERFMON"]', "tdx.td_attributes"),
        ("min_tcb_evaluation = 17", "", "tdx.min_tcb_evaluation"),
        ("max_per_hour = 60", "", "release.max_per_hour"),
        ("lease_s = 3600", "", "release.lease_s"),
        ("[release]", "[release]\ngenerations = 2", "release.generations"),
        ("[release]", "[release]\ngenerations = [3]", "release.generations"),
        ("lease_s = 3600", "lease_s = 3600\nnot_after = 2026-01-01T00:00:00Z", None),
        ('[[reference]]\nname = "image-1"', "", "reference"),
        (
            "[[reference]]",
            '[[runtime.allow]]\nname = "x"\n[[reference]]',
            "runtime.allow",
        ),
    ],
)
def test_each_is_seen(old, new, path):
    assert old in CLEAN
    assert paths(CLEAN.replace(old, new)) == [path or "release.not_after"]


def test_module_that_may_be_any_on_purpose_is_no_warning():
    assert paths(CLEAN.replace(f'mr_seam = ["{"55" * 48}"]', 'mr_seam = "any"')) == []


def test_every_warning_says_what_to_do():
    bare = (
        CLEAN.partition("xfam")[0] + 'tcb_status = ["OutOfDate"]\nplatforms = "any"\n'
    )
    bare += CLEAN[CLEAN.index("[[tdx.rtmr]]") : CLEAN.index("[release]")]
    remarks = lint(parse_policy(bare), NOW)
    assert len(remarks) == 8
    assert all(one.hint and one.text for one in remarks)
