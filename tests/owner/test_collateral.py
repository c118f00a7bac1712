"""One set of collateral: taken apart, its signers' roles, and every check of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dcap_qvl
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxd.errors import DataError
from tdxd.owner.appraisal.appraise import intel_root, load_root
from tdxd.owner.collateral.cache import (
    COLLATERAL_REASONS,
    SetRules,
    Trust,
    examine,
    prepare,
)
from tdxd.owner.collateral.floors import floor_values
from tdxd.owner.collateral.roots import trust_of
from tdxd.sim.pki import make_crl
from tdxd.sim.platform import SimPlatform
from tests.collateral import DAY, NOW, examined, failed, trust
from tests.vectors import VECTORS, needs_vectors


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


# --- preparing ----------------------------------------------------------------


def test_good_signers(platform):
    prepared = prepare(platform.collateral_json(NOW))
    assert [check.ok for check in prepared.signers] == [True, True]
    assert prepared.expires_s == NOW - 3600 + 30 * DAY


def test_expiry_is_the_earliest_in_the_set(platform):
    prepared = prepare(platform.collateral_json(NOW, next_update_s=NOW + 5))
    assert prepared.expires_s == NOW + 5


def test_one_wrong_signer_is_named(platform):
    fields = json.loads(platform.collateral_json(NOW))
    fields["qe_identity_issuer_chain"] = platform.pki.pck_chain_pem
    first, second = prepare(json.dumps(fields)).signers
    assert first.ok
    assert (second.name, second.actual, second.ok) == (
        "qe_identity_signer",
        "tdx-sim PCK Certificate",
        False,
    )


def test_text_between_certificates_does_not_survive(platform):
    fields = json.loads(platform.collateral_json(NOW))
    hidden = platform.pki.pck.pem.replace("CERTIFICATE", "FOO")
    fields["tcb_info_issuer_chain"] = hidden + platform.pki.tcb_chain_pem + "junk"
    prepared = prepare(json.dumps(fields))
    assert prepared.signers[0].ok
    kept = prepared.parsed.tcb_info_issuer_chain
    assert kept == platform.pki.tcb_chain_pem


def test_pck_chain_of_the_collateral_is_dropped(platform):
    """Gap 19: dcap-qvl would take it instead of the quote's own."""
    fields = json.loads(platform.collateral_json(NOW))
    fields["pck_certificate_chain"] = platform.pki.pck_chain_pem
    given_to_dcap = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(fields)).to_json()
    assert json.loads(given_to_dcap)["pck_certificate_chain"]
    prepared = prepare(json.dumps(fields))
    assert not json.loads(prepared.parsed.to_json()).get("pck_certificate_chain")
    assert "pck_certificate_chain" not in prepared.fields


def test_what_is_kept_reads_the_same_again(platform):
    prepared = prepare(platform.collateral_json(NOW))
    again = prepare(json.dumps(dict(prepared.fields)))
    assert dict(again.fields) == dict(prepared.fields)


@needs_vectors
def test_all_real_collateral_is_readable():
    names = sorted((VECTORS / "collateral").glob("*.json"))
    assert len(names) > 40
    for path in names:
        prepared = prepare(path.read_text())
        assert all(check.ok for check in prepared.signers), path.name


