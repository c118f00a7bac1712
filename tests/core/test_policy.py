"""Policies: strict text, and an appraisal that lists every mismatch."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.policy import (
    VerifiedQuote,
    appraise_platform,
    appraise_report,
    parse_policy,
)
from tdxd.core.quote import TdReport, td_attributes_bytes
from tdxd.errors import ConfigError

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
    tcb_status="UpToDate",
    advisory_ids=(),
    tcb_evaluation=20,
    ppid="ab" * 16,
    fmspc="B0C06F000000",
    root_key_sha384="00",
    simulated=False,
)


def failed(text=GOOD, **changes):
    rules = parse_policy(text).tdx
    checks = appraise_report(rules, dataclasses.replace(REPORT, **changes))
    return [check.name for check in checks if not check.ok]


def failed_platform(text=GOOD, **changes):
    rules = parse_policy(text).tdx
    checks = appraise_platform(rules, dataclasses.replace(VERIFIED, **changes))
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
    assert failed(xfam=bytes(8), mr_seam=bytes(48)) == []


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
        ("600", "0", "max_per_hour 0 is not greater than 0"),
        ("600", "true", "release.max_per_hour: expected a whole number"),
        ('"current"', '"all"', "release.generations: expected one of 'current'"),
        ("[tdx]", "[tdx", "not valid TOML"),
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


@given(st.text(max_size=200))
def test_any_text_is_a_policy_or_an_error(text):
    with pytest.raises(ConfigError):
        parse_policy(text)
