"""The twenty gaps that dcap-qvl leaves to its caller: each is proved open, and closed by a check.

Each case makes evidence that dcap-qvl alone accepts under the root of the simulated platform, and
that the product refuses, naming the check. A case that dcap-qvl refuses one day fails here: then
that gap is closed upstream.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import dcap_qvl
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tdxd.core.appraisal import appraise_report
from tdxd.core.policy import parse_policy
from tdxd.core.quote import BodyKind, td_attributes_bytes
from tdxd.owner.appraisal.appraise import appraise, load_root, read_quote
from tdxd.owner.appraisal.judge import Finding, judge_volume
from tdxd.owner.collateral.cache import prepare
from tdxd.sim.pki import Signer, _certificate, make_crl, public_raw, sign_raw
from tdxd.sim.quotes import QE_VENDOR_ID, QuoteShape
from tests.judged import NOW, Court, policy_of, resigned

DAY_S = 86400
SEPT_VE_DISABLE = 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Evidence through one gap: `arrange` changes the court, `quote` are overrides of the quote."""

    gap: int
    name: str
    check: str
    quote: dict[str, Any] = dataclasses.field(default_factory=dict)
    arrange: Callable[[Court], None] = lambda court: None

    def __str__(self) -> str:
        return f"gap{self.gap}-{self.name}"


def state(**fields: Any) -> Callable[[Court], None]:
    return lambda court: court.state.update(fields)


def rules(**lines: str) -> Callable[[Court], None]:
    return lambda court: court.rules(**lines)


def both(*steps: Callable[[Court], None]) -> Callable[[Court], None]:
    def run(court: Court) -> None:
        for step in steps:
            step(court)

    return run


def attributes(bit: int) -> dict[str, bytes]:
    return {"td_attributes": (SEPT_VE_DISABLE | 1 << bit).to_bytes(8, "little")}


def hide_signer(court: Court) -> None:
    """A PCK signs, hidden in a PEM block of another label that dcap-qvl reads all the same."""
    pki = court.platform.pki
    hidden = (pki.pck.pem + pki.pck_ca.pem).replace("CERTIFICATE", "FOO")
    chain = hidden + pki.root.pem
    court.state["signer"] = "pck"
    court.mangle = lambda one: dataclasses.replace(
        one, tcb_info_issuer_chain=chain, qe_identity_issuer_chain=chain
    )


def future_crl(court: Court) -> None:
    crl = make_crl(
        court.platform.pki.pck_ca,
        number=1,
        this_update_s=NOW + DAY_S,
        next_update_s=NOW + 30 * DAY_S,
    )
    court.mangle = lambda one: dataclasses.replace(one, pck_crl=crl)


def rolled_back(court: Court) -> None:
    """The server has seen TCB evaluation 20; after a restart it is offered 19."""
    assert court.failed() == {}
    court.state["eval_data_number"] = 19
    court.renew()


def other_pce(court: Court) -> None:
    court.mangle = lambda one: resigned(
        court.platform, one, lambda info: info.update(pceId="0001")
    )


def qe_data_with_a_tail(court: Court) -> bytes:
    key = public_raw(court.platform.pki.attestation.public_key())
    return hashlib.sha256(key + QuoteShape().qe_auth_data).digest() + b"\1" * 32


