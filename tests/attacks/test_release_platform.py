"""Guests and platforms that must not get a key: with quotes that are signed and verify, or nearly.

The judge is the product's own; every quote is made by a simulated platform under a trusted root, so
that nothing but the check in question stands in the way.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime as dt
import json
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxd.core.policy import parse_policy
from tdxd.core.quote import (
    TD_ATTRIBUTE_BITS,
    BodyKind,
    parse_quote,
    td_attributes_bytes,
)
from tdxd.core.runtime_log import RuntimeEvent, encode_runtime_log, volume_event
from tdxd.owner.appraisal.judge import Finding, Judgement, judge_volume, reason_of
from tdxd.sim.platform import SimPlatform
from tests.judged import NOW, Court, policy_of
from tests.keyserver import make_bundle

DAY_S = 86400
GOOD = td_attributes_bytes(["SEPT_VE_DISABLE"])
BITS_OF_THE_REPORT = {
    "mr_td": 384,
    "mr_config_id": 384,
    "mr_owner": 384,
    "mr_owner_config": 384,
    "mr_seam": 384,
    "mr_signer_seam": 384,
    "td_attributes": 64,
    "seam_attributes": 64,
    "xfam": 64,
    "report_data": 512,
    "rtmr0": 384,
    "rtmr1": 384,
    "rtmr2": 384,
    "rtmr3": 384,
}


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


@pytest.fixture
def court(tmp_path, platform):
    return Court(tmp_path, platform)


@pytest.fixture(scope="module")
def standing(tmp_path_factory, platform):
    """A court for many questions."""
    return Court(tmp_path_factory.mktemp("court"), platform)


def attributes(*names):
    return {"td_attributes": td_attributes_bytes(["SEPT_VE_DISABLE", *names])}


# --- the TD -------------------------------------------------------------------


def test_the_good_guest_passes(court):
    assert court.failed() == {}


def test_debug_td(court):
    failed = court.failed(**attributes("DEBUG"))
    assert set(failed) == {"quote", "td_attributes"}
    assert "Debug mode is enabled" in failed["quote"]
    assert court.judgement(**attributes("DEBUG")).verified is None


def test_migratable_td(court):
    failed = court.failed(**attributes("MIGRATABLE"))
    assert set(failed) == {"quote", "td_attributes"}
    assert court.judgement(**attributes("MIGRATABLE")).verified is None


@pytest.mark.parametrize("name", ["PERFMON", "PKS", "KL", "LASS", "TPA", "ICSSD"])
def test_attribute_that_nobody_allowed(court, name):
    assert set(court.failed(**attributes(name))) == {"td_attributes"}
    assert court.reason(**attributes(name)) == "td-attributes"
    court.rules(td_attributes=f'["SEPT_VE_DISABLE", "{name}"]')
    assert court.failed(**attributes(name)) == {}
    assert set(court.failed()) == {"td_attributes"}  # exactly these, not at most


@pytest.mark.parametrize(
    "bit", sorted(set(range(64)) - set(TD_ATTRIBUTE_BITS.values()))
)
def test_unknown_attribute_bit(standing, bit):
    value = (int.from_bytes(GOOD, "little") | 1 << bit).to_bytes(8, "little")
    assert "td_attributes" in standing.failed(td_attributes=value)


def test_td_without_sept_ve_disable(court):
    assert set(court.failed(td_attributes=bytes(8))) == {"quote", "td_attributes"}


def test_service_td(court):
    failed = court.failed(version=5, mr_service_td=b"\1" * 48)
    assert set(failed) == {"quote", "mr_service_td"}
    assert court.judgement(version=5, mr_service_td=b"\1" * 48).verified is None


def test_td15_ex_is_judged_whole(court):
    shape = {"version": 5, "body": BodyKind.TD15_EX}
    assert court.failed(**shape) == {}
    assert set(court.failed(**shape, vmid=1)) == {"vmid"}
    assert set(court.failed(**shape, ex_tail=bytes(203) + b"\1")) == {"td15_ex"}
    assert set(court.failed(**shape, mr_td=bytes(48))) == {"mr_td"}
    assert (
        set(court.failed(**shape, td_id=b"\1" * 32)) == set()
    )  # names the TD, no more


@pytest.mark.parametrize("shape", [{"version": 3}, {"tee_type": 0}, {"version": 2}])
def test_sgx_quote(court, shape):
    assert set(court.failed(**shape)) == {"quote_format"}
    assert court.reason(**shape) == "quote-format"


@pytest.mark.parametrize("tail", [b"\1", b"junk", b"\0\0x", b"\0" * 20000 + b"x"])
def test_trailing_bytes(court, tail):
    failed = court.failed(lambda data: court.platform.quote(data) + tail)
    assert set(failed) == {"quote_format"}


def test_quote_that_fits_the_policy_of_another_volume(court):
    """Two volumes, two images: the guest of one asks for both, and gets one."""
    images = {"v": court.policy}
    other = policy_of(court.platform).replace(court.platform.rtmrs[1].hex(), "77" * 48)
    images["w"] = parse_policy(other)
    judgement = court.judgement()
    tables = {
        name: judge_volume(name, judgement, Finding(known=True, policy=policy))
        for name, policy in images.items()
    }
    assert reason_of(tables["v"]) == ""
    failed = [one.name for one in tables["w"] if not one.ok]
    assert failed == ["rtmr1"]
    assert reason_of(tables["w"]) == "measurements"


def test_no_policy_no_key(court):
    checks = judge_volume("v", court.judgement(), Finding(known=True, policy=None))
    assert [one.name for one in checks if not one.ok] == ["policy"]
    checks = judge_volume(
        "v", court.judgement(), Finding(known=False, policy=court.policy)
    )
    assert [one.name for one in checks if not one.ok] == ["volume"]


def test_what_was_not_verified_is_never_released(court):
    """Default deny: also for a judgement that no check speaks against."""
    empty = Judgement(checks=(), now_s=NOW)
    checks = judge_volume("v", empty, Finding(known=True, policy=court.policy))
    assert reason_of(checks) == "quote"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_single_bit_of_the_report_counts(standing, data):
    """A guest that differs in one bit, on a genuine platform that signs what it sees."""
    name = data.draw(st.sampled_from(sorted(BITS_OF_THE_REPORT)))
    bit = data.draw(st.integers(0, BITS_OF_THE_REPORT[name] - 1))
    evidence = standing.evidence()
    report = parse_quote(evidence.quote)
    if name.startswith("rtmr"):
        rtmrs = list(report.rtmrs)
        index = int(name[-1])
        rtmrs[index] = flipped(rtmrs[index], bit)
        overrides: dict[str, object] = {"rtmrs": tuple(rtmrs)}
    else:
        overrides = {name: flipped(getattr(report, name), bit)}
    overrides = {"report_data": report.report_data, **overrides}
    altered = standing.platform.quote(**overrides)
    judgement = standing.judge.judge(dataclasses.replace(evidence, quote=altered), NOW)
    checks = judge_volume("v", judgement, Finding(known=True, policy=standing.policy))
    assert reason_of(checks)


@settings(max_examples=150, deadline=None)
@given(bit=st.integers(0, 8 * 632 - 1))
def test_every_single_bit_of_the_signed_part_counts(standing, bit):
    """A quote that was altered on its way: header and report, bit by bit."""
    evidence = standing.evidence()
    altered = dataclasses.replace(evidence, quote=flipped(evidence.quote, bit))
    judgement = standing.judge.judge(altered, NOW)
    assert judgement.verified is None
    checks = judge_volume("v", judgement, Finding(known=True, policy=standing.policy))
    assert reason_of(checks)


def test_every_byte_of_measurements_attributes_and_report_data_in_turn(standing):
    """Without chance: one bit of each byte that a policy reads."""
    evidence = standing.evidence()
    for offset in range(64, 632):
        altered = flipped(evidence.quote, 8 * offset + offset % 8)
        judgement = standing.judge.judge(
            dataclasses.replace(evidence, quote=altered), NOW
        )
        assert judgement.verified is None, offset


def test_every_single_bit_of_the_quotes_signature_counts(standing):
    """ECDSA over header and report: 64 bytes, behind the report and the length of the rest."""
    evidence = standing.evidence()
    start = 8 * (632 + 4)
    for bit in range(start, start + 8 * 64):
        altered = dataclasses.replace(evidence, quote=flipped(evidence.quote, bit))
        judgement = standing.judge.judge(altered, NOW)
        assert judgement.verified is None, bit
        assert reason_of(judgement.checks) == "quote", bit


def flipped(value, bit):
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


# --- the platform -------------------------------------------------------------


def test_out_of_date_without_grace(court):
    court.state = {"tcb_status": "OutOfDate", "advisory_ids": ("INTEL-SA-01192",)}
    assert court.failed() == {"tcb_status": "OutOfDate"}


@pytest.mark.parametrize(("days", "passes"), [(40, True), (30, True), (29, False)])
def test_out_of_date_with_grace(court, days, passes):
    court.state = {"tcb_status": "OutOfDate", "tcb_date_s": NOW - 30 * DAY_S}
    court.rules(
        tcb_status='["UpToDate", "OutOfDate"]',
        tcb_grace_days=f"{{ OutOfDate = {days} }}",
    )
    assert set(court.failed()) == (set() if passes else {"tcb_grace"})


def test_grace_of_one_status_is_none_of_another(court):
    court.state = {"tcb_status": "OutOfDateConfigurationNeeded"}
    court.rules(
        tcb_status='["UpToDate", "OutOfDate"]', tcb_grace_days="{ OutOfDate = 900 }"
    )
    assert set(court.failed()) == {"tcb_status"}


def test_up_to_date_with_a_refused_advisory(court):
    court.state = {"advisory_ids": ("INTEL-SA-00837", "INTEL-SA-00828")}
    court.rules(advisories_refused='["INTEL-SA-00828"]')
    assert set(court.failed()) == {"advisories"}
    assert court.reason() == "advisories"
    court.rules(advisories_allowed='["INTEL-SA-00837", "INTEL-SA-00828"]')
    assert court.failed() == {}


def test_revoked_level_is_never_allowed(court):
    court.state = {"tcb_status": "Revoked"}
    assert set(court.failed()) == {"quote"}
    assert court.judgement().verified is None


@pytest.mark.parametrize("revoked", ["pck", "pck_ca", "tcb_signer"])
def test_revoked_certificate(court, revoked):
    court.state = {"revoked": (revoked,)}
    assert court.failed()
    assert court.judgement().verified is None


def test_revocation_reaches_a_platform_that_was_good(court):
    assert court.failed() == {}
    court.state = {"revoked": ("pck",)}
    court.renew()
    assert "evoked" in court.failed()["quote"]


@pytest.mark.parametrize("name", ["root_ca_crl", "pck_crl"])
def test_missing_revocation_list(court, name):
    court.mangle = lambda one: dataclasses.replace(one, **{name: b""})
    assert court.reason() == "collateral-unavailable"
    assert court.judgement().verified is None


def test_revocation_list_of_another_ca(court):
    court.mangle = lambda one: dataclasses.replace(one, pck_crl=one.root_ca_crl)
    assert court.failed()
    assert court.judgement().verified is None


def test_simulated_platform_where_the_policy_is_silent(court):
    court.policy = parse_policy(
        policy_of(court.platform).replace("simulated = true", "")
    )
    assert set(court.failed()) == {"simulated"}


def test_policy_that_is_not_in_force(court):
    for limits, name in (
        (f"not_before = {iso(1)}", "not_before"),
        (f"not_after = {iso(-1)}", "not_after"),
    ):
        text = policy_of(court.platform).replace("[release]", f"[release]\n{limits}")
        court.policy = parse_policy(text)
        assert set(court.failed()) == {name}
        assert court.reason() == "not-now"
    text = policy_of(court.platform).replace(
        "[release]", f"[release]\nnot_before = {iso(0)}\nnot_after = {iso(0)}"
    )
    court.policy = parse_policy(text)
    assert court.failed() == {}


def iso(seconds):
    moment = dt.datetime.fromtimestamp(NOW + seconds, dt.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


# --- the logs -----------------------------------------------------------------


def test_guest_that_serves_a_known_volume_may_ask_again(court):
    manifest = make_bundle("other", 3).manifest
    event = volume_event(manifest)
    fresh = SimPlatform(court.platform.pki, court.platform.description)
    fresh.extend_rtmr(3, event.digest())
    court.platform = fresh
    court.runtime_log = encode_runtime_log([event])
    assert set(court.failed()) == {"runtime_events"}  # the store does not know it
    assert court.reason() == "event-log"
    court.known = {("other", 3, manifest.digest())}
    assert court.failed() == {}
    court.runtime_log = b""
    assert set(court.failed()) >= {"runtime_log"}  # history cannot be left out


def test_guest_that_ran_something_else(court):
    event = RuntimeEvent(name="somebody/else", payload=b"x")
    fresh = SimPlatform(court.platform.pki, court.platform.description)
    fresh.extend_rtmr(3, event.digest())
    court.platform = fresh
    court.runtime_log = encode_runtime_log([event])
    assert set(court.failed()) == {"runtime_events"}


def test_chain_on_a_curve_that_nobody_knows(court):
    """A parser's surprise must be a denial, not an error of the server."""
    pki = court.platform.pki
    der = pki.root.der.replace(
        bytes.fromhex("2a8648ce3d030107"), b"\x2a\x86\x48\xce\x3d\3\1\x7f"
    )
    lines = base64.encodebytes(der).decode()
    root = f"-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n"
    failed = court.failed(pck_chain_pem=pki.pck.pem + pki.pck_ca.pem + root)
    assert set(failed) == {"quote_format"}
    assert "not supported" in failed["quote_format"]