@pytest.mark.parametrize(
    "change",
    [
        {"tcb_info_issuer_chain": ""},
        {"tcb_info_issuer_chain": 7},
        {"tcb_info": "{}"},
        {"tcb_info": "[]"},
        {"qe_identity": "not json"},
        {"pck_crl": "zz"},
        {"root_ca_crl": "00"},
        {"pck_crl_issuer_chain": "-----BEGIN CERTIFICATE-----"},
        {"tcb_info": '{"issueDate":"2026-01-01T00:00:00"}'},
        {"tcb_info_signature": "xx"},
    ],
)
def test_malformed_collateral_is_an_error(platform, change):
    fields = {**json.loads(platform.collateral_json(NOW)), **change}
    with pytest.raises(DataError, match="collateral is malformed"):
        prepare(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{", "[" * 100_000])
def test_text_that_is_no_collateral(text):
    with pytest.raises(DataError, match="collateral is malformed"):
        prepare(text)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tcbEvaluationDataNumber", "20"),
        ("tcbEvaluationDataNumber", -1),
        ("tcbEvaluationDataNumber", 2**31),
        ("tcbEvaluationDataNumber", True),
        ("issueDate", "2026-09-01T00:00:00"),
        ("issueDate", 7),
        ("issueDate", "9999-12-31T23:59:59-12:00"),
        ("nextUpdate", "0001-01-01T00:00:00+14:00"),
        ("nextUpdate", "never"),
    ],
)
def test_odd_numbers_and_times_are_malformed(platform, key, value):
    fields = json.loads(platform.collateral_json(NOW))
    document = {**json.loads(fields["tcb_info"]), key: value}
    fields["tcb_info"] = json.dumps(document)
    with pytest.raises(DataError, match="collateral is malformed"):
        prepare(json.dumps(fields))


def test_a_huge_set_is_not_even_parsed():
    with pytest.raises(DataError, match="at most 4194304"):
        prepare(" " * (4 * 1024 * 1024 + 1))


@settings(max_examples=400)
@given(data=st.data())
def test_mangled_collateral_is_an_error_or_fails_a_check(data):
    """No byte of the JSON can be changed into something that crashes, or that passes changed."""
    platform = mangled_platform()
    text = platform.collateral_json(NOW)
    at = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(codec="ascii"))
    try:
        got = examined(platform, text[:at] + letter + text[at + 1 :])
    except DataError:
        return
    if (
        got.ok
    ):  # it was the same letter, another case of a hex digit, or not what was signed
        good = prepare(text)
        assert [got.fields[k] for k in ("tcb_info", "qe_identity")] == [
            good.fields[k] for k in ("tcb_info", "qe_identity")
        ]


_MADE: list[SimPlatform] = []


def mangled_platform():
    if not _MADE:
        _MADE.append(SimPlatform.create())
    return _MADE[0]


@given(st.text(max_size=300))
def test_any_text_is_no_collateral(text):
    with pytest.raises(DataError):
        prepare(text)


# --- every check --------------------------------------------------------------


def test_a_good_set_passes_every_check(platform):
    got = examined(
        platform, platform.collateral_json(NOW), rules=SetRules(max_age_s=DAY)
    )
    assert got.ok
    names = [check.name for check in got.checks]
    assert names == [
        "tcb_info_signer",
        "qe_identity_signer",
        "collateral_scope",
        "pck_crl_issuer",
        "root_crl_issuer",
        "collateral_signature",
        "collateral_revocation",
        "collateral_dates",
        "collateral_age",
        "collateral_floor",
    ]
    assert set(names) == set(COLLATERAL_REASONS)
    numbers = (got.tcb_evaluation, got.qe_evaluation)
    assert numbers == (20, 20)
    assert (got.pck_crl_number, got.root_crl_number) == (1, 1)
    assert got.fmspc == platform.fmspc


@needs_vectors
@pytest.mark.parametrize(
    "path",
    sorted((VECTORS / "collateral").glob("*.json")),
    ids=lambda path: path.stem,
)
def test_real_collateral_verifies_by_itself(path: Path):
    """Intel's own sets pass every check at the moment of their issue, and under no other root."""
    prepared = prepare(path.read_text())
    root = trust_of(intel_root())
    if path.name.startswith("nonprod"):
        chain = prepared.fields["tcb_info_issuer_chain"].encode()
        der = x509.load_pem_x509_certificates(chain)[-1]

        root = trust_of(
            load_root(der.public_bytes(Encoding.DER), simulated=True, source="nonprod")
        )
    ca = "processor" if "-processor-" in path.name else "platform"
    asked: dict[str, Any] = {
        "fmspc": prepared.fmspc,
        "ca": ca,
        "rules": SetRules(),
        "floors": {},
    }
    now_s = prepared.issued_s
    got = examine(prepared, trust=root, now_s=now_s, **asked)
    assert failed(got) == {}
    other = Trust(name="other", key_sha384="00" * 48)
    got = examine(prepared, trust=other, now_s=now_s, **asked)
    assert list(failed(got)) == ["collateral_signature"]
    assert failed(got)["collateral_signature"].count("ends at another root") == 3


