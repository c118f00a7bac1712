"""The collateral says what a test sets, and dcap-qvl believes it under its root and in time."""

from __future__ import annotations

import json

import dcap_qvl
import pytest
from cryptography import x509

from tdxd.sim.pki import TCB_SIGNER_NAME
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA, NOW, claims, verify

DAY_S = 86400


@pytest.fixture(scope="module")
def platform() -> SimPlatform:
    return SimPlatform.create()


@pytest.mark.parametrize(
    "status",
    [
        "UpToDate",
        "SWHardeningNeeded",
        "ConfigurationNeeded",
        "ConfigurationAndSWHardeningNeeded",
        "OutOfDate",
        "OutOfDateConfigurationNeeded",
    ],
)
def test_the_status_is_the_one_set(platform: SimPlatform, status: str) -> None:
    collateral = platform.collateral_json(NOW, tcb_status=status)
    assert verify(platform.quote(DATA), collateral, platform.root_der) == status


def test_a_revoked_tcb_is_refused(platform: SimPlatform) -> None:
    collateral = platform.collateral_json(NOW, tcb_status="Revoked")
    with pytest.raises(ValueError, match="Revoked"):
        verify(platform.quote(DATA), collateral, platform.root_der)


@pytest.mark.parametrize("part", ["tcb_status", "module_status", "qe_status"])
def test_the_worst_part_decides(platform: SimPlatform, part: str) -> None:
    collateral = platform.collateral_json(NOW, **{part: "OutOfDate"})
    with pytest.raises(ValueError, match="OutOfDate"):
        claims(platform.quote(DATA), collateral, platform.root_der)


def test_advisories_and_numbers_arrive(platform: SimPlatform) -> None:
    collateral = platform.collateral_json(
        NOW,
        advisory_ids=("INTEL-SA-01192",),
        eval_data_number=17,
        pck_crl_number=5,
        root_crl_number=6,
    )
    found = claims(platform.quote(DATA), collateral, platform.root_der)
    assert found["tcb"]["advisory_ids"] == ["INTEL-SA-01192"]
    assert found["tcb"]["eval_data_number"] == 17
    assert found["platform"]["pck_crl_num"] == 5
    assert found["platform"]["root_ca_crl_num"] == 6


def test_collateral_is_good_for_30_days(platform: SimPlatform) -> None:
    quote, root = platform.quote(DATA), platform.root_der
    collateral = platform.collateral_json(NOW, issued_s=NOW)
    verify(quote, collateral, root, NOW + 30 * DAY_S - 1)
    with pytest.raises(ValueError, match=r"(?i)expired"):
        verify(quote, collateral, root, NOW + 30 * DAY_S)


def test_collateral_of_the_future_is_refused(platform: SimPlatform) -> None:
    collateral = platform.collateral_json(NOW, issued_s=NOW + 60)
    with pytest.raises(ValueError):
        verify(platform.quote(DATA), collateral, platform.root_der)


@pytest.mark.parametrize("who", ["pck", "pck_ca", "tcb_signer"])
def test_a_revoked_certificate_is_refused(platform: SimPlatform, who: str) -> None:
    collateral = platform.collateral_json(NOW, revoked=(who,))
    with pytest.raises(ValueError, match="CertRevoked"):
        verify(platform.quote(DATA), collateral, platform.root_der)


def test_collateral_of_another_family_is_refused(platform: SimPlatform) -> None:
    collateral = platform.collateral_json(NOW, fmspc=bytes(6))
    with pytest.raises(ValueError, match="Fmspc"):
        verify(platform.quote(DATA), collateral, platform.root_der)


def test_the_forged_signer_differs_by_its_name_alone(platform: SimPlatform) -> None:
    """dcap-qvl takes a PCK key as signer of TCB info; the name is what tells them apart."""

    def signer(collateral: str) -> str:
        pem = json.loads(collateral)["tcb_info_issuer_chain"]
        first = x509.load_pem_x509_certificates(pem.encode())[0]
        return str(first.subject.rfc4514_string())

    honest = platform.collateral_json(NOW)
    forged = platform.collateral_json(NOW, signer="pck")
    assert TCB_SIGNER_NAME in signer(honest)
    assert TCB_SIGNER_NAME not in signer(forged)
    assert verify(platform.quote(DATA), forged, platform.root_der) == "UpToDate"


def test_changed_tcb_info_is_refused(platform: SimPlatform) -> None:
    parts = json.loads(platform.collateral_json(NOW, tcb_status="OutOfDate"))
    parts["tcb_info"] = parts["tcb_info"].replace("OutOfDate", "UpToDate")
    with pytest.raises(ValueError, match=r"(?i)signature"):
        verify(platform.quote(DATA), json.dumps(parts), platform.root_der)


def test_the_fmspc_is_the_one_in_the_quote(platform: SimPlatform) -> None:
    assert dcap_qvl.parse_quote(platform.quote(DATA)).fmspc() == platform.fmspc