# --- no abort -----------------------------------------------------------------

_BATCH = """
import base64, json, random, re, sys
from tdxd.errors import TdxdError
from tdxd.owner.appraisal.appraise import appraise, load_root, read_pck_identity, read_quote
from tdxd.owner.collateral.cache import prepare
given = json.load(sys.stdin)
rng = random.Random(given["seed"])
root_der = bytes.fromhex(given["root"]); quote = bytes.fromhex(given["quote"])
def mutate(data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data))
        kind = rng.randrange(4)
        if kind == 0: data[at] ^= 1 << rng.randrange(8)
        elif kind == 1: data[at] = rng.randrange(256)
        elif kind == 2: del data[at : at + rng.randrange(1, 9)]
        else: data[at:at] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)
def mutate_chain(pem):
    blocks = re.findall("-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", pem, re.S)
    ders = [base64.b64decode(one) for one in blocks]
    at = rng.randrange(len(ders))
    ders[at] = mutate(ders[at])
    return "".join(
        "-----BEGIN CERTIFICATE-----\\n" + base64.encodebytes(der).decode()
        + "-----END CERTIFICATE-----\\n" for der in ders
    )
def mutate_quote(data):
    if rng.randrange(2):
        return mutate(data)
    at = data.index(b"-----BEGIN")
    chain = mutate_chain(data[at:].decode().rstrip(chr(0))).encode() + bytes(1)
    size = int.from_bytes(data[at - 4 : at], "little") - len(chain)
    head = bytearray(data[:at])
    head[at - 4 : at] = len(chain).to_bytes(4, "little")
    outer = 48 + 584 + 4 + 64 + 64 + 2
    for where in (48 + 584, outer):
        old = int.from_bytes(head[where : where + 4], "little")
        head[where : where + 4] = (old - size).to_bytes(4, "little")
    return bytes(head) + chain
def mutate_json(text):
    fields = json.loads(text)
    name = rng.choice(sorted(fields))
    value = fields[name]
    if name.endswith("_chain") and rng.randrange(2):
        fields[name] = mutate_chain(value)
    elif name.endswith("_crl") or name.endswith("signature"):
        fields[name] = mutate(bytes.fromhex(value)).hex()
    else:
        fields[name] = mutate(value.encode()).decode(errors="replace")
    return json.dumps(fields)
counts = {"accepted": 0, "refused": 0, "root": 0}
good = load_root(root_der, simulated=True, source="root")
for index in range(given["count"]):
    root, q, c = good, quote, given["collateral"]
    try:
        which = index % 3
        if which == 0: root = load_root(mutate(root_der), simulated=True, source="x")
        if which == 1: q = mutate_quote(quote)
        if which == 2: c = mutate_json(c)
        report, exact = read_quote(q)
        read_pck_identity(exact)
        got = appraise(exact, report, prepare(c), given["now"], root)
        counts["accepted" if got.verified else "refused"] += 1
    except TdxdError as exc:
        counts["root" if which == 0 else "refused"] += 1
print(json.dumps(counts))
"""


