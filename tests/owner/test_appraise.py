"""Appraisal: real Intel-signed quotes at their recorded times, and the gaps of dcap-qvl."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
from collections import Counter

import dcap_qvl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.name import _ASN1Type
from cryptography.x509.oid import NameOID

from tdxd.core.appraisal import appraise_platform, appraise_report
from tdxd.core.policy import parse_policy
from tdxd.core.quote import td_attributes_bytes
from tdxd.errors import ConfigError, EvidenceMalformedError
from tdxd.owner.appraisal.appraise import (
    INTEL_ROOT_KEY_SHA384,
    appraise,
    intel_root,
    load_root,
    read_pck_identity,
    read_quote,
)
from tdxd.owner.collateral.cache import prepare
from tdxd.sim.platform import SimPlatform
from tests.keyserver import policy_text
from tests.vectors import VECTORS, expected, needs_vectors, quote_bytes, quote_names

NOW = 1_790_000_000
DATA = bytes(range(64))


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


def sim_root(platform):
    return load_root(platform.root_der, simulated=True, source="root")


def judged(platform, quote=None, now=NOW, root=None, **state):
    """Appraise a quote of the platform against its own collateral."""
    report, exact = read_quote(quote or platform.quote(DATA))
    prepared = prepare(platform.collateral_json(NOW, **state))
    return appraise(exact, report, prepared, now, root or sim_root(platform))


def why_not(appraisal):
    assert appraisal.verified is None
    return {check.name: check.actual for check in appraisal.checks if not check.ok}


# --- real quotes --------------------------------------------------------------


@needs_vectors
@pytest.mark.parametrize("name", quote_names())
def test_real_quote_gets_its_recorded_verdicts(name):
    wanted = expected(name)
    report, exact = read_quote(quote_bytes(name))
    pck = read_pck_identity(exact)
    assert pck.fmspc == wanted["fmspc"]
    assert pck.ca == wanted["ca"]
    root = intel_root()
    assert (pck.root_key_sha384 == root.key_sha384) is wanted["intel_production_root"]
    if not wanted["intel_production_root"]:
        chain = bytes(dcap_qvl.parse_quote(exact).cert_chain_pem_bytes())
        der = x509.load_pem_x509_certificates(chain.rstrip(b"\0"))[-1].public_bytes(
            Encoding.DER
        )
        assert hashlib.sha256(der).hexdigest() == wanted["root_sha256"]
        root = load_root(der, simulated=True, source=name)
    assert wanted["verifications"]
    for case in wanted["verifications"]:
        prepared = prepare((VECTORS / case["collateral"]).read_text())
        got = appraise(exact, report, prepared, case["now"], root)
        assert (got.verified is not None) is case["ok"], case
        assert prepared.expires_s == case["valid_until"]
        if got.verified is None:
            assert f"ValueError: {why_not(got)['quote']}" == case["error"]
            continue
        assert got.verified.tcb_status == case["status"]
        assert list(got.verified.advisory_ids) == case["advisory_ids"]
        assert (
            got.verified.tcb_evaluation <= case["tcb_eval"]
        )  # of all parts the oldest
        assert got.verified.ppid == wanted["ppid"]
        assert got.verified.report.mr_td.hex() == wanted["mr_td"]
        assert got.verified.simulated is not wanted["intel_production_root"]
        later = appraise(exact, report, prepared, case["valid_until"] + 1, root)
        assert later.verified is None


@needs_vectors
@pytest.mark.parametrize("name", quote_names())
def test_policy_of_a_real_quote_accepts_it_where_up_to_date(name):
    """A policy made of the quote's own values: status decides, and nothing else fails."""
    wanted = expected(name)
    if not wanted["intel_production_root"]:
        pytest.skip("signed under Intel's pre-production root")
    registers = ", ".join(f'rtmr{i} = "{wanted[f"rt_mr{i}"]}"' for i in range(4))
    pins = "".join(
        f'{key} = ["{wanted[key]}"]\n'
        for key in ("mr_config_id", "mr_owner", "mr_owner_config", "mr_seam", "xfam")
    )
    policy = parse_policy(
        f'[tdx]\nmrtd = ["{wanted["mr_td"]}"]\n'
        f'rtmr = [{{ name = "real", {registers} }}]\n'
        f'td_attributes = ["SEPT_VE_DISABLE"]\ntcb_status = ["UpToDate"]\n'
        f'platforms = ["{wanted["ppid"]}"]\n{pins}'
    )
    report, exact = read_quote(quote_bytes(name))
    for case in wanted["verifications"]:
        prepared = prepare((VECTORS / case["collateral"]).read_text())
        got = appraise(exact, report, prepared, case["now"], intel_root())
        if got.verified is None:
            continue
        checks = (
            *appraise_report(policy.tdx, got.verified.report),
            *appraise_platform(policy.tdx, got.verified, case["now"]),
        )
        failed = [check.name for check in checks if not check.ok]
        assert failed == ([] if case["status"] == "UpToDate" else ["tcb_status"])