@needs_vectors
def test_intels_crl_numbers_say_nothing():
    """Why the time of issue has a floor, too: the number of every recorded CRL is 1."""
    sets = [prepare(p.read_text()) for p in (VECTORS / "collateral").glob("*.json")]
    assert {(one.pck_crl_number, one.root_crl_number) for one in sets} == {(1, 1)}
    assert len({one.issued["pck_crl"] for one in sets}) > 20


def changed(platform, **state):
    """Fields of a set that was signed in another state."""
    return json.loads(platform.collateral_json(NOW, **state))


@pytest.mark.parametrize("name", ["tcb_info", "qe_identity"])
def test_edited_document(platform, name):
    fields = changed(platform)
    fields[name] = fields[name].replace('"UpToDate"', '"OutOfDate"')
    got = failed(examined(platform, json.dumps(fields)))
    assert got == {"collateral_signature": f"{name}: wrong signature"}


@pytest.mark.parametrize(
    ("signature", "why"),
    [("00" * 64, "wrong signature"), ("00" * 63, "signature of 63 bytes")],
)
def test_wrong_signature(platform, signature, why):
    fields = changed(platform) | {"tcb_info_signature": signature}
    got = failed(examined(platform, json.dumps(fields)))
    assert why in got["collateral_signature"]


def test_crl_of_another_ca_with_the_same_name(platform):
    stranger = SimPlatform.create()
    times: dict[str, Any] = {"this_update_s": NOW - 10, "next_update_s": NOW + DAY}
    crl = make_crl(stranger.pki.pck_ca, number=1, **times)
    fields = changed(platform) | {"pck_crl": crl.hex()}
    got = failed(examined(platform, json.dumps(fields)))
    assert got == {"collateral_signature": "pck_crl: wrong signature"}


def test_root_crl_in_the_place_of_the_pck_crl(platform):
    fields = changed(platform)
    fields["pck_crl"] = fields["root_ca_crl"]
    got = failed(examined(platform, json.dumps(fields)))
    assert list(got) == ["pck_crl_issuer", "collateral_signature"]
    assert got["collateral_signature"] == "pck_crl: of another issuer"


def test_pck_crl_in_the_place_of_the_root_crl(platform):
    """Else revoked signers would go unseen."""
    fields = changed(platform)
    fields["root_ca_crl"] = fields["pck_crl"]
    got = failed(examined(platform, json.dumps(fields)))
    assert "root_crl_issuer" in got
    assert "root_ca_crl: of another issuer" in got["collateral_signature"]


def test_set_of_another_pck_ca(platform):
    got = failed(examined(platform, platform.collateral_json(NOW), ca="processor"))
    assert got == {"pck_crl_issuer": "tdx-sim PCK Platform CA"}


def test_set_of_another_family(platform):
    text = platform.collateral_json(NOW, fmspc=b"\1" * 6)
    got = failed(examined(platform, text))
    assert got == {"collateral_scope": "TDX 3 for 010101010101, TD_QE 2"}


def test_set_under_another_root(platform):
    stranger = SimPlatform.create()
    got = examine(
        prepare(platform.collateral_json(NOW)),
        trust=trust(stranger),
        fmspc=platform.fmspc,
        ca="platform",
        now_s=NOW,
        rules=SetRules(),
        floors={},
    )
    assert "ends at another root" in failed(got)["collateral_signature"]


def test_chain_that_borrows_the_root_certificate(platform):
    stranger = SimPlatform.create()
    borrowed = stranger.pki.tcb_signer.pem + platform.pki.root.pem
    fields = changed(stranger) | {
        "tcb_info_issuer_chain": borrowed,
        "qe_identity_issuer_chain": borrowed,
        "pck_crl_issuer_chain": stranger.pki.pck_ca.pem + platform.pki.root.pem,
    }
    got = failed(examined(platform, json.dumps(fields)))
    for name in ("tcb_info_issuer_chain", "pck_crl_issuer_chain", "root_ca_crl"):
        assert f"{name}: wrong signature" in got["collateral_signature"]


