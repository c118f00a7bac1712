"""Policies: strict text, and an appraisal that lists every mismatch."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxd.core.appraisal import (
    PckFlags,
    VerifiedQuote,
    appraise_platform,
    appraise_report,
    appraise_time,
)
from tdxd.core.policy import ReleaseRules, TdxRules, parse_policy
from tdxd.core.quote import TdReport, td_attributes_bytes
from tdxd.errors import ConfigError

NOW = 1_790_000_000
ZERO = "00" * 48
GOOD = f"""
[tdx]
mrtd = ["{"11" * 48}"]
td_attributes = ["SEPT_VE_DISABLE"]
tcb_status = ["UpToDate", "SWHardeningNeeded"]
platforms = "any"
[[tdx.rtmr]]
name = "old"
rtmr0 = "{"a0" * 48}"
rtmr1 = "{"a1" * 48}"
rtmr2 = "{"a2" * 48}"
rtmr3 = "{ZERO}"
[[tdx.rtmr]]
name = "new"
rtmr0 = "{"B0" * 48}"
rtmr1 = "{"b1" * 48}"
rtmr2 = "{"b2" * 48}"
rtmr3 = "{ZERO}"
[release]
generations = "current"
max_per_hour = 600
"""
REPORT = TdReport(
    tee_tcb_svn=bytes(16),
    mr_seam=b"\x55" * 48,
    mr_signer_seam=bytes(48),
    seam_attributes=bytes(8),
    td_attributes=td_attributes_bytes(["SEPT_VE_DISABLE"]),
    xfam=bytes.fromhex("e702060000000000"),
    mr_td=b"\x11" * 48,
    mr_config_id=bytes(48),
    mr_owner=bytes(48),
    mr_owner_config=bytes(48),
    rtmrs=(b"\xb0" * 48, b"\xb1" * 48, b"\xb2" * 48, bytes(48)),
    report_data=bytes(64),
)
VERIFIED = VerifiedQuote(
    report=REPORT,
    verified_at_s=NOW,
    tcb_status="UpToDate",
    tcb_date_s=NOW - 100 * 86400,
    advisory_ids=(),
    tcb_evaluation=20,
    ppid="ab" * 16,
    fmspc="B0C06F000000",
    flags=PckFlags(dynamic_platform=True, smt=True, cached_keys=True),
    root_key_sha384="00",
    simulated=False,
)


def failed(text=GOOD, **changes):
    rules = parse_policy(text).tdx
    checks = appraise_report(rules, dataclasses.replace(REPORT, **changes))
    return [check.name for check in checks if not check.ok]


def failed_platform(text=GOOD, **changes):
    rules = parse_policy(text).tdx
    verified = dataclasses.replace(VERIFIED, **changes)
    checks = appraise_platform(rules, verified, NOW)
    return [check.name for check in checks if not check.ok]


def test_the_right_td_passes_every_check():
    assert failed() == []
    assert failed_platform() == []


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("mr_td", bytes(48), "mr_td"),
        ("mr_config_id", b"\1" * 48, "mr_config_id"),
        ("mr_owner", b"\1" * 48, "mr_owner"),
        ("mr_owner_config", b"\1" * 48, "mr_owner_config"),
        ("mr_service_td", b"\1" * 48, "mr_service_td"),
        ("vmid", 1, "vmid"),
        ("td_attributes", bytes(8), "td_attributes"),
        ("td_attributes", bytes.fromhex("0000001000000080"), "td_attributes"),
        ("td_attributes", bytes.fromhex("0000041000000000"), "td_attributes"),
    ],
)
def test_each_field_is_compared(name, value, check):
    assert failed(**{name: value}) == [check]


@pytest.mark.parametrize("index", range(4))
def test_each_register_is_compared(index):
    rtmrs = list(REPORT.rtmrs)
    rtmrs[index] = b"\7" * 48
    assert failed(rtmrs=tuple(rtmrs)) == [f"rtmr{index}"]


def test_registers_of_two_images_do_not_mix():
    rtmrs = (b"\xb0" * 48, b"\xb1" * 48, b"\xa2" * 48, bytes(48))
    assert failed(rtmrs=rtmrs) == ["rtmr2"]


def test_either_image_passes():
    rtmrs = (b"\xa0" * 48, b"\xa1" * 48, b"\xa2" * 48, bytes(48))
    assert failed(rtmrs=rtmrs) == []


def test_all_mismatches_are_collected():
    names = failed(mr_td=bytes(48), rtmrs=(bytes(48),) * 4, mr_owner=b"\1" * 48)
    assert names == ["mr_td", "rtmr0", "rtmr1", "rtmr2", "mr_owner"]


@given(st.sampled_from(range(64)))
def test_every_attribute_bit_counts(bit):
    value = int.from_bytes(REPORT.td_attributes, "little") ^ 1 << bit
    assert failed(td_attributes=value.to_bytes(8, "little")) == ["td_attributes"]


@given(
    name=st.sampled_from(["mr_td", "mr_config_id", "mr_owner", "mr_owner_config"]),
    bit=st.integers(0, 383),
)
def test_every_bit_of_a_measurement_counts(name, bit):
    value = bytearray(getattr(REPORT, name))
    value[bit // 8] ^= 1 << bit % 8
    assert failed(**{name: bytes(value)}) == [name]


def test_pins_are_compared_where_written():
    pin = (
        'platforms = "any"\nxfam = ["e702060000000000"]\nmr_seam = ["'
        + "55" * 48
        + '"]'
    )
    text = GOOD.replace('platforms = "any"', pin)
    assert failed(text) == []
    assert failed(text, xfam=bytes(8)) == ["xfam"]
    assert failed(text, mr_seam=bytes(48)) == ["mr_seam"]
    assert failed(mr_seam=bytes(48)) == []


@pytest.mark.parametrize(
    ("xfam", "good"),
    [
        ("e702060000000000", True),  # Alibaba, bare metal
        ("e718060000000000", True),  # Azure: CET, no PKRU
        ("e700060000000000", True),  # Google
        ("e742060000000000", True),  # user interrupts
        ("0300000000000000", True),
        ("0000000000000000", False),
        ("0200000000000000", False),
        ("ffffffffffffffff", False),
        ("e703060000000000", False),  # processor trace
        ("e782060000000000", False),  # last branch records
        ("e702060000000080", False),
    ],
)
def test_unpinned_features_are_known_ones_that_do_not_trace(xfam, good):
    assert failed(xfam=bytes.fromhex(xfam)) == ([] if good else ["xfam"])


def test_pinned_config_id_is_required():
    pin = f'platforms = "any"\nmr_config_id = ["{"77" * 48}"]'
    text = GOOD.replace('platforms = "any"', pin)
    assert failed(text) == ["mr_config_id"]
    assert failed(text, mr_config_id=b"\x77" * 48) == []


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"tcb_status": "OutOfDate"}, "tcb_status"),
        ({"tcb_status": "Revoked"}, "tcb_status"),
        ({"simulated": True}, "simulated"),
    ],
)
def test_platform_checks(changes, name):
    assert failed_platform(**changes) == [name]


def test_platform_list():
    text = GOOD.replace('"any"', f'["{"AB" * 16}"]')
    assert failed_platform(text) == []
    assert failed_platform(text, ppid="ac" * 16) == ["platform"]


def test_simulated_must_be_written():
    text = GOOD.replace('"any"', '"any"\nsimulated = true')
    assert failed_platform(text, simulated=True) == []


# --- the text -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mrtd =", "mr_td =", "tdx.mr_td: unknown key"),
        ("[release]", "[releases]", "releases: unknown key"),
        ("max_per_hour", "max_per_day", "release.max_per_day: unknown key"),
        ('platforms = "any"', "", "tdx.platforms: missing"),
        ('platforms = "any"', 'platforms = "all"', "tdx.platforms: expected a list"),
        ('platforms = "any"', "platforms = []", "platforms is empty"),
        ('platforms = "any"', 'platforms = ["any", "00"]', "'any' is not 16 bytes"),
        ('["SEPT_VE_DISABLE"]', '["DEBUG"]', "'DEBUG' is not one of"),
        ('["SEPT_VE_DISABLE"]', '["MIGRATABLE"]', "'MIGRATABLE' is not one of"),
        (
            '["SEPT_VE_DISABLE"]',
            '"SEPT_VE_DISABLE"',
            "tdx.td_attributes: expected a list",
        ),
        ('"UpToDate"', '"Revoked"', "tdx.tcb_status[0]: expected one of"),
        ('"UpToDate"', '"uptodate"', "tdx.tcb_status[0]: expected one of"),
        ("11" * 48, "11" * 47, "is not 48 bytes in hex"),
        ("a1" * 48, "zz" * 48, "tdx.rtmr[0]: rtmr1"),
        ("600", "0", "max_per_hour 0 is not 1 to 2"),
        ("600", "true", "release.max_per_hour: expected a whole number"),
        ("600", "2147483648", "max_per_hour 2147483648 is not 1 to 2"),
        ("600", "0x" + "f" * 5000, "release: Exceeds the limit"),
        ('"any"', '"any"\nmin_tcb_evaluation = 0x' + "f" * 5000, "Exceeds the limit"),
        ('"any"', '"any"\nsmt = 0x' + "f" * 5000, "tdx.smt: expected true or false"),
        ('"current"', '"all"', 'release.generations: expected "current", a number'),
        ("[tdx]", "[tdx", "not valid TOML"),
        ('["SEPT_VE_DISABLE"]', "[]", "has no SEPT_VE_DISABLE, so nothing could"),
        ('"any"', '"any"\nxfam = ["00"]', "xfam: '00' is not 8 bytes in hex"),
        ('"any"', '"any"\nmr_seam = "all"', "tdx.mr_seam: expected a list"),
        ('"any"', '"any"\nxfam = "any"', "tdx.xfam: expected a list"),
        ('"any"', '"any"\nmin_tee_tcb_svn = "00"', "is not 16 bytes in hex"),
        ('"any"', '"any"\nmin_tcb_evaluation = -1', "-1 is not 0 to 2"),
        ('"any"', '"any"\ntcb_grace_days = { OutOfDate = 1 }', "not one of tcb_status"),
        ('"any"', '"any"\ntcb_grace_days = { UpToDate = 1 }', "not one of tcb_status"),
        ('"any"', '"any"\ntcb_grace_days = { SWHardeningNeeded = -1 }', "not 0 to"),
        (
            '"any"',
            '"any"\ntcb_grace_days = { SWHardeningNeeded = "1" }',
            "whole number",
        ),
        ('"any"', '"any"\nadvisories_refused = ["SA-1"]', "not like INTEL-SA-00837"),
        (
            '"any"',
            '"any"\nadvisories_refused = ["INTEL-SA-1"]\nadvisories_allowed = ["INTEL-SA-1"]',
            "both allowed and refused",
        ),
        ('"any"', '"any"\nsmt = "yes"', "tdx.smt: expected true or false"),
        ("11" * 48 + '"', "11" * 48 + '", "' + "11" * 48 + '"', "stands there twice"),
        ('name = "new"', 'name = "old"', "rtmr: 'old' stands there twice"),
        ('name = "new"', 'name = "n w"', "is not 1 to 64 of"),
        ("600", "600\nlease_s = 59", "lease_s 59 is not 60 to 2592000"),
        ("600", "600\nlease_s = 2592001", "lease_s 2592001 is not 60 to"),
        ("600", "600\nnot_after = 5", "release.not_after: 5 is not a date with time"),
        ("600", '600\nnot_after = "soon"', "release.not_after: 'soon' is no moment"),
        ("600", "600\nnot_after = 2026-01-01", "2026-01-01 is not a date with time"),
        ("600", "600\nnot_after = 2026-01-01T00:00:00", "and UTC offset"),
        ("600", '600\nnot_after = "2026-01-01T00:00:00"', "and UTC offset"),
        ("600", "600\nnot_after = 0001-01-01T00:00:00+14:00", "years 1970 to"),
        ("600", "600\nnot_after = 1969-12-31T00:00:00Z", "years 1970 to 9998"),
        ("600", "600\nnot_after = 2026-02-30T00:00:00Z", "not valid TOML"),
        (
            "600",
            "600\nnot_before = 2026-01-02T00:00:00Z\nnot_after = 2026-01-01T00:00:00Z",
            "not_before is later than not_after",
        ),
        ("600", "600\n[event_log]\nneeded = true", "event_log.needed: unknown key"),
        ("600", "600\n[runtime]\nallow = 1", "runtime.allow: expected a list"),
        (
            "600",
            '600\n[[reference]]\nname = "x"',
            "reference 'x' is no set of tdx.rtmr",
        ),
    ],
)
def test_bad_policy_names_the_key(old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        parse_policy(GOOD.replace(old, new, 1), source="p.toml")
    assert caught.value.message.startswith("p.toml: ")
    assert message in caught.value.message


def test_empty_policy_is_refused():
    with pytest.raises(ConfigError, match="tdx: missing"):
        parse_policy("")


MOMENT = 1_767_225_600  # 2026-01-01T00:00:00Z


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-01T00:00:00Z",
        "2026-01-01T01:00:00+01:00",
        '"2026-01-01T00:00:00Z"',
        '"2025-12-31T19:00:00-05:00"',
        "2026-01-01 00:00:00Z",
    ],
)
def test_moments_may_be_written_in_each_way(text):
    policy = parse_policy(GOOD.replace("600", f"600\nnot_before = {text}"))
    assert policy.release.not_before == MOMENT


def test_time_is_compared_at_both_ends():
    limits = "not_before = 2026-01-01T00:00:00Z\nnot_after = 2026-01-01T00:00:10Z"
    rules = parse_policy(GOOD.replace("600", f"600\n{limits}")).release
    for offset, wrong in (
        (-1, ["not_before"]),
        (0, []),
        (10.9, []),
        (11, ["not_after"]),
    ):
        checks = appraise_time(rules, MOMENT + offset)
        assert [one.name for one in checks if not one.ok] == wrong
    assert appraise_time(parse_policy(GOOD).release, NOW) == ()


def with_tdx(line):
    return GOOD.replace('"any"', f'"any"\n{line}')


@pytest.mark.parametrize(("days", "age", "passes"), [(30, 30, True), (30, 31, False)])
def test_grace_counts_from_the_date_of_the_level(days, age, passes):
    text = with_tdx(f"tcb_grace_days = {{ SWHardeningNeeded = {days} }}")
    changes = {"tcb_status": "SWHardeningNeeded", "tcb_date_s": NOW - age * 86400}
    assert failed_platform(text, **changes) == ([] if passes else ["tcb_grace"])
    assert failed_platform(text, tcb_date_s=0) == []  # up to date at any age


@pytest.mark.parametrize(
    ("line", "found", "passes"),
    [
        ("", ("INTEL-SA-1",), True),
        ('advisories_refused = ["INTEL-SA-1"]', ("INTEL-SA-1",), False),
        ('advisories_refused = ["INTEL-SA-1"]', ("INTEL-SA-2",), True),
        ('advisories_allowed = ["INTEL-SA-1"]', ("INTEL-SA-1",), True),
        ('advisories_allowed = ["INTEL-SA-1"]', ("INTEL-SA-1", "INTEL-SA-2"), False),
        ("advisories_allowed = []", ("INTEL-SA-1",), False),
        ("advisories_allowed = []", (), True),
    ],
)
def test_advisories(line, found, passes):
    wrong = failed_platform(with_tdx(line), advisory_ids=found)
    assert wrong == ([] if passes else ["advisories"])


@pytest.mark.parametrize("name", ["dynamic_platform", "smt", "cached_keys"])
@pytest.mark.parametrize("value", [True, False, None])
def test_what_a_platform_may_be(name, value):
    flags = dataclasses.replace(VERIFIED.flags, **{name: value})
    assert failed_platform(flags=flags) == []
    wrong = failed_platform(with_tdx(f"{name} = false"), flags=flags)
    assert wrong == ([] if value is False else [name])  # not to know is not "no"


@pytest.mark.parametrize(
    ("floor", "passes"),
    [("00" * 16, True), ("01" + "00" * 15, False), ("00" * 15 + "01", False)],
)
def test_floor_of_the_module(floor, passes):
    wrong = failed(with_tdx(f'min_tee_tcb_svn = "{floor}"'))
    assert wrong == ([] if passes else ["tee_tcb_svn"])


def test_evaluation_floor_and_clock():
    assert failed_platform(with_tdx("min_tcb_evaluation = 20")) == []
    assert failed_platform(with_tdx("min_tcb_evaluation = 21")) == ["tcb_evaluation"]
    assert failed_platform(verified_at_s=NOW - 1) == ["tcb_clock"]


def test_module_may_be_any_when_written():
    assert failed(with_tdx('mr_seam = "any"'), mr_seam=bytes(48)) == []


def test_long_lists_are_shown_shortly():
    """Every check of every decision is recorded: a list of all hosts must not be."""
    ppids = [f"{index:032x}" for index in range(5000)]
    text = GOOD.replace('"any"', json.dumps(ppids))
    rules = parse_policy(text).tdx
    for ppid, ok in ((ppids[77], True), ("ff" * 16, False)):
        checks = appraise_platform(rules, dataclasses.replace(VERIFIED, ppid=ppid), NOW)
        (check,) = [one for one in checks if one.name == "platform"]
        assert check.ok is ok
        assert len(check.expected) < 200
        assert check.expected.endswith(f" or {4999 if ok else 4996} others")


def test_initial_rtmr3_stands_for_the_register():
    rules = parse_policy(GOOD).tdx
    served = dataclasses.replace(REPORT, rtmrs=(*REPORT.rtmrs[:3], b"\7" * 48))
    names = {
        given: [
            one.name
            for one in appraise_report(rules, served, initial_rtmr3=given)
            if not one.ok
        ]
        for given in (None, bytes(48))
    }
    assert names == {None: ["rtmr3"], bytes(48): []}


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(max_size=20),
    st.datetimes(),
    st.sampled_from(["any", "UpToDate", "OutOfDate", "11" * 48, "00" * 16]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text(max_size=8), inner, max_size=3),
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(
    [field.name for field in dataclasses.fields(TdxRules)]
    + [field.name for field in dataclasses.fields(ReleaseRules)]
    + ["tdx", "release", "event_log", "runtime", "reference", "name", "required"]
)


def toml(value):
    """Write any of VALUES as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dt.datetime):
        return value.isoformat()
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        pairs = (f"{quoted(key)} = {toml(one)}" for key, one in value.items())
        return "{" + ", ".join(pairs) + "}"
    return quoted(value) if isinstance(value, str) else repr(value)


