"""What changes between two policies, and what of it lets more pass."""

from __future__ import annotations

import pytest

from tdxd.core.policy import parse_policy
from tdxd.core.policy_diff import diff

MRTD, OTHER = "11" * 48, "22" * 48
PPID = "ab" * 16
BASE = f"""
[tdx]
mrtd = ["{MRTD}"]
td_attributes = ["SEPT_VE_DISABLE"]
tcb_status = ["UpToDate", "OutOfDate"]
tcb_grace_days = {{ OutOfDate = 30 }}
platforms = ["{PPID}"]
xfam = ["e702060000000000"]
mr_seam = ["{"55" * 48}"]
mr_config_id = ["{"66" * 48}"]
advisories_allowed = ["INTEL-SA-00001"]
advisories_refused = ["INTEL-SA-00002"]
min_tcb_evaluation = 17
min_tee_tcb_svn = "0d010400000000000000000000000000"
[[tdx.rtmr]]
name = "image-1"
rtmr0 = "{"a0" * 48}"
rtmr1 = "{"a1" * 48}"
rtmr2 = "{"a2" * 48}"
rtmr3 = "{"00" * 48}"
[release]
max_per_hour = 60
lease_s = 3600
not_before = 2026-01-01T00:00:00Z
not_after = 2027-01-01T00:00:00Z
[event_log]
required = true
[[event_log.require]]
register = 0
variable = "SecureBoot"
value = "01"
[[event_log.forbid]]
register = 0
variable = "SecureBoot"
value = "00"
[runtime]
volumes = ["v"]
expect = ["v"]
[[runtime.allow]]
name = "app-id"
payload = ["01"]
"""
SET_2 = """
[[tdx.rtmr]]
name = "image-2"
rtmr0 = "{0}"
rtmr1 = "{0}"
rtmr2 = "{0}"
rtmr3 = "{0}"
[release]"""

LOOSER = [
    (f'mrtd = ["{MRTD}"]', f'mrtd = ["{MRTD}", "{OTHER}"]', "tdx.mrtd"),
    (f'platforms = ["{PPID}"]', 'platforms = "any"', "tdx.platforms"),
    ('"OutOfDate"]', '"OutOfDate", "ConfigurationNeeded"]', "tdx.tcb_status"),
    ("OutOfDate = 30", "OutOfDate = 31", "tdx.tcb_grace_days.OutOfDate"),
    ("tcb_grace_days = { OutOfDate = 30 }", "", "tdx.tcb_grace_days.OutOfDate"),
    ('xfam = ["e702060000000000"]', "", "tdx.xfam"),
    (f'mr_seam = ["{"55" * 48}"]', 'mr_seam = "any"', "tdx.mr_seam"),
    (f'mr_seam = ["{"55" * 48}"]', "", "tdx.mr_seam"),
    ('advisories_allowed = ["INTEL-SA-00001"]', "", "tdx.advisories_allowed"),
    ('advisories_refused = ["INTEL-SA-00002"]', "", "tdx.advisories_refused"),
    ("min_tcb_evaluation = 17", "min_tcb_evaluation = 16", "tdx.min_tcb_evaluation"),
    ("min_tcb_evaluation = 17", "", "tdx.min_tcb_evaluation"),
    ("0d0104", "0d0103", "tdx.min_tee_tcb_svn"),
    ("0d0104", "0e0103", "tdx.min_tee_tcb_svn"),
    ('["SEPT_VE_DISABLE"]', '["SEPT_VE_DISABLE", "PKS"]', "tdx.td_attributes"),
    ("[release]", SET_2.format(OTHER), "tdx.rtmr[image-2]"),
    ("a1" * 48, "b1" * 48, "tdx.rtmr[image-1].rtmr1"),
    ("[tdx]", "[tdx]\nsimulated = true", "tdx.simulated"),
    ("max_per_hour = 60", "max_per_hour = 61", "release.max_per_hour"),
    ("max_per_hour = 60", "", "release.max_per_hour"),
    ("lease_s = 3600", "lease_s = 3601", "release.lease_s"),
    ("lease_s = 3600", "", "release.lease_s"),
    ("not_before = 2026-01-01T00:00:00Z", "", "release.not_before"),
    ("2027-01", "2027-02", "release.not_after"),
    ("required = true", "required = false", "event_log.required"),
    ('value = "01"', 'value = ""', "event_log.require"),
    ('volumes = ["v"]', 'volumes = ["*"]', "runtime.volumes"),
    ('expect = ["v"]', "expect = []", "runtime.expect"),
    ('payload = ["01"]', 'payload = ["01", "02"]', "runtime.allow"),
]
TIGHTER = [
    ('"OutOfDate"]', "]", "tdx.tcb_status"),
    ("OutOfDate = 30", "OutOfDate = 29", "tdx.tcb_grace_days.OutOfDate"),
    ("min_tcb_evaluation = 17", "min_tcb_evaluation = 18", "tdx.min_tcb_evaluation"),
    ("0d0104", "0d0105", "tdx.min_tee_tcb_svn"),
    ("[tdx]", "[tdx]\nsmt = false", "tdx.smt"),
    ("max_per_hour = 60", "max_per_hour = 59", "release.max_per_hour"),
    ("lease_s = 3600", "lease_s = 60", "release.lease_s"),
    ("not_before = 2026-01", "not_before = 2026-02", "release.not_before"),
    ('volumes = ["v"]', "volumes = []", "runtime.volumes"),
    ('expect = ["v"]', 'expect = ["v", "w"]', "runtime.expect"),
]