@pytest.mark.parametrize("count", [1, 3])
def test_chain_of_another_length(platform, count):
    pki = platform.pki
    chain = {1: pki.tcb_signer.pem, 3: pki.tcb_signer.pem + pki.pck_ca_chain_pem}
    fields = changed(platform) | {"tcb_info_issuer_chain": chain[count]}
    got = failed(examined(platform, json.dumps(fields)))
    assert f"{count} certificates" in got["collateral_signature"]


def issued(platform, public_key, signing_key, *, subject, ca, usage):
    """A certificate as the root CA would issue it, but for what the test changes."""
    root = platform.pki.root.certificate
    names = (
        *("digital_signature", "content_commitment", "key_encipherment"),
        *("data_encipherment", "key_agreement", "key_cert_sign", "crl_sign"),
        *("encipher_only", "decipher_only"),
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(root.subject)
        .public_key(public_key)
        .serial_number(7)
        .not_valid_before(root.not_valid_before_utc)
        .not_valid_after(root.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(
            x509.KeyUsage(**{name: name == usage for name in names}), critical=True
        )
    )
    return (
        builder.sign(signing_key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()
    )


def test_twin_of_the_root_with_its_key_but_not_its_signature(platform):
    pki, stranger = platform.pki, SimPlatform.create().pki
    twin = issued(
        platform,
        pki.root.certificate.public_key(),
        stranger.root.key,
        subject=pki.root.certificate.subject,
        ca=True,
        usage="crl_sign",
    )
    fields = changed(platform)
    fields["tcb_info_issuer_chain"] = pki.tcb_signer.pem + twin
    got = failed(examined(platform, json.dumps(fields)))
    assert got["collateral_signature"] == "tcb_info_issuer_chain: wrong signature"


@pytest.mark.parametrize(
    ("ca", "usage"), [(True, "digital_signature"), (False, "key_agreement")]
)
def test_signer_whose_certificate_is_for_other_uses(platform, ca, usage):
    signer = platform.pki.tcb_signer
    odd = issued(
        platform,
        signer.certificate.public_key(),
        platform.pki.root.key,
        subject=signer.certificate.subject,
        ca=ca,
        usage=usage,
    )
    fields = changed(platform)
    fields["tcb_info_issuer_chain"] = odd + platform.pki.root.pem
    got = failed(examined(platform, json.dumps(fields)))
    assert list(got) == ["collateral_signature"]
    assert "is for other uses" in got["collateral_signature"]


@pytest.mark.parametrize("name", ["tcb_signer", "pck_ca"])
def test_revoked_signer(platform, name):
    got = failed(examined(platform, platform.collateral_json(NOW, revoked=(name,))))
    shown = {"tcb_signer": "Intel SGX TCB Signing", "pck_ca": "tdx-sim PCK Platform CA"}
    assert got == {"collateral_revocation": f"revoked: {shown[name]}"}


def test_certificates_outside_their_time(platform):
    text = platform.collateral_json(NOW)
    got = failed(examined(platform, text, now_s=90 * 365 * DAY))
    assert "is not valid now" in got["collateral_signature"]


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"issued_s": NOW + 1}, "tcb_info issued 2026"),
        ({"pck_crl_issued_s": NOW + 1}, "pck_crl issued 2026"),
        ({"root_crl_issued_s": NOW + 1}, "root_ca_crl issued 2026"),
        ({"next_update_s": NOW}, "qe_identity expired 2026"),
    ],
)
def test_dates(platform, state, named):
    """Gap 10: dcap-qvl lets a CRL of the future pass."""
    got = failed(examined(platform, platform.collateral_json(NOW, **state)))
    assert list(got) == ["collateral_dates"]
    assert named in got["collateral_dates"]