def trouble_of(text):
    try:
        parse_policy(text, source="p")
    except ConfigError as exc:
        return exc.message
    return "none"


def quoted(text):
    return '"' + "".join(f"\\U{ord(one):08X}" for one in text) + '"'


@settings(max_examples=300, deadline=None)
@given(
    tables=st.dictionaries(
        st.sampled_from(["tdx", "release", "event_log", "runtime", "reference"]),
        st.dictionaries(KEYS, VALUES, max_size=4),
        max_size=3,
    )
)
def test_any_values_are_a_policy_or_an_error(tables):
    """Also values of the right keys and of surprising types end as an error that names a path."""
    text = "".join(f"{name} = {toml(table)}\n" for name, table in tables.items())
    assert trouble_of(text).startswith(("p: ", "none"))


@settings(max_examples=200, deadline=None)
@given(
    at=st.integers(0, len(GOOD) - 1), new=st.text(max_size=3), size=st.integers(0, 3)
)
def test_a_mangled_policy_is_a_policy_or_an_error(at, new, size):
    text = GOOD[:at] + new + GOOD[at + size :]
    with contextlib.suppress(ConfigError):
        policy = parse_policy(text, source="p")
        assert policy.tdx.mrtd
        assert policy.tdx.platforms


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_an_error(text):
    with pytest.raises(ConfigError):
        parse_policy(text)


