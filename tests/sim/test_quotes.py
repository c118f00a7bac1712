"""dcap-qvl accepts every good simulated quote, and refuses every bad one for its own reason."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import dcap_qvl
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tdxd.core.eventlog import parse_event_log, replay
from tdxd.core.quote import BodyKind, parse_quote
from tdxd.errors import UsageError
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA, NOW, claims, verify

ALL_KINDS: list[dict[str, Any]] = [
    {"version": 4},
    {"version": 5},
    {"version": 5, "body": BodyKind.TD10},
    {"version": 5, "body": BodyKind.TD15_EX},
]


@pytest.fixture(scope="module")
def platform() -> SimPlatform:
    return SimPlatform.create()


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_a_good_quote_is_accepted(platform: SimPlatform, kind) -> None:
    quote = platform.quote(DATA, **kind)
    collateral = platform.collateral_json(NOW)
    assert verify(quote, collateral, platform.root_der) == "UpToDate"
    found = claims(quote, collateral, platform.root_der)
    assert found["tee_type"] == 0x81
    assert found["tcb"]["status"] == "UpToDate"
    assert found["tcb"]["eval_data_number"] == 20
    assert bytes(found["platform"]["pck"]["ppid"]) == platform.pki.identity.ppid


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_our_reader_reads_what_was_asked_for(platform: SimPlatform, kind) -> None:
    quote = parse_quote(platform.quote(DATA, **kind))
    report = platform.report(DATA)
    for field in ("mr_td", "rtmrs", "td_attributes", "xfam", "mr_seam", "report_data"):
        assert getattr(quote, field) == getattr(report, field), field
    assert quote.version == kind["version"]


def test_every_measurement_can_be_set(platform: SimPlatform) -> None:
    names = ("mr_td", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config")
    values = {name: hashlib.sha384(name.encode()).digest() for name in names}
    rtmrs = (b"0" * 48, b"1" * 48, b"2" * 48, b"3" * 48)
    quote = platform.quote(DATA, rtmrs=rtmrs, **values)
    parsed = parse_quote(quote)
    assert {name: getattr(parsed, name) for name in names} == values
    assert parsed.rtmrs == rtmrs
    verify(quote, platform.collateral_json(NOW), platform.root_der)


def test_equal_questions_give_equal_quotes(platform: SimPlatform) -> None:
    assert platform.quote(DATA) == platform.quote(DATA)
    assert platform.collateral(NOW).tcb_info_signature == (
        platform.collateral(NOW).tcb_info_signature
    )


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"td_attributes": bytes.fromhex("0100001000000000")}, "Debug mode"),
        ({"td_attributes": bytes(8)}, "SEPT_VE_DISABLE"),
        ({"td_attributes": bytes.fromhex("0000003000000000")}, "migration"),
        ({"version": 5, "mr_service_td": b"s" * 48}, r"(?i)service"),
        ({"mr_signer_seam": b"s" * 48}, r"(?i)signer"),
        ({"seam_attributes": b"\1" + bytes(7)}, r"(?i)attributes"),
        ({"qe_mr_signer": b"s" * 32}, "MRSIGNER"),
        ({"qe_isv_prod_id": 3}, r"(?i)prodid"),
        ({"qe_isv_svn": 3}, r"(?i)tcb|svn"),
        ({"qe_attributes": bytes.fromhex("17") + bytes(15)}, r"(?i)attributes|debug"),
        ({"qe_misc_select": 1}, r"(?i)miscselect"),
        ({"qe_vendor_id": bytes(16)}, r"(?i)vendor"),
        ({"qe_report_data": bytes(range(64))}, r"(?i)qe report|hash|auth"),
        ({"key_type": 3}, r"(?i)key type"),
        ({"tee_type": 0x82}, r"(?i)tee type|decode"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_bad_quote_is_refused(platform: SimPlatform, overrides, reason) -> None:
    quote = platform.quote(DATA, **overrides)
    with pytest.raises(ValueError, match=reason):
        verify(quote, platform.collateral_json(NOW), platform.root_der)


def test_a_quote_signed_by_another_key_is_refused(platform: SimPlatform) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    quote = platform.quote(DATA, attestation_key=other, pck_key=other)
    with pytest.raises(ValueError, match=r"(?i)signature"):
        verify(quote, platform.collateral_json(NOW), platform.root_der)


def test_every_flipped_bit_of_the_report_is_refused(platform: SimPlatform) -> None:
    quote = platform.quote(DATA)
    collateral = platform.collateral_json(NOW)
    for offset in range(48, 48 + 584, 7):
        changed = bytearray(quote)
        changed[offset] ^= 1
        with pytest.raises(ValueError):
            verify(bytes(changed), collateral, platform.root_der)


def test_another_platforms_root_is_refused(platform: SimPlatform) -> None:
    other = SimPlatform.create()
    quote = platform.quote(DATA)
    with pytest.raises(ValueError):
        verify(quote, platform.collateral_json(NOW), other.root_der)
    with pytest.raises(ValueError):
        verify(quote, other.collateral_json(NOW), platform.root_der)


def test_intels_root_refuses_the_simulator(platform: SimPlatform) -> None:
    collateral = platform.collateral_json(NOW)
    col = dcap_qvl.QuoteCollateralV3.from_json(collateral)
    with pytest.raises(ValueError):
        dcap_qvl.verify(platform.quote(DATA), col, NOW)


def test_report_data_must_be_64_bytes(platform: SimPlatform) -> None:
    with pytest.raises(UsageError, match="63 bytes"):
        platform.quote(bytes(63))


def test_an_unknown_override_is_an_error(platform: SimPlatform) -> None:
    with pytest.raises(TypeError, match="mrtd"):
        platform.quote(DATA, mrtd=bytes(48))


def test_the_event_log_replays_to_the_quotes_registers(platform: SimPlatform) -> None:
    rtmrs = parse_quote(platform.quote(DATA)).rtmrs
    assert replay(parse_event_log(platform.event_log)) == rtmrs
    assert all(any(value) for value in rtmrs[:3])
    assert rtmrs[3] == bytes(48)


def test_a_guest_extends_only_the_registers_linux_lets_it() -> None:
    platform = SimPlatform.create()
    before = platform.rtmrs
    platform.extend_rtmr(3, b"d" * 48)
    after = platform.rtmrs
    assert after[3] == hashlib.sha384(before[3] + b"d" * 48).digest()
    assert after[:3] == before[:3]
    assert parse_quote(platform.quote(DATA)).rtmrs == after
    for index, digest in ((0, b"d" * 48), (1, b"d" * 48), (3, b"d" * 47)):
        with pytest.raises(UsageError):
            platform.extend_rtmr(index, digest)


def test_fixed_rtmrs_come_without_an_event_log() -> None:
    plain = SimPlatform.create().description
    td = dataclasses.replace(plain.td, rtmrs=("aa" * 48,) * 4)
    description = dataclasses.replace(plain, td=td, event=())
    platform = SimPlatform.create(description=description)
    assert platform.rtmrs == (b"\xaa" * 48,) * 4
    assert platform.event_log == b""