CASES = [
    Case(
        gap=1, name="report-data", check="report_data", quote={"report_data": b"x" * 64}
    ),
    *(
        Case(gap=2, name=name, check=name, quote={name: b"\7" * 48})
        for name in ("mr_td", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config")
    ),
    *(
        Case(gap=3, name=f"bit{bit}", check="td_attributes", quote=attributes(bit))
        for bit in (16, 18, 19, 20, 21, 22, 27, 30, 31, 62, 63)
    ),
    Case(gap=4, name="none", check="xfam", quote={"xfam": bytes(8)}),
    Case(gap=4, name="all", check="xfam", quote={"xfam": b"\xff" * 8}),
    Case(
        gap=4,
        name="all-unpinned",
        check="xfam",
        quote={"xfam": b"\xff" * 8},
        arrange=rules(xfam="[]"),
    ),
    *(
        Case(gap=5, name=status, check="tcb_status", arrange=state(tcb_status=status))
        for status in ("OutOfDate", "ConfigurationNeeded", "SWHardeningNeeded")
    ),
    Case(
        gap=5,
        name="module",
        check="tcb_status",
        arrange=state(module_status="OutOfDate"),
    ),
    Case(gap=5, name="qe", check="tcb_status", arrange=state(qe_status="OutOfDate")),
    *(
        Case(gap=6, name=name, check=name, arrange=rules(**{name: "false"}))
        for name in ("dynamic_platform", "smt", "cached_keys")
    ),
    Case(
        gap=7,
        name="grace-used-up",
        check="tcb_grace",
        arrange=both(
            state(tcb_status="OutOfDate", tcb_date_s=NOW - 31 * DAY_S),
            rules(
                tcb_status='["UpToDate", "OutOfDate"]',
                tcb_grace_days="{ OutOfDate = 30 }",
            ),
        ),
    ),
    Case(gap=9, name="pck", check="tcb_info_signer", arrange=state(signer="pck")),
    Case(gap=9, name="hidden", check="collateral_signature", arrange=hide_signer),
    Case(gap=10, name="rollback", check="collateral_floor", arrange=rolled_back),
    Case(gap=10, name="crl-of-tomorrow", check="collateral_dates", arrange=future_crl),
    Case(
        gap=10,
        name="old-evaluation",
        check="tcb_evaluation",
        arrange=both(state(eval_data_number=1), rules(min_tcb_evaluation="17")),
    ),
    Case(
        gap=12,
        name="refused",
        check="advisories",
        arrange=both(
            state(advisory_ids=("INTEL-SA-00837",)),
            rules(advisories_refused='["INTEL-SA-00837"]'),
        ),
    ),
    Case(
        gap=12,
        name="not-allowed",
        check="advisories",
        arrange=both(
            state(advisory_ids=("INTEL-SA-00837",)), rules(advisories_allowed="[]")
        ),
    ),
    Case(gap=13, name="pce-id", check="pce_id", arrange=other_pce),
    Case(
        gap=15,
        name="floor",
        check="tee_tcb_svn",
        arrange=rules(min_tee_tcb_svn='"0d010500000000000000000000000000"'),
    ),
    Case(
        gap=16,
        name="vmid",
        check="vmid",
        quote={"version": 5, "body": BodyKind.TD15_EX, "vmid": 1},
    ),
    *(
        Case(
            gap=16,
            name=f"tail{offset}",
            check="td15_ex",
            quote={
                "version": 5,
                "body": BodyKind.TD15_EX,
                "ex_tail": bytes(offset) + b"\1" + bytes(203 - offset),
            },
        )
        for offset in (0, 48, 96, 104, 120, 136, 148, 196, 203)
    ),
    Case(
        gap=20,
        name="ppid",
        check="platform",
        arrange=rules(platforms=f'["{"ab" * 16}"]'),
    ),
]
ELSEWHERE = {
    2: "test_gap2_registers",
    6: "test_gap6_strict_alone_refuses_every_cloud_platform",
    8: "test_gap8_grace_is_judged_at_the_time_of_the_verification",
    11: "test_gap11_the_clock_is_the_servers_own",
    14: "test_gap14_unused_fields_are_zero_or_change_nothing",
    17: "test_gap17_no_hash_of_a_quote_is_an_identity",
    18: "test_gap18_sgx_quote",
    19: "test_gap19_pck_chain_in_the_collateral",
}
MR_NAMES = (
    *("mr_seam", "mr_signer_seam", "seam_attributes"),
    *("mr_config_id", "mr_owner", "mr_owner_config"),
)
LINES = {
    1: ["report_data"],
    2: ["mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3", *MR_NAMES],
    3: ["td_attributes"],
    4: ["xfam"],
    5: ["tcb_status"],
    6: ["dynamic_platform", "smt", "cached_keys"],
    7: ["tcb_grace"],
    8: ["tcb_clock"],
    9: ["tcb_info_signer", "qe_identity_signer"],
    10: ["collateral_floor", "collateral_dates", "tcb_evaluation"],
    11: ["clock"],
    12: ["advisories"],
    13: ["pce_id"],
    14: ["unused_fields"],
    15: ["tee_tcb_svn"],
    16: ["mr_service_td", "vmid", "td15_ex"],
    17: ["replay_key", "quote_format"],
    18: ["tee_type"],
    19: ["pck_chain"],
    20: ["platform"],
}
"""The lines of `explain` that tell of each gap."""


@pytest.fixture(scope="module")
def platform():
    from tdxd.sim.platform import SimPlatform

    return SimPlatform.create()


@pytest.fixture
def court(tmp_path, platform):
    return Court(tmp_path, platform)


def alone(court: Court, quote: bytes, now: int = NOW, collateral: str = "") -> str:
    """What dcap-qvl says without the product."""
    text = collateral or court.collateral().to_json()
    parsed = dcap_qvl.QuoteCollateralV3.from_json(text)
    report = dcap_qvl.verify_with_root_ca(quote, parsed, court.platform.root_der, now)
    status: str = report.status
    return status


def test_every_gap_has_a_case():
    assert {case.gap for case in CASES} | set(ELSEWHERE) == set(range(1, 21))
    for name in ELSEWHERE.values():
        assert name in globals()


def test_every_gap_has_its_line_in_the_table(court):
    names = [check.name for check in court.checks()]
    for gap in range(1, 21):
        assert set(LINES[gap]) <= set(names), gap
    assert len(names) == len(set(names))


def test_the_good_request_passes_every_check(court):
    assert court.failed() == {}
    assert alone(court, court.evidence().quote) == "UpToDate"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_dcap_qvl_alone_lets_it_pass(case, court):
    case.arrange(court)
    assert alone(court, court.evidence(**case.quote).quote)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_appraisal_refuses_it_and_names_the_check(case, court):
    assert case.check in LINES[case.gap] + ["collateral_signature"]
    case.arrange(court)
    assert case.check in court.failed(**case.quote)
    assert court.reason(**case.quote)


@pytest.mark.parametrize("index", range(4))
def test_gap2_registers(court, index):
    rtmrs = list(court.platform.rtmrs)
    rtmrs[index] = b"\7" * 48
    assert alone(court, court.evidence(rtmrs=tuple(rtmrs)).quote)
    name = f"rtmr{index}" if index < 3 else "runtime_log"
    assert name in court.failed(rtmrs=tuple(rtmrs))
    court.event_log = b""
    court.policy = parse_policy(
        policy_of(court.platform).replace("required = true", "required = false")
    )
    assert list(court.failed(rtmrs=tuple(rtmrs))) == [f"rtmr{index}"]


@pytest.mark.parametrize("name", ["mr_signer_seam", "seam_attributes"])
def test_gap2_module_of_another_kind(court, name):
    """dcap-qvl does not ask for the identity of a module whose version byte is 0: some real are."""
    report = court.judgement().verified.report
    report = dataclasses.replace(report, tee_tcb_svn=b"\3" + bytes(15))
    for value, ok in ((bytes(len(getattr(report, name))), True), (b"\1" * 8, False)):
        odd = dataclasses.replace(report, **{name: value})
        lines = {one.name: one.ok for one in appraise_report(court.policy.tdx, odd)}
        assert lines[name] is ok


def test_gap6_strict_alone_refuses_every_cloud_platform(court):
    """So allowances are needed; by default the three that clouds need are given, on purpose."""
    quote = court.evidence().quote
    parsed = dcap_qvl.QuoteCollateralV3.from_json(court.collateral().to_json())
    verifier = dcap_qvl.QuoteVerifier(court.platform.root_der)
    with pytest.raises(ValueError, match="Dynamic platform"):
        verifier.verify_with_policy(
            quote, parsed, NOW, dcap_qvl.QuotePolicy.strict(NOW)
        )
    rules = court.policy.tdx
    assert rules.dynamic_platform
    assert rules.smt
    assert rules.cached_keys
    assert court.failed() == {}


def test_gap7_status_alone_is_refused_by_dcap_qvl_and_grace_is_ours(court):
    court.state = {"tcb_status": "OutOfDate", "tcb_date_s": NOW - 29 * DAY_S}
    policy = dcap_qvl.QuotePolicy.strict(NOW).allow_dynamic_platform(True)
    policy = policy.allow_smt(True).allow_cached_keys(True).allow_status("OutOfDate")
    parsed = dcap_qvl.QuoteCollateralV3.from_json(court.collateral().to_json())
    verifier = dcap_qvl.QuoteVerifier(court.platform.root_der)
    with pytest.raises(ValueError, match="too old"):
        verifier.verify_with_policy(court.evidence().quote, parsed, NOW, policy)
    both_statuses = '["UpToDate", "OutOfDate"]'
    court.rules(tcb_status=both_statuses, tcb_grace_days="{ OutOfDate = 30 }")
    assert court.failed() == {}
    court.rules(tcb_status=both_statuses, tcb_grace_days="{ OutOfDate = 28 }")
    assert list(court.failed()) == ["tcb_grace"]


@pytest.mark.parametrize("part", ["level", "module", "qe"])
def test_gap7_the_oldest_level_that_is_behind_counts(court, part):
    old, new = "2026-01-01T00:00:00Z", "2026-09-01T00:00:00Z"

    def age(info):
        level, module = info["tcbLevels"][0], info["tdxModuleIdentities"][0]
        level["tcbDate"] = old if part == "level" else new
        module["tcbLevels"][0]["tcbDate"] = old if part == "module" else new

    statuses = {"level": "tcb_status", "module": "module_status", "qe": "qe_status"}
    court.state[statuses[part]] = "OutOfDate"
    if part == "qe":
        court.state["tcb_date_s"] = 1767225600  # of the QE, too: it was not edited
    court.mangle = lambda one: resigned(court.platform, one, age)
    court.rules(
        tcb_status='["UpToDate", "OutOfDate"]', tcb_grace_days="{ OutOfDate = 100 }"
    )
    assert court.failed()["tcb_grace"].endswith("level of 2026-01-01")


def test_gap8_grace_is_judged_at_the_time_of_the_verification(court):
    """dcap-qvl lets a policy of 1970 judge today's quote: every level is young then."""
    court.state = {"tcb_status": "OutOfDate"}
    policy = dcap_qvl.QuotePolicy.strict(0).allow_dynamic_platform(True)
    policy = policy.allow_smt(True).allow_cached_keys(True).allow_status("OutOfDate")
    parsed = dcap_qvl.QuoteCollateralV3.from_json(court.collateral().to_json())
    verifier = dcap_qvl.QuoteVerifier(court.platform.root_der)
    verifier.verify_with_policy(court.evidence().quote, parsed, NOW, policy)

    court.rules(
        tcb_status='["UpToDate", "OutOfDate"]', tcb_grace_days="{ OutOfDate = 300 }"
    )
    judgement = dataclasses.replace(court.judgement(), now_s=0)
    finding = Finding(known=True, policy=court.policy)
    failed = [one.name for one in judge_volume("v", judgement, finding) if not one.ok]
    assert failed == ["tcb_clock"]
    assert list(court.failed()) == ["tcb_grace"]


def test_gap9_the_hidden_signer_is_encoded_away(court):
    """What was checked is what dcap-qvl sees: blocks of other labels are gone."""
    hide_signer(court)
    prepared = prepare(court.collateral().to_json())
    assert "FOO" not in prepared.parsed.tcb_info_issuer_chain


def test_gap11_the_clock_is_the_servers_own(court):
    """Old collateral passes with an old clock; nothing in a request tells the time."""
    court.state = {"issued_s": NOW - 60 * DAY_S}
    quote = court.evidence().quote
    assert alone(court, quote, now=NOW - 40 * DAY_S) == "UpToDate"
    assert "collateral_dates" in court.failed()
    court.state = {}
    future_crl(court)
    assert alone(court, quote) == "UpToDate"
    report, exact = read_quote(quote)
    got = appraise(
        exact, report, prepare(court.collateral().to_json()), NOW, court.root
    )
    assert [one.name for one in got.checks if not one.ok] == ["clock"]
    assert got.verified is None


def test_gap14_unused_fields_are_zero_or_change_nothing(court):
    tail = qe_data_with_a_tail(court)
    assert alone(court, court.evidence(qe_report_data=tail).quote) == "UpToDate"
    assert list(court.failed(qe_report_data=tail)) == ["unused_fields"]
    for change in ({"qe_mr_enclave": b"\1" * 32}, {"qe_auth_data": b"\2" * 32}):
        assert alone(court, court.evidence(**change).quote) == "UpToDate"
        before, after = court.judgement(), court.judgement(**change)
        assert before.verified is not None
        assert after.verified is not None
        ours = {"report": before.verified.report}
        assert dataclasses.replace(after.verified, **ours) == before.verified


def test_gap16_a_version_4_quote_has_no_field_for_a_service_td(court):
    lines = {check.name: check.actual for check in court.checks()}
    assert lines["mr_service_td"] == "no such field"
    later = {check.name: check.actual for check in court.checks(version=5)}
    assert later["mr_service_td"] == "zero"


def flipped_in_the_chain(quote: bytes) -> bytes:
    """Change the text between two certificates of the chain, which nothing signs."""
    return quote.replace(
        b"-----END CERTIFICATE-----\n-----BEGIN",
        b"-----END CERTIFICATE-----\r-----BEGIN",
        1,
    )


def test_gap17_no_hash_of_a_quote_is_an_identity(court):
    evidence = court.evidence()
    twin = dataclasses.replace(evidence, quote=flipped_in_the_chain(evidence.quote))
    assert twin.quote != evidence.quote
    assert alone(court, twin.quote) == alone(court, evidence.quote + b"junk")
    first, second = (court.judge.judge(one, NOW) for one in (evidence, twin))
    assert second.verified == first.verified
    assert second.verified is not None
    assert second.nonce == first.nonce  # what quotas count
    assert first.digests
    assert second.digests
    assert second.digests.quote_sha256 != first.digests.quote_sha256  # for the record
    long = dataclasses.replace(evidence, quote=evidence.quote + b"junk")
    checks = court.judge.judge(long, NOW).checks
    assert [one.name for one in checks if not one.ok] == ["quote_format"]


def sgx_quote(court: Court) -> bytes:
    """An SGX quote, version 3, of an enclave on the same platform."""
    pki, shape = court.platform.pki, QuoteShape()
    header = struct.pack("<HHIHH16s20s", 3, 2, 0, 4, 11, QE_VENDOR_ID, bytes(20))
    body = struct.pack(
        "<16sI28s16s32s32s32s96sHH60s64s",
        *(bytes(16), 0, b"", b"\5" + bytes(7) + b"\7" + bytes(7), b"\1" * 32, b""),
        *(b"\2" * 32, b"", 1, 1, b"", bytes(64)),
    )
    key = public_raw(pki.attestation.public_key())
    binding = hashlib.sha256(key + shape.qe_auth_data).digest()
    qe = struct.pack(
        "<16sI28s16s32s32s32s96sHH60s64s",
        *(bytes(16), 0, b"", shape.qe_attributes, shape.qe_mr_enclave, b""),
        *(shape.qe_mr_signer, b"", 1, shape.qe_isv_svn, b"", binding),
    )
    chain = pki.pck_chain_pem.encode() + b"\0"
    signature = sign_raw(pki.attestation, header + body) + key
    signature += qe + sign_raw(pki.pck.key, qe) + struct.pack("<H", 32)
    signature += shape.qe_auth_data + struct.pack("<HI", 5, len(chain)) + chain
    return header + body + struct.pack("<I", len(signature)) + signature


def sgx_collateral(court: Court) -> str:
    """Collateral of the same platform for SGX."""
    one = court.collateral()

    def edit(info):
        info["id"] = "SGX"
        del info["tdxModule"], info["tdxModuleIdentities"]
        for level in info["tcbLevels"]:
            del level["tcb"]["tdxtcbcomponents"]

    one = resigned(court.platform, one, edit)
    identity = json.loads(one.qe_identity)
    identity |= {"id": "QE", "isvprodid": 1}
    text = json.dumps(identity, separators=(",", ":"))
    signature = court.platform.pki.tcb_signer.sign_raw(text.encode())
    return dataclasses.replace(
        one, qe_identity=text, qe_identity_signature=signature
    ).to_json()


def test_gap18_sgx_quote(court):
    quote = sgx_quote(court)
    assert alone(court, quote, collateral=sgx_collateral(court)) == "UpToDate"
    assert "quote version is 3" in court.failed(lambda _: quote)["quote_format"]
    assert court.reason(lambda _: quote) == "quote-format"


def second_machine(court: Court) -> Signer:
    """The PCK of another machine under the same CA."""
    pki = court.platform.pki
    keys = {name: getattr(pki, name).key for name in ("root", "pck_ca")}
    keys["pck"] = ec.generate_private_key(ec.SECP256R1())
    identity = dataclasses.replace(pki.identity, ppid=b"\xee" * 16)
    return Signer(key=keys["pck"], certificate=_certificate("pck", keys, identity))


def test_gap19_pck_chain_in_the_collateral(court):
    """The machine that signed stands in the collateral; the quote names another one."""
    pki, other = court.platform.pki, second_machine(court)
    chain = other.pem + pki.pck_ca.pem + pki.root.pem
    fields = json.loads(court.collateral().to_json())
    text = json.dumps({**fields, "pck_certificate_chain": pki.pck_chain_pem})
    quote = court.evidence(pck_chain_pem=chain).quote
    assert alone(court, quote, collateral=text) == "UpToDate"

    report, exact = read_quote(quote)
    prepared = prepare(text)  # drops the chain: the quote's own is verified, and fails
    got = appraise(exact, report, prepared, NOW, court.root)
    assert [one.name for one in got.checks if not one.ok] == ["quote"]
    kept = dcap_qvl.QuoteCollateralV3.from_json(text)
    careless = dataclasses.replace(prepared, parsed=kept)
    got = appraise(exact, report, careless, NOW, court.root)
    assert [one.name for one in got.checks if not one.ok] == ["pck_chain"]


def test_gap20_another_machine_of_the_same_ca(court):
    other = second_machine(court)
    pki = court.platform.pki
    chain = other.pem + pki.pck_ca.pem + pki.root.pem
    shape = {"pck_chain_pem": chain, "pck_key": other.key}
    assert alone(court, court.evidence(**shape).quote) == "UpToDate"
    assert court.failed(**shape) == {"platform": "ee" * 16}


def test_root_of_a_stranger_is_told_by_its_key(court, tmp_path):
    stranger = Court(tmp_path)
    quote = stranger.evidence().quote
    root = load_root(stranger.platform.root_der, simulated=True, source="x")
    assert root.key_sha384 != court.root.key_sha384
    assert court.reason(lambda _: quote) == "report-data"
    assert court.reason(stranger.platform.quote) == "root"


def test_known_attributes_are_named(court):
    found = court.failed(td_attributes=td_attributes_bytes(["SEPT_VE_DISABLE", "KL"]))
    assert found == {"td_attributes": "SEPT_VE_DISABLE KL"}
    assert court.failed(**attributes(19)) == {"td_attributes": "BIT_19 SEPT_VE_DISABLE"}