GRACE = "tcb_grace_days = { OutOfDate = 30 }\n"


def changes(old, new):
    assert old in BASE
    text = BASE.replace(old, new, 1)
    if '"OutOfDate"' not in text:  # a grace needs its status
        text = text.replace(GRACE, "")
    return diff(parse_policy(BASE), parse_policy(text))


def test_the_same_policy_has_no_changes():
    spelled = BASE.replace(MRTD, MRTD.upper()).replace(
        "\n[release]", "\n# x\n[release]"
    )
    assert diff(parse_policy(BASE), parse_policy(spelled)) == ()


@pytest.mark.parametrize(("old", "new", "path"), LOOSER)
def test_what_lets_more_pass_is_marked(old, new, path):
    found = changes(old, new)
    assert path in {one.path for one in found if one.looser}
    assert {one.path for one in found if one.looser} == {path}


@pytest.mark.parametrize(("old", "new", "path"), TIGHTER)
def test_what_lets_less_pass_is_not(old, new, path):
    found = changes(old, new)
    assert path in {one.path for one in found}
    assert not any(one.looser for one in found)


@pytest.mark.parametrize(("old", "new", "path"), LOOSER)
def test_the_way_back_is_a_change_too(old, new, path):
    there = parse_policy(BASE.replace(old, new, 1))
    assert path in {one.path for one in diff(there, parse_policy(BASE))}


def test_values_are_shown():
    (one,) = changes("max_per_hour = 60", "max_per_hour = 61")
    assert (one.kind, one.old, one.new) == ("changed", "60", "61")
    removed, added = changes(f'platforms = ["{PPID}"]', 'platforms = "any"')
    assert (removed.kind, removed.old, removed.new) == ("removed", PPID, "")
    assert (added.kind, added.old, added.new) == ("added", "", "any")


def test_a_pin_within_what_passed_unpinned_is_no_loosening():
    bare = BASE.replace('xfam = ["e702060000000000"]', "")
    assert not any(one.looser for one in diff(parse_policy(bare), parse_policy(BASE)))
    tracing = BASE.replace("e702060000000000", "e703060000000000")
    found = diff(parse_policy(bare), parse_policy(tracing))
    assert [one.path for one in found if one.looser] == ["tdx.xfam"]


def test_a_set_under_a_new_name_is_no_loosening():
    renamed = BASE.replace('"image-1"', '"image-one"')
    found = diff(parse_policy(BASE), parse_policy(renamed))
    assert {one.path for one in found} == {"tdx.rtmr[image-1]", "tdx.rtmr[image-one]"}
    assert not any(one.looser for one in found)


def test_what_was_demanded_and_is_not_any_more_loosens():
    """Attributes are compared as a whole, and a required event must stand there."""
    more = BASE.replace('["SEPT_VE_DISABLE"]', '["SEPT_VE_DISABLE", "PKS"]')
    found = diff(parse_policy(more), parse_policy(BASE))
    assert [(one.path, one.kind, one.looser) for one in found] == [
        ("tdx.td_attributes", "removed", True)
    ]
    rule = '\n[[runtime.allow]]\nname = "boot-done"\nrequired = '
    for required, looser in (("true", True), ("false", False)):
        ruled = parse_policy(BASE + rule + required + "\n")
        (one,) = diff(ruled, parse_policy(BASE))
        assert (one.path, one.kind, one.looser) == ("runtime.allow", "removed", looser)


def test_references_never_loosen():
    reference = (
        '\n[[reference]]\nname = "image-1"\nrtmr0 = ["0123456789abcdef EV_IPL x"]\n'
    )
    found = diff(parse_policy(BASE), parse_policy(BASE + reference))
    assert [(one.path, one.kind, one.looser) for one in found] == [
        ("reference[image-1]", "added", False)
    ]


@pytest.mark.parametrize(
    ("old", "new", "looser"),
    [
        ('"current"', "2", True),
        ("3", "2", False),
        ("2", '"current"', False),
        ("[1, 2]", "[2, 3]", True),
        ("[1, 2]", "[2]", False),
        ("[1, 2]", '"current"', True),  # the newest may be neither
        ("2", "[1, 2]", True),
    ],
)
def test_generations(old, new, looser):
    def policy(text):
        line = f"[release]\ngenerations = {text}\n"
        assert "[release]\n" in BASE
        return parse_policy(BASE.replace("[release]\n", line))

    (one,) = diff(policy(old), policy(new))
    assert (one.path, one.kind, one.looser) == (
        "release.generations",
        "changed",
        looser,
    )


def test_generations_said_in_another_way_are_no_change():
    def policy(text):
        return parse_policy(BASE.replace("[release]\n", f"[release]\n{text}\n"))

    plain, spelled = policy(""), policy('generations = "current"')
    assert diff(plain, policy("generations = 1")) == diff(plain, spelled) == ()
    lists = policy("generations = [1, 2]"), policy("generations = [2, 1]")
    assert diff(*lists) == ()