@needs_vectors
def test_real_quotes_cover_every_kind():
    cases = [
        (case["ok"], case["status"])
        for name in quote_names()
        for case in expected(name)["verifications"]
    ]
    counts = Counter(cases)
    assert counts[True, "UpToDate"] >= 40
    assert counts[True, "OutOfDate"] >= 10
    assert counts[False, None] >= 40


# --- gaps of dcap-qvl ---------------------------------------------------------


def test_simulated_quote_passes_under_its_root(platform):
    got = judged(platform)
    assert got.verified is not None
    assert got.verified.simulated
    assert got.verified.report == platform.report(DATA)
    assert got.verified.ppid == platform.pki.identity.ppid.hex()
    assert got.verified.root_key_sha384 == sim_root(platform).key_sha384


def test_policy_written_from_the_platform_accepts_it(platform):
    rules = parse_policy(policy_text(platform)).tdx
    verified = judged(platform).verified
    checks = appraise_report(rules, verified.report) + appraise_platform(
        rules, verified, NOW
    )
    assert all(check.ok for check in checks)


def test_simulated_quote_fails_under_intels_root(platform):
    assert "quote" in why_not(judged(platform, root=intel_root()))


def test_intels_root_key_is_the_one_that_dcap_qvl_carries():
    assert intel_root().key_sha384 == INTEL_ROOT_KEY_SHA384
    assert not intel_root().simulated


@pytest.mark.parametrize("version", [4, 5])
def test_both_versions_are_read_the_same(platform, version):
    got = judged(platform, platform.quote(DATA, version=version))
    assert got.verified is not None
    assert got.verified.report.report_data == DATA


def test_td15_ex_body_is_read_the_same(platform):
    from tdxd.core.quote import BodyKind

    quote = platform.quote(DATA, version=5, body=BodyKind.TD15_EX, vmid=3)
    got = judged(platform, quote)
    assert got.verified is not None
    assert got.verified.report.vmid == 3


def test_service_td_is_refused(platform):
    quote = platform.quote(DATA, version=5, mr_service_td=b"\1" * 48)
    assert "service TD" in why_not(judged(platform, quote))["quote"]


@pytest.mark.parametrize("name", ["DEBUG", "MIGRATABLE", "SERVTD_EXT", "PERF_PROF"])
def test_attributes_that_open_the_td_are_refused(platform, name):
    bits = td_attributes_bytes(["SEPT_VE_DISABLE", name])
    assert "quote" in why_not(
        judged(platform, platform.quote(DATA, td_attributes=bits))
    )


def test_every_status_but_revoked_is_left_to_the_policy(platform):
    for status in ("OutOfDate", "ConfigurationNeeded", "SWHardeningNeeded"):
        got = judged(platform, tcb_status=status)
        assert got.verified is not None, status
        assert got.verified.tcb_status == status
    assert "quote" in why_not(judged(platform, tcb_status="Revoked"))


def test_a_module_or_qe_out_of_date_shows_in_the_status(platform):
    for state in ({"module_status": "OutOfDate"}, {"qe_status": "OutOfDate"}):
        got = judged(platform, **state)
        assert got.verified is not None
        assert got.verified.tcb_status.startswith("OutOfDate")


@pytest.mark.parametrize("revoked", ["pck", "pck_ca", "tcb_signer"])
def test_revoked_certificates(platform, revoked):
    assert "evoked" in why_not(judged(platform, revoked=(revoked,)))["quote"]


@pytest.mark.parametrize("offset_s", [-7200, 31 * 86400])
def test_collateral_outside_its_time(platform, offset_s):
    assert "quote" in why_not(judged(platform, now=NOW + offset_s))


def test_collateral_of_another_family(platform):
    assert "quote" in why_not(judged(platform, fmspc=bytes(6)))


def test_wrong_signer_is_never_shown_to_dcap_qvl(platform):
    wrong = why_not(judged(platform, signer="pck"))
    assert wrong == {
        "tcb_info_signer": "tdx-sim PCK Certificate",
        "qe_identity_signer": "tdx-sim PCK Certificate",
        "quote": "not tried",
    }


def test_dcap_qvl_alone_takes_a_pck_for_a_signer(platform):
    """The gap that the check above closes; when this fails, dcap-qvl has closed it."""
    collateral = platform.collateral_json(NOW, signer="pck")
    parsed = dcap_qvl.QuoteCollateralV3.from_json(collateral)
    report = dcap_qvl.verify_with_root_ca(
        platform.quote(DATA), parsed, platform.root_der, NOW
    )
    assert report.status == "UpToDate"


