"""Twenty quotes signed by Intel's keys, judged as the server judges, by enrolled policies.

Each stands with collateral of its time; the recorded verdicts are dcap-qvl's.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import tomllib
from typing import Any

import dcap_qvl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tdxd.core.eventlog import Event, encode_event_log, parse_event_log
from tdxd.core.policy import parse_policy
from tdxd.errors import DataError
from tdxd.owner.appraisal.appraise import intel_root, load_root
from tdxd.owner.appraisal.enroll import Reference, enroll
from tdxd.owner.appraisal.offline import OfflineEvidence, judge_offline
from tests.vectors import VECTORS, expected, needs_vectors, quote_bytes, quote_names

pytestmark = needs_vectors

HOPELESS = {
    "go-tdx-guest-tdx_prod_quote_spr_e4-3507b5": "SEPT_VE_DISABLE is not set",
    "trustee-td-quote-a187b0": "SEPT_VE_DISABLE is not set",
    "trustee-tdx_quote_4-12b401": "DEBUG is set",
    "tdx-attestation-sdk-tdx_v5_quote-d0010d": "mr_service_td is not zero",
}
"""Quotes of guests that no policy can accept, and why."""
ENROLLABLE = [name for name in quote_names() if name not in HOPELESS]
OLD = '["UpToDate", "OutOfDate"]'


def log_of(name: str, file: str = "ccel.bin") -> bytes:
    path = VECTORS / "quotes" / name / file
    return path.read_bytes() if path.is_file() else b""


WITH_LOG = [name for name in quote_names() if log_of(name)]
PARTIAL = [
    (name, path.name)
    for name in quote_names()
    if name != "-"
    for path in sorted((VECTORS / "quotes" / name).glob("ccel-partial-*.bin"))
]


@functools.cache
def root_of(name: str) -> Any:
    if expected(name)["intel_production_root"]:
        return intel_root()
    chain = bytes(dcap_qvl.parse_quote(quote_bytes(name)).cert_chain_pem_bytes())
    top = x509.load_pem_x509_certificates(chain.rstrip(b"\0"))[-1]
    der = top.public_bytes(Encoding.DER)
    assert hashlib.sha256(der).hexdigest() == expected(name)["root_sha256"]
    return load_root(der, simulated=True, source=name)


@functools.cache
def enrolled(name: str, platform: Any = "this") -> str:
    simulated = not expected(name)["intel_production_root"]
    made = enroll(
        Reference(
            quote=quote_bytes(name),
            event_log=log_of(name),
            name="real-1",
            platform=platform,
            simulated=simulated,
        )
    )
    return made.text


def judged(name: str, case: Any, policy: str, event_log: bytes = b"") -> Any:
    """Every check that failed, with what was found, as of the recorded time."""
    evidence = OfflineEvidence(
        quote=quote_bytes(name),
        collateral=(VECTORS / case["collateral"]).read_text(),
        event_log=event_log or log_of(name),
    )
    checks = judge_offline(evidence, root_of(name), parse_policy(policy), case["now"])
    return {check.name: check.actual for check in checks if not check.ok}


def accepted_cases(name: str) -> list[Any]:
    return [case for case in expected(name)["verifications"] if case["ok"]]


def up_to_date(name: str) -> Any:
    good = [case for case in accepted_cases(name) if case["status"] == "UpToDate"]
    return good[0] if good else None


@pytest.mark.parametrize("name", ENROLLABLE)
def test_enrolled_policy_gives_the_recorded_verdicts(name):
    policy = enrolled(name)
    for case in expected(name)["verifications"]:
        failed = judged(name, case, policy)
        if not case["ok"]:
            assert next(iter(failed)) == "quote"
            assert f"ValueError: {failed['quote']}" == case["error"]
        elif case["status"] == "UpToDate":
            assert failed == {}
        else:
            assert failed == {"tcb_status": case["status"]}
            old = policy.replace('tcb_status = ["UpToDate"]', f"tcb_status = {OLD}")
            assert judged(name, case, old) == {}
            grace = old.replace(
                "platforms =", "tcb_grace_days.OutOfDate = 1\nplatforms ="
            )
            assert list(judged(name, case, grace)) == ["tcb_grace"]
            for advisory in case["advisory_ids"]:
                refused = f'advisories_refused = ["{advisory}"]\nplatforms ='
                bad = old.replace("platforms =", refused)
                assert list(judged(name, case, bad)) == ["advisories"]


@pytest.mark.parametrize("name", HOPELESS)
def test_guest_that_no_policy_can_accept_is_not_enrolled(name):
    with pytest.raises(DataError, match=HOPELESS[name]):
        enrolled(name)
    other = enrolled("dcap-qvl-tdx_quote-f1c850")
    for case in expected(name)["verifications"]:
        assert not case["ok"]
        failed = judged(name, case, other)
        assert next(iter(failed)) == "quote"
        assert f"ValueError: {failed['quote']}" == case["error"]


@pytest.mark.parametrize("name", ENROLLABLE)
@pytest.mark.parametrize("platform", ["this", "any"])
def test_enrolled_policy_refuses_every_other_guest(name, platform):
    policy = enrolled(name, platform).replace('["UpToDate"]', OLD)
    for other in ENROLLABLE:
        cases = accepted_cases(other)
        if cases and quote_bytes(other)[48:568] != quote_bytes(name)[48:568]:
            failed = judged(other, cases[0], policy)
            assert {"mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3"} & set(failed), other


def test_perfmon_is_enrolled_only_with_a_warning():
    name = "dstack-teekit-tdx-v4-moemahhouk-f8f82d"
    made = enroll(Reference(quote=quote_bytes(name)))
    assert "PERFMON" in tomllib.loads(made.text)["tdx"]["td_attributes"]
    assert any("PERFMON" in one.text for one in made.remarks)


def test_preproduction_root_must_be_meant():
    name = "evidence-api-quote-3f49cf"
    with pytest.raises(DataError, match="is not Intel's production root"):
        enroll(Reference(quote=quote_bytes(name)))
    with pytest.raises(DataError, match="of a real platform"):
        enroll(
            Reference(quote=quote_bytes("trustee-tdx_quote_6-b789d7"), simulated=True)
        )
    policy = enrolled(name).replace("simulated = true", "simulated = false")
    assert judged(name, up_to_date(name), policy) == {"simulated": "yes"}


# --- event logs ---------------------------------------------------------------


def test_there_are_two_full_logs():
    assert len(WITH_LOG) == 2
    assert len(PARTIAL) == 3


@pytest.mark.parametrize("name", WITH_LOG)
def test_full_log_replays_and_is_required(name):
    policy = enrolled(name)
    assert "required = true" in policy
    assert judged(name, up_to_date(name), policy) == {}
    none = OfflineEvidence(
        quote=quote_bytes(name),
        collateral=(VECTORS / up_to_date(name)["collateral"]).read_text(),
    )
    checks = judge_offline(
        none, intel_root(), parse_policy(policy), up_to_date(name)["now"]
    )
    assert [one.name for one in checks if not one.ok] == ["event_log_present"]


@pytest.mark.parametrize(
    ("name", "file"), [(name, file) for name, file in PARTIAL if name in WITH_LOG]
)
def test_log_of_another_boot_is_refused_naming_the_event(name, file):
    failed = judged(name, up_to_date(name), enrolled(name), log_of(name, file))
    assert set(failed) == {"event_log_replay", "event_log"}
    assert "log entry" in failed["event_log"]


def test_log_of_another_boot_is_not_enrolled():
    for name, file in PARTIAL:
        simulated = not expected(name)["intel_production_root"]
        log = log_of(name, file)
        with pytest.raises(
            DataError, match=r"rtmr\d of the quote is .* the log leads to"
        ):
            enroll(
                Reference(quote=quote_bytes(name), event_log=log, simulated=simulated)
            )


def removed(events: list[Event], at: int) -> list[Event]:
    return events[:at] + events[at + 1 :]


def added(events: list[Event], at: int) -> list[Event]:
    return [
        *events[:at],
        dataclasses.replace(events[at], digest=b"\1" * 48),
        *events[at:],
    ]


def reordered(events: list[Event], at: int) -> list[Event]:
    mine = [
        index for index in range(at + 1, len(events)) if _can_swap(events, at, index)
    ]
    swapped = list(events)
    swapped[at], swapped[mine[0]] = events[mine[0]], events[at]
    return swapped


def _can_swap(events: list[Event], one: int, other: int) -> bool:
    same = events[one].rtmr == events[other].rtmr
    return same and events[one].digest != events[other].digest


def wrong_digest(events: list[Event], at: int) -> list[Event]:
    digest = bytes([events[at].digest[0] ^ 1]) + events[at].digest[1:]
    return [
        *events[:at],
        dataclasses.replace(events[at], digest=digest),
        *events[at + 1 :],
    ]


@pytest.mark.parametrize("name", WITH_LOG)
@pytest.mark.parametrize("doctor", [removed, added, reordered, wrong_digest])
@pytest.mark.parametrize("at", [3, 6])
def test_doctored_log_is_refused_naming_the_event(name, doctor, at):
    events = list(parse_event_log(log_of(name)))
    register = events[at].rtmr
    log = encode_event_log(doctor(events, at))
    failed = judged(name, up_to_date(name), enrolled(name), log)
    assert set(failed) == {"event_log_replay", "event_log"}
    position = sum(one.rtmr == register for one in events[:at]) + 1
    assert failed["event_log"].startswith(f"rtmr{register}, event {position} of ")


@pytest.mark.parametrize("name", WITH_LOG)
def test_reference_changes_no_verdict(name):
    """The lines for people decide nothing: without them the same is accepted and refused."""
    policy = enrolled(name).partition("# The boot of the reference guest")[0]
    assert judged(name, up_to_date(name), policy) == {}
    log = encode_event_log(removed(list(parse_event_log(log_of(name))), 3))
    assert set(judged(name, up_to_date(name), policy, log)) == {"event_log_replay"}