@pytest.mark.parametrize("seed", range(2))
def test_no_quote_collateral_or_root_ends_the_process(platform, seed):
    """dcap-qvl ends the process by SIGABRT for a root that is not self-issued, and for nothing
    else that was found: mutants of all three inputs, in a process that would show it.
    """
    given_ = {
        "seed": seed,
        "count": 900,
        "root": platform.root_der.hex(),
        "quote": platform.quote(bytes(64)).hex(),
        "collateral": platform.collateral_json(NOW),
        "now": NOW,
    }
    done = subprocess.run(
        [sys.executable, "-c", _BATCH],
        input=json.dumps(given_),
        text=True,
        capture_output=True,
        check=False,
        timeout=300,
    )
    assert done.returncode != -signal.SIGABRT, done.stderr
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["root"] > 250  # hardly a mutated root is self-signed
    assert counts["refused"] > 300
    assert sum(counts.values()) == 900


_ABORT = """
import json, os, random, signal, sys
import dcap_qvl
from tdxd.errors import ConfigError
from tdxd.owner.appraisal.appraise import load_root
given = json.load(sys.stdin)
rng = random.Random(7)
root, quote = bytes.fromhex(given["root"]), bytes.fromhex(given["quote"])
collateral = dcap_qvl.QuoteCollateralV3.from_json(given["collateral"])
os.close(2)  # the aborts' own words
aborted = refused = 0
for _ in range(given["count"]):
    other = bytearray(root)
    other[rng.randrange(len(other))] ^= 1 << rng.randrange(8)
    pid = os.fork()
    if not pid:
        try:
            dcap_qvl.verify_with_root_ca(quote, collateral, bytes(other), given["now"])
        except ValueError:
            pass
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGABRT:
        aborted += 1
        try:
            load_root(bytes(other), simulated=True, source="x")
        except ConfigError:
            refused += 1
print(json.dumps([aborted, refused]))
"""


def test_every_root_that_would_end_the_process_is_refused(platform):
    """Flipped bits of a good root, each shown to dcap-qvl by a process that may abort."""
    given_ = {
        "count": 400,
        "root": platform.root_der.hex(),
        "quote": platform.quote(bytes(64)).hex(),
        "collateral": platform.collateral_json(NOW),
        "now": NOW,
    }
    done = subprocess.run(
        [sys.executable, "-c", _ABORT],
        input=json.dumps(given_),
        text=True,
        capture_output=True,
        check=False,
        timeout=120,
    )
    aborted, refused = json.loads(done.stdout)
    assert aborted > 20  # else the reason of the check is gone
    assert refused == aborted