def test_age_counts_where_the_config_says_so(platform):
    text = platform.collateral_json(NOW, pck_crl_issued_s=NOW - 8 * DAY)
    assert examined(platform, text).ok
    assert examined(platform, text, rules=SetRules(max_age_s=8 * DAY)).ok
    got = failed(examined(platform, text, rules=SetRules(max_age_s=7 * DAY)))
    assert got == {"collateral_age": "pck_crl 691200 s"}


def test_root_crl_may_be_old(platform):
    text = platform.collateral_json(NOW, root_crl_issued_s=NOW - 300 * DAY)
    assert examined(platform, text, rules=SetRules(max_age_s=DAY)).ok


# --- floors -------------------------------------------------------------------


def floors_of(platform, **state):
    prepared = prepare(platform.collateral_json(NOW, **state))
    return floor_values(prepared, trust(platform).key_sha384, "platform")


def test_names_of_floors(platform):
    root = trust(platform).key_sha384[:16]
    assert floors_of(platform) == {
        f"tcb-evaluation/{root}/{platform.fmspc}": 20,
        f"qe-evaluation/{root}": 20,
        f"pck-crl/{root}/platform": 1,
        f"root-crl/{root}": 1,
        f"pck-crl-time/{root}/platform": NOW - 3600,
        f"root-crl-time/{root}": NOW - 3600,
    }


@pytest.mark.parametrize(
    ("high", "said"),
    [
        ({"eval_data_number": 21, "qe_eval_data_number": 20}, "tcb-evaluation 20"),
        ({"qe_eval_data_number": 21}, "qe-evaluation 20"),
        ({"pck_crl_number": 2}, "pck-crl 1"),
        ({"root_crl_number": 2}, "root-crl 1"),
    ],
)
def test_one_below_a_floor_is_below(platform, high, said):
    floors = floors_of(platform, **high)
    text = platform.collateral_json(NOW)
    assert examined(platform, text, floors=floors_of(platform)).ok
    got = failed(examined(platform, text, floors=floors))
    assert got == {"collateral_floor": said}


@pytest.mark.parametrize("name", ["pck_crl_issued_s", "root_crl_issued_s"])
def test_crl_may_be_older_by_the_slack_only(platform, name):
    floors = floors_of(platform)
    just = platform.collateral_json(NOW, **{name: NOW - 3600 - 7 * DAY})
    assert examined(platform, just, floors=floors).ok
    older = platform.collateral_json(NOW, **{name: NOW - 3601 - 7 * DAY})
    got = failed(examined(platform, older, floors=floors))
    assert list(got) == ["collateral_floor"]
    assert "-crl-time 2026" in got["collateral_floor"]
    none = SetRules(crl_rollback_s=0)
    assert not examined(platform, just, floors=floors, rules=none).ok


def test_floors_of_another_root_do_not_count(platform):
    stranger = SimPlatform.create()
    floors = floors_of(stranger, eval_data_number=99, pck_crl_number=99)
    assert examined(platform, platform.collateral_json(NOW), floors=floors).ok


@needs_vectors
def test_intels_own_history_never_falls_below_its_floors():
    """All recorded sets in the order of their issue: each is good when it is newest.

    One was recorded with last year's root CRL in the hour in which others had the new one.
    """
    root = trust_of(intel_root())
    floors: dict[str, int] = {}
    sets = [
        prepare(path.read_text())
        for path in (VECTORS / "collateral").glob("*.json")
        if not path.name.startswith("nonprod")
    ]
    in_order = sorted(sets, key=lambda one: (one.issued_s, one.issued["root_ca_crl"]))
    for one in in_order:
        got = examine(
            one,
            trust=root,
            fmspc=one.fmspc,
            ca="platform",
            now_s=one.issued_s,
            rules=SetRules(),
            floors=floors,
        )
        assert failed(got) == {}
        for name, value in floor_values(one, root.key_sha384, "platform").items():
            floors[name] = max(value, floors.get(name, 0))
    oldest = in_order[0]
    again = examine(
        oldest,
        trust=root,
        fmspc=oldest.fmspc,
        ca="platform",
        now_s=oldest.issued_s,
        rules=SetRules(),
        floors=floors,
    )
    assert list(failed(again)) == ["collateral_floor"]