def release_rules(line):
    text = GOOD.replace('generations = "current"', line)
    assert text != GOOD
    return parse_policy(text).release


@pytest.mark.parametrize(
    ("line", "present", "served"),
    [
        ("generations = 1", (1, 2, 5), (5,)),
        ("generations = 2", (1, 2, 5), (5, 2)),
        ("generations = 8", (1, 2, 5), (5, 2, 1)),
        ("generations = [1, 2]", (1, 2, 5), (2, 1)),
        ("generations = [7]", (1, 2, 5), ()),
        ("generations = 2", (), ()),
        ("", (1, 2), (2,)),
    ],
)
def test_generations_that_may_be_served(line, present, served):
    assert release_rules(line).generations.of(present) == served


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("generations = 0", "0 generations are not 1 to 8"),
        ("generations = 9", "9 generations are not 1 to 8"),
        ("generations = -1", "-1 generations are not"),
        ("generations = true", "or a list of generations, got bool"),
        ("generations = 1.0", "got float"),
        ("generations = []", "got list"),
        ("generations = { newest = 2 }", "got dict"),
        ("generations = [0]", "0 is no generation"),
        ("generations = [1, 1]", "stands there twice"),
        ('generations = ["1"]', "expected a whole number"),
        ("generations = [1, 2, 3, 4, 5, 6, 7, 8, 9]", "9 generations are more than 8"),
        (f"generations = 0x{'f' * 5000}", "release.generations"),
    ],
)
def test_generations_that_say_nothing_clear(line, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        release_rules(line)