def test_report_that_is_not_the_verified_one(platform):
    quote = platform.quote(DATA)
    report, exact = read_quote(quote)
    other = dataclasses.replace(report, mr_td=bytes(48))
    prepared = prepare(platform.collateral_json(NOW))
    got = appraise(exact, other, prepared, NOW, sim_root(platform))
    assert why_not(got)["quote"] == "signed, but read differently by dcap-qvl"


def test_every_flip_in_the_signed_part_is_refused(platform):
    quote = platform.quote(DATA)
    prepared = prepare(platform.collateral_json(NOW))
    root = sim_root(platform)
    for offset in range(48, 632, 13):
        bad = bytearray(quote)
        bad[offset] ^= 1 << offset % 8
        report, exact = read_quote(bytes(bad))
        assert appraise(exact, report, prepared, NOW, root).verified is None


# --- reading ------------------------------------------------------------------


def test_zero_padding_is_cut_off(platform):
    quote = platform.quote(DATA)
    assert read_quote(quote.ljust(8000, b"\0"))[1] == quote


@pytest.mark.parametrize("tail", [b"x", b"\0\0x", b"\0" * 20000])
def test_other_tails_are_refused(platform, tail):
    quote = platform.quote(DATA) + tail
    if any(tail):
        with pytest.raises(EvidenceMalformedError):
            read_quote(quote)
    else:
        assert read_quote(quote)[1] == platform.quote(DATA)


@pytest.mark.parametrize("size", [0, 1, 47, 53, 632, 636, 700])
def test_short_quotes_are_refused(platform, size):
    with pytest.raises(EvidenceMalformedError):
        read_quote(platform.quote(DATA)[:size])


def test_quote_without_a_pck_chain(platform):
    quote = platform.quote(DATA, pck_chain_pem="no certificates here")
    with pytest.raises(EvidenceMalformedError, match="quote: "):
        read_pck_identity(quote)


# --- roots --------------------------------------------------------------------


def test_root_that_is_not_self_issued_is_refused(platform):
    with pytest.raises(ConfigError, match="pck-ca is not a self-signed root"):
        load_root(platform.pki.pck_ca.der, simulated=True, source="pck-ca")


def test_root_that_only_claims_to_be_self_issued_is_refused(platform):
    der = bytearray(platform.root_der)
    der[-1] ^= 1
    with pytest.raises(ConfigError):
        load_root(bytes(der), simulated=True, source="x")


@pytest.mark.parametrize("junk", [b"", b"junk", b"-----BEGIN CERTIFICATE-----\n"])
def test_root_that_is_no_certificate(junk):
    with pytest.raises(ConfigError, match=r"root\.pem is not a self-signed"):
        load_root(junk, simulated=True, source="root.pem")


def test_root_may_be_pem(platform):
    pem = platform.root_pem.encode()
    assert load_root(pem, simulated=True, source="x") == sim_root(platform)


def retyped(name):
    """The same words in another ASN.1 string type: equal to the eye, and to `x509.Name`."""
    kind = _ASN1Type.PrintableString
    return x509.Name([x509.NameAttribute(one.oid, one.value, kind) for one in name])


ISSUERS = {
    "another": lambda _: x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, "somebody else")]
    ),
    "retyped": retyped,
    "reordered": lambda name: x509.Name(list(name)[::-1]),
}


def misissued_root(platform, issuer="another"):
    """The platform's own root key under a certificate that names another issuer."""
    root = platform.pki.root
    old = root.certificate
    other = ISSUERS[issuer](old.subject)
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(other)
        .public_key(old.public_key())
        .serial_number(1)
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(root.key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.parametrize("issuer", ISSUERS)
def test_root_of_the_right_key_that_names_another_issuer_is_refused(platform, issuer):
    with pytest.raises(ConfigError, match="is not a self-signed root"):
        load_root(misissued_root(platform, issuer), simulated=True, source="x")


@pytest.mark.parametrize("issuer", ISSUERS)
def test_dcap_qvl_aborts_for_a_root_that_is_not_self_issued(platform, issuer):
    """Why `load_root` checks; in a process of its own, for it ends by SIGABRT."""
    script = (
        "import sys, json, dcap_qvl as d\n"
        "q, c, r, now = json.load(sys.stdin)\n"
        "c = d.QuoteCollateralV3.from_json(c)\n"
        "d.verify_with_root_ca(bytes.fromhex(q), c, bytes.fromhex(r), now)\n"
    )
    given = json.dumps(
        [
            platform.quote(DATA).hex(),
            platform.collateral_json(NOW),
            misissued_root(platform, issuer).hex(),
            NOW,
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=given,
        text=True,
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == -signal.SIGABRT, done.stderr
