"""Evidence that must not open a volume: over real gRPC, with quotes that dcap-qvl judges."""

from __future__ import annotations

import dataclasses
import os

import pytest

from tdxd.core.bundle import KeyBundle
from tdxd.core.quote import td_attributes_bytes
from tdxd.errors import DeniedError, KeyReleaseError, Retry, TdxdError
from tests.keyserver import Guest, Owner, Platform, opened_owner, policy_text


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


async def denied(owner: Owner, reason: str, tsm: Guest | None = None) -> TdxdError:
    """Fetch volume `v`; assert the class, the message and the audit record."""
    got = (await owner.fetch("v", tsm=tsm))["v"]
    record = owner.last()
    assert isinstance(got, DeniedError)
    assert got.retry is Retry.SLOW
    assert got.message == (
        f"key server denies volume 'v': {reason} (denial {record.denial_id})"
    )
    assert got.hint
    assert (record.decision, record.reason, record.volume_id) == ("denied", reason, "v")
    assert record.generation == 0
    return got


async def test_the_right_td_gets_the_right_bundle(owner):
    bundle = owner.add("v")
    got = (await owner.fetch("v"))["v"]
    assert isinstance(got, KeyBundle)
    assert got.manifest == bundle.manifest
    assert got.secret.matches(bundle.secret)
    record = owner.last()
    assert (record.decision, record.generation, record.reason) == ("released", 1, "")
    assert record.simulated
    assert record.denial_id is None
    assert all(check.ok for check in record.checks)


async def test_quote_of_another_td_with_one_other_rtmr(owner):
    owner.add("v")
    rtmrs = list(owner.platform.report().rtmrs)
    rtmrs[2] = bytes(48)
    await denied(owner, "measurements", Guest(owner.platform, rtmrs=tuple(rtmrs)))
    expected, actual = owner.failed().pop("rtmr2")
    assert expected == owner.platform.report().rtmrs[2].hex() + " (test-image)"
    assert actual == bytes(48).hex()
    assert list(owner.failed()) == ["rtmr2", "event_log_replay"]


async def test_every_mismatch_is_listed(owner):
    owner.add("v")
    guest = Guest(
        owner.platform,
        mr_td=b"\1" * 48,
        rtmrs=(b"\2" * 48,) * 4,
        mr_config_id=b"\3" * 48,
        mr_owner=b"\4" * 48,
    )
    await denied(owner, "measurements", guest)
    rtmrs = [f"rtmr{index}" for index in range(3)]  # rtmr3: as its log leads to it
    assert list(owner.failed()) == [
        "mr_td",
        *rtmrs,
        "mr_config_id",
        "mr_owner",
        "event_log_replay",
        "runtime_log",
    ]


async def test_debug_td(owner):
    owner.add("v")
    bits = td_attributes_bytes(["SEPT_VE_DISABLE", "DEBUG"])
    await denied(owner, "quote", Guest(owner.platform, td_attributes=bits))
    assert "Debug mode is enabled" in owner.failed()["quote"][1]
    assert owner.failed()["td_attributes"] == (
        "SEPT_VE_DISABLE",
        "DEBUG SEPT_VE_DISABLE",
    )


@pytest.mark.parametrize("name", ["PERFMON", "PKS", "KL", "LASS", "TPA", "ICSSD"])
async def test_attribute_that_dcap_qvl_lets_pass(owner, name):
    owner.add("v")
    bits = td_attributes_bytes(["SEPT_VE_DISABLE", name])
    await denied(owner, "td-attributes", Guest(owner.platform, td_attributes=bits))
    assert list(owner.failed()) == ["td_attributes"]


async def test_quote_with_other_report_data(owner):
    owner.add("v")
    other = os.urandom(64)
    await denied(owner, "report-data", Guest(owner.platform, report_data=other))
    assert owner.failed()["report_data"][1] == other.hex()


async def test_quote_under_another_root(owner):
    owner.add("v")
    stranger = Platform.create()
    await denied(owner, "root", Guest(stranger))
    assert "tdx-sim Root CA" in owner.failed()["root"][1]


async def test_quote_that_borrows_the_trusted_root_certificate(owner):
    owner.add("v")
    stranger = Platform.create()
    chain = stranger.pki.pck.pem + stranger.pki.pck_ca.pem + owner.platform.pki.root.pem
    await denied(owner, "quote", Guest(stranger, pck_chain_pem=chain))


async def test_quote_with_a_forged_signature(owner):
    owner.add("v")
    stranger = Platform.create()
    key = stranger.pki.attestation
    shape = {"attestation_key": key, "qe_report_data": bytes(64)}
    await denied(owner, "quote", Guest(owner.platform, **shape))


async def test_tcb_info_signed_by_a_pck_key(owner):
    owner.add("v")
    owner.platform.state = {"signer": "pck"}
    await denied(owner, "collateral-signer")
    assert owner.failed()["tcb_info_signer"] == (
        "Intel SGX TCB Signing",
        "tdx-sim PCK Certificate",
    )
    assert owner.failed()["quote"][1] == "not tried"


