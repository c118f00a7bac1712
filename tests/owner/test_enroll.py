"""Enrolment from a reference guest: its policy accepts it, and hopeless guests are refused."""

from __future__ import annotations

import pytest

from tdxd.core.policy import parse_policy
from tdxd.core.quote import BodyKind, td_attributes_bytes
from tdxd.core.runtime_log import RuntimeEvent, encode_runtime_log
from tdxd.errors import ConfigError, DataError, EvidenceMalformedError
from tdxd.owner.appraisal.enroll import Reference, enroll
from tdxd.sim.platform import SimPlatform
from tests.judged import Court

DATA = bytes(64)


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


def enrolled(
    platform, *, log=True, runtime_log=b"", quote=None, name="image-1", **shape
):
    place = {"platform": shape.pop("place")} if "place" in shape else {}
    return enroll(
        Reference(
            quote=quote or platform.quote(DATA, **shape),
            event_log=platform.event_log if log else b"",
            runtime_log=runtime_log,
            name=name,
            simulated=True,
            **place,
        )
    )


def test_policy_accepts_its_own_guest_and_no_other(platform, tmp_path):
    court = Court(tmp_path, platform)
    court.policy = parse_policy(enrolled(platform).text)
    assert court.failed() == {}
    assert set(court.failed(mr_td=b"\1" * 48)) == {"mr_td"}
    assert set(court.failed(xfam=bytes.fromhex("e700060000000000"))) == {"xfam"}


def test_everything_of_the_guest_is_pinned(platform):
    shape = {"mr_config_id": b"\1" * 48, "mr_owner": b"\2" * 48}
    policy = parse_policy(enrolled(platform, **shape, name="image-2026-11").text)
    rules, report = policy.tdx, platform.report()
    assert rules.mrtd == (report.mr_td.hex(),)
    assert rules.rtmr[0].name == "image-2026-11"
    assert rules.rtmr[0].values == tuple(one.hex() for one in report.rtmrs)
    assert rules.xfam == (report.xfam.hex(),)
    assert rules.mr_seam == (report.mr_seam.hex(),)
    assert rules.mr_config_id == ("01" * 48,)
    assert rules.mr_owner == ("02" * 48,)
    assert rules.mr_owner_config == ()
    assert rules.platforms == (platform.pki.identity.ppid.hex(),)
    assert rules.tcb_status == ("UpToDate",)
    assert rules.simulated
    assert policy.event_log.required
    assert [len(one) for one in policy.reference[0].registers] == [3, 2, 2, 0]


def test_any_platform_is_written_and_remarked(platform):
    made = enrolled(platform, place="any")
    assert parse_policy(made.text).tdx.platforms == ("any",)
    assert platform.pki.identity.ppid.hex() in made.text
    assert [one.path for one in made.remarks] == ["tdx.platforms"]


def test_without_a_log_the_registers_are_pinned_by_value(platform):
    made = enrolled(platform, log=False)
    policy = parse_policy(made.text)
    assert not policy.event_log.required
    assert policy.reference == ()
    assert [one.path for one in made.remarks] == ["reference"]


def test_guest_that_serves_is_enrolled_as_it_booted(platform, tmp_path):
    event = RuntimeEvent(name="app", payload=b"1")
    served = SimPlatform(platform.pki, platform.description)
    served.extend_rtmr(3, event.digest())
    with pytest.raises(DataError, match="rtmr3 of the quote is") as caught:
        enrolled(served)
    assert "--runtime-log" in caught.value.hint
    made = enrolled(served, runtime_log=encode_runtime_log([event]))
    assert parse_policy(made.text).tdx.rtmr[0].rtmr3 == "00" * 48
    court = Court(tmp_path, platform)
    court.policy = parse_policy(made.text)
    assert court.failed() == {}


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        *(
            ({"td_attributes": td_attributes_bytes(["SEPT_VE_DISABLE", name])}, name)
            for name in ("DEBUG", "MIGRATABLE", "SERVTD_EXT", "PERF_PROF")
        ),
        ({"td_attributes": (1 << 28 | 1 << 19).to_bytes(8, "little")}, "BIT_19 is set"),
        ({"td_attributes": bytes(8)}, "SEPT_VE_DISABLE is not set"),
        ({"version": 5, "mr_service_td": b"\1" * 48}, "mr_service_td is not zero"),
        ({"mr_signer_seam": b"\1" * 48}, "mr_signer_seam is not zero"),
        ({"seam_attributes": b"\1" + bytes(7)}, "seam_attributes is not zero"),
        ({"version": 5, "body": BodyKind.TD15_EX, "vmid": 2}, "vmid is not zero"),
        (
            {"version": 5, "body": BodyKind.TD15_EX, "ex_tail": b"\1" * 204},
            "td15_ex is not zero",
        ),
    ],
)
def test_hopeless_guest_is_refused(platform, shape, message):
    with pytest.raises(DataError, match=message) as caught:
        enrolled(platform, **shape)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["PERFMON", "PKS", "KL"])
def test_doubtful_attribute_is_a_warning(platform, name):
    bits = td_attributes_bytes(["SEPT_VE_DISABLE", name])
    made = enrolled(platform, td_attributes=bits)
    assert set(parse_policy(made.text).tdx.td_attributes) == {"SEPT_VE_DISABLE", name}
    assert [one.path for one in made.remarks] == ["tdx.td_attributes"]
    assert name in made.remarks[0].text


def test_simulated_platform_must_be_meant(platform):
    reference = Reference(quote=platform.quote(DATA))
    with pytest.raises(DataError, match="not Intel's production root") as caught:
        enroll(reference)
    assert "--simulated" in caught.value.hint


def test_quote_and_log_of_different_boots(platform):
    rtmrs = (*platform.rtmrs[:1], b"\1" * 48, *platform.rtmrs[2:])
    with pytest.raises(DataError, match="rtmr1 of the quote is 01"):
        enrolled(platform, rtmrs=rtmrs)


def test_junk_is_refused(platform):
    with pytest.raises(EvidenceMalformedError):
        enrolled(platform, quote=b"junk")
    reference = Reference(quote=platform.quote(DATA), event_log=b"junk", simulated=True)
    with pytest.raises(EvidenceMalformedError):
        enroll(reference)


@pytest.mark.parametrize("name", ['a"b', "", "a b", "x" * 65, "é"])
def test_bad_name_is_refused(platform, name):
    with pytest.raises(ConfigError, match="is not 1 to 64 of"):
        enrolled(platform, name=name)