async def test_tcb_info_signed_by_a_pck_key_hidden_by_a_pem_label(owner):
    """dcap-qvl reads PEM blocks of any label, so it would take the hidden PCK as the signer."""
    owner.add("v")
    pki = owner.platform.pki
    hidden = pki.pck.pem.replace("CERTIFICATE", "FOO") + pki.pck_ca.pem
    chain = hidden + pki.tcb_signer.pem + pki.root.pem

    def mangle(collateral):
        return dataclasses.replace(
            collateral, tcb_info_issuer_chain=chain, qe_identity_issuer_chain=chain
        )

    owner.platform.state = {"signer": "pck"}
    owner.platform.mangle = mangle
    await denied(owner, "collateral-signer")

    chain = pki.pck.pem.replace("CERTIFICATE", "FOO") + pki.tcb_chain_pem
    owner.offset_s = 2 * 86400  # past the refresh interval: the new chain is fetched
    await denied(owner, "collateral-signature")
    assert all(one.ok for one in owner.last().checks if one.name.endswith("_signer"))
    assert owner.failed()["quote"][1] == "not tried"


async def test_out_of_date_tcb(owner):
    owner.add("v")
    owner.platform.state = {
        "tcb_status": "OutOfDate",
        "advisory_ids": ("INTEL-SA-01192",),
    }
    await denied(owner, "tcb-status")
    assert owner.failed() == {"tcb_status": ("UpToDate", "OutOfDate")}
    advisories = next(one for one in owner.last().checks if one.name == "advisories")
    assert advisories.actual == "INTEL-SA-01192"


async def test_out_of_date_tcb_passes_where_the_policy_says_so(owner):
    owner.add("v", tcb_status='["UpToDate", "OutOfDate"]')
    owner.platform.state = {"tcb_status": "OutOfDate"}
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)


async def test_revoked_pck(owner):
    owner.add("v")
    owner.platform.state = {"revoked": ("pck",)}
    await denied(owner, "quote")
    assert "evoked" in owner.failed()["quote"][1]


@pytest.mark.parametrize("shape", [{"version": 3}, {"tee_type": 0}])
async def test_sgx_quote(owner, shape):
    owner.add("v")
    await denied(owner, "quote-format", Guest(owner.platform, **shape))
    assert "TDX" in owner.failed()["quote_format"][0]


async def test_quote_with_trailing_bytes(owner):
    owner.add("v")

    class Trailing(Guest):
        def quote(self, report_data):
            return super().quote(report_data) + b"\0\0x"

    await denied(owner, "quote-format", Trailing(owner.platform))


async def test_zero_padding_is_no_trailing_byte(owner):
    owner.add("v")

    class Padded(Guest):
        def quote(self, report_data):
            return super().quote(report_data).ljust(8192, b"\0")

    got = (await owner.fetch("v", tsm=Padded(owner.platform)))["v"]
    assert isinstance(got, KeyBundle)


async def test_policy_absent(owner):
    owner.add("v", policy=None)
    await denied(owner, "no-policy")


async def test_unknown_volume(owner):
    owner.add("other")
    await denied(owner, "unknown-volume")


async def test_platform_that_is_not_on_the_list(owner):
    owner.add("v", platforms=f'["{"ab" * 16}"]')
    await denied(owner, "platform")
    assert owner.failed() == {
        "platform": ("ab" * 16, owner.platform.pki.identity.ppid.hex())
    }


async def test_platform_on_the_list(owner):
    owner.add("v", platforms=f'["{owner.platform.pki.identity.ppid.hex()}"]')
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)


async def test_simulated_platform_where_the_policy_does_not_say_simulated(owner):
    owner.add("v", simulated="")
    await denied(owner, "simulated")
    assert owner.failed() == {"simulated": ("no", "yes")}


async def test_collateral_unreachable_is_no_denial_by_policy(owner):
    owner.add("v")
    owner.platform.state = {"fmspc": b"\0" * 6, "next_update_s": 1}
    got = (await owner.fetch("v"))["v"]
    assert type(got) is KeyReleaseError
    assert got.retry is Retry.BACKOFF
    assert "collateral-unavailable" in got.message
    assert owner.last().reason == "collateral-unavailable"


async def test_verdicts_are_per_volume(owner):
    owner.add("a")
    owner.add("b", simulated="false")
    got = await owner.fetch("b", "a", "c")
    assert isinstance(got["a"], KeyBundle)
    assert isinstance(got["b"], DeniedError)
    assert isinstance(got["c"], DeniedError)
    reasons = [record.reason for record in owner.store.audit()]
    assert reasons == ["", "simulated", "unknown-volume"]


async def test_quota_counts_releases_of_the_last_hour(owner):
    text = policy_text(owner.platform, release="[release]\nmax_per_hour = 2\n")
    owner.add("v", policy=text)
    for _ in range(2):
        assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
    got = (await owner.fetch("v"))["v"]
    assert type(got) is KeyReleaseError
    assert owner.last().reason == "quota"
    owner.offset_s = 3601
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)


async def test_a_mended_policy_is_seen_at_once(owner):
    owner.add("v", simulated="false")
    await denied(owner, "simulated")
    owner.add("v", 2)
    got = (await owner.fetch("v"))["v"]
    assert isinstance(got, KeyBundle)
    assert got.manifest.generation == 2
    assert owner.last().policy_version == 2
