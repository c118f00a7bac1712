"""Attacks on a client that wants its endpoint proved, before it sends anything."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tdxd.cli.endpoint_appraise import Verdict, judge_endpoint
from tdxd.core.endpoint_proof import (
    EndpointEvidence,
    endpoint_report_data,
    key_digest_of_pem,
)
from tdxd.core.policy import parse_policy
from tdxd.errors import UnavailableError
from tdxd.owner.appraisal.appraise import TrustedRoot, load_root
from tdxd.sim.platform import SimPlatform
from tdxd.user.attested import Proof, fetch_proof
from tdxd.user.endpoint import Endpoint, call_error, open_channel
from tests.certificates import self_signed
from tests.endpoint import Middleman, ProvingGuest, proving_guest
from tests.fakes import make_bundle
from tests.judged import policy_of

pytestmark = pytest.mark.root

PREDICT = "/tensorflow.serving.PredictionService/Predict"
VOLUME = make_bundle("m").manifest


class Client:
    """Somebody who demands the guest of one platform, and the volume `m` in it."""

    def __init__(self, platform: SimPlatform) -> None:
        self.platform = platform  # enrolled before anything is served
        self.policy_text = policy_of(platform)
        digest = VOLUME.digest().hex()
        self.policy_text += f'[runtime]\nexpect = ["m:{digest}"]\n'
        self.root: TrustedRoot = load_root(
            platform.root_der, simulated=True, source="root"
        )

    def judge(self, proof: Proof) -> Verdict:
        now_s = int(time.time())
        return judge_endpoint(
            proof,
            parse_policy(self.policy_text),
            self.root,
            lambda _pck: self.platform.collateral_json(now_s),
            now_s,
        )

    def failed(self, proof: Proof) -> dict[str, str]:
        verdict = self.judge(proof)
        assert not verdict.accepted
        assert verdict.volumes == ()
        return {one.name: one.actual for one in verdict.checks if not one.ok}


@pytest.fixture(scope="module")
def platform() -> SimPlatform:
    return SimPlatform.create()


@pytest.fixture(scope="module")
def guest(platform: SimPlatform, client: Client) -> Iterator[ProvingGuest]:
    with proving_guest(platform) as running:
        running.serve_volume(VOLUME)
        yield running


@pytest.fixture(scope="module")
def client(platform: SimPlatform) -> Client:
    return Client(platform)


def booted_anew(platform: SimPlatform) -> SimPlatform:
    """The same machine and image, with RTMR3 as the boot leaves it."""
    return SimPlatform(platform.pki, platform.description)


def endpoint(address: str, **changes: Any) -> Endpoint:
    fields: dict[str, Any] = {"ca_pem": None, "timeout_s": 20.0, **changes}
    return Endpoint(address=address, **fields)


def attested(proof: Proof, address: str) -> Endpoint:
    return endpoint(address, ca_pem=proof.certificate_pem, attested=True)


def send(to: Endpoint, data: bytes) -> bytes:
    with open_channel(to) as channel:
        call: Any = channel.unary_unary(PREDICT, None, None)
        answer: bytes = call(data, timeout=20)
        return answer


def refused(to: Endpoint) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        send(to, b"secret question")
    error = call_error(caught.value, to)
    return error.code, error.message


# --- what should be ------------------------------------------------------------


def test_a_genuine_guest_is_believed_and_asked(
    guest: ProvingGuest, client: Client
) -> None:
    proof = fetch_proof(endpoint(guest.address))
    verdict = client.judge(proof)
    assert verdict.accepted, [one for one in verdict.checks if not one.ok]
    assert [(one.volume_id, one.generation) for one in verdict.volumes] == [("m", 1)]
    assert proof.key_sha256 == key_digest_of_pem(guest.served)
    assert send(attested(proof, guest.address), b"question") == b"question"


def test_a_front_that_lets_nobody_ask(client: Client) -> None:
    """Without `attest = true` it is as any front: no proof, so nothing is sent."""
    with proving_guest(booted_anew(client.platform)) as closed:
        closed.attest = False
        closed.rotate(closed.served)
        with pytest.raises(UnavailableError, match="method not allowed") as caught:
            fetch_proof(endpoint(closed.address))
    assert "attest = true" in caught.value.hint


# --- attacks -------------------------------------------------------------------


def test_certificate_of_a_man_in_the_middle_with_a_genuine_quote(
    guest: ProvingGuest, client: Client
) -> None:
    """He passes the question on and the answer back: the quote binds the guest's own key."""
    forged, _public = self_signed("localhost")
    with Middleman(forged, guest.address) as middle:
        proof = fetch_proof(endpoint(middle.address))
    assert proof.key_sha256 == key_digest_of_pem(forged)
    assert set(client.failed(proof)) == {"certificate", "endpoint_proof"}


def test_a_man_in_the_middle_who_claims_that_the_quote_is_for_his_key(
    guest: ProvingGuest, client: Client
) -> None:
    forged, _public = self_signed("localhost")
    with Middleman(forged, guest.address) as middle:
        proof = fetch_proof(endpoint(middle.address))
    claimed = dataclasses.replace(proof.evidence, key_sha256=proof.key_sha256)
    lie = dataclasses.replace(proof, evidence=claimed)
    assert set(client.failed(lie)) == {"endpoint_proof"}


def test_the_guests_certificate_shown_without_its_key(guest: ProvingGuest) -> None:
    """What is public of the certificate is not enough for TLS."""
    ours, _public = self_signed("localhost")
    _key, _, certificate = guest.served.partition(b"-----BEGIN CERTIFICATE-----")
    key, _, _certificate = ours.partition(b"-----BEGIN CERTIFICATE-----")
    with pytest.raises(OSError, match=r"(?i)values mismatch"):
        Middleman(key + b"-----BEGIN CERTIFICATE-----" + certificate, guest.address)


def test_nothing_is_sent_to_who_takes_the_place_of_an_attested_guest(
    guest: ProvingGuest,
) -> None:
    """The channel's only root is the attested certificate, also for one of the same name."""
    proof = fetch_proof(endpoint(guest.address))
    forged, _public = self_signed("localhost")
    with Middleman(forged, guest.address) as middle:
        code, message = refused(attested(proof, middle.address))
        assert middle.heard == []
    assert code == "not-attested"
    assert "is not the one that was attested" in message


@pytest.mark.parametrize("change", ["renew", "rotate"])
def test_rotated_certificate(client: Client, change: str) -> None:
    """Between the proof and the first request it fails closed; asked again, it is believed.

    The same whether the front takes the certificate while it runs or is another one.
    """
    with proving_guest(booted_anew(client.platform)) as own:
        own.serve_volume(VOLUME)
        before = fetch_proof(endpoint(own.address))
        assert client.judge(before).accepted
        renewed, _public = self_signed("localhost")
        getattr(own, change)(renewed)
        assert refused(attested(before, own.address))[0] == "not-attested"
        assert own.model.heard == []
        again = fetch_proof(endpoint(own.address))
        assert again.key_sha256 == key_digest_of_pem(renewed) != before.key_sha256
        assert client.judge(again).accepted
        assert send(attested(again, own.address), b"now") == b"now"


def test_old_evidence_for_a_rotated_certificate(
    guest: ProvingGuest, client: Client
) -> None:
    """A key that leaked and was replaced: evidence of before names it, and is stale."""
    old, _public = self_signed("localhost")
    proof = fetch_proof(endpoint(guest.address))
    fields: dict[str, Any] = {
        "nonce": os.urandom(32),  # of the client to whom it was given, then
        "key_sha256": key_digest_of_pem(old),
        "event_log": proof.evidence.event_log,
        "runtime_log": proof.evidence.runtime_log,
    }
    quote = guest.tsm.quote(endpoint_report_data(**fields))
    kept = EndpointEvidence(
        quote=quote, **{k: v for k, v in fields.items() if k != "nonce"}
    )
    with Middleman(old, guest.address, lambda _sent: http(kept.encode())) as middle:
        stale = fetch_proof(endpoint(middle.address))
    assert set(client.failed(stale)) == {"endpoint_proof"}


def test_replayed_nonce(guest: ProvingGuest, client: Client) -> None:
    """Evidence that was recorded for one question answers no other."""
    forged = guest.served  # even with the guest's own key
    with Middleman(forged, guest.address) as middle:
        first = fetch_proof(endpoint(middle.address))
        recorded = middle.answers[0]
    assert client.judge(first).accepted
    with Middleman(forged, guest.address, lambda _sent: recorded) as middle:
        second = fetch_proof(endpoint(middle.address))
    assert second.evidence == first.evidence
    assert second.nonce != first.nonce
    assert set(client.failed(second)) == {"endpoint_proof"}


def test_relay_of_another_guests_quote(guest: ProvingGuest, client: Client) -> None:
    """A genuine guest, but of another image, proves its own endpoint: it is another guest."""
    elsewhere = booted_anew(client.platform)
    elsewhere.extend_rtmr(2, b"\1" * 48)
    with proving_guest(elsewhere) as other:
        other.serve_volume(VOLUME)
        proof = fetch_proof(endpoint(other.address))
        assert "rtmr2" in " ".join(client.failed(proof))
        # ... and what the right guest says to the same question does not make it another one.
        right = fetch_proof(endpoint(guest.address))
        mixed = dataclasses.replace(proof, evidence=right.evidence)
        assert set(client.failed(mixed)) == {"certificate", "endpoint_proof"}


def test_quote_of_another_platform(client: Client) -> None:
    """A platform of the attacker's own making signs whatever it likes."""
    with proving_guest(SimPlatform.create()) as other:
        other.serve_volume(VOLUME)
        assert set(client.failed(fetch_proof(endpoint(other.address)))) == {"root"}


def test_quote_of_a_key_release(guest: ProvingGuest, client: Client) -> None:
    """Another purpose, another label: what a guest signs for a key server proves no endpoint."""
    from tdxd.core import keyrelease

    proof = fetch_proof(endpoint(guest.address))
    quote = guest.tsm.quote(
        keyrelease.report_data(
            token=proof.nonce,
            public_key=proof.key_sha256,
            volume_ids=(),
            signing_key_sha256=proof.key_sha256,
            event_log=proof.evidence.event_log,
            runtime_log=proof.evidence.runtime_log,
        )
    )
    evidence = dataclasses.replace(proof.evidence, quote=quote)
    lie = dataclasses.replace(proof, evidence=evidence)
    assert set(client.failed(lie)) == {"endpoint_proof"}


def test_quote_of_the_right_guest_without_the_volume(client: Client) -> None:
    """The right image on the right machine, but nothing, or something else, is served."""
    with proving_guest(booted_anew(client.platform)) as other:
        failed = client.failed(fetch_proof(endpoint(other.address)))
        assert failed == {"runtime_volume": "volumes none"}
        other.serve_volume(make_bundle("n").manifest)
        failed = client.failed(fetch_proof(endpoint(other.address)))
        assert failed == {"runtime_volume": "volumes n"}
        other.serve_volume(VOLUME)
        assert client.judge(fetch_proof(endpoint(other.address))).accepted
        other.serve_volume(make_bundle("m", 2).manifest)
        failed = client.failed(fetch_proof(endpoint(other.address)))
        assert set(failed) == {"runtime_volume"}


def test_a_runtime_log_with_a_volume_that_the_quote_does_not_show(
    guest: ProvingGuest, client: Client
) -> None:
    proof = fetch_proof(endpoint(guest.address))
    for log in (b"", proof.evidence.runtime_log + b"\0"):
        evidence = dataclasses.replace(proof.evidence, runtime_log=log)
        lie = dataclasses.replace(proof, evidence=evidence)
        assert "endpoint_proof" in client.failed(lie)


@pytest.mark.parametrize("at", [0, 48 + 520, 48 + 520 + 63, 700, -200])
def test_a_quote_altered_on_its_way(
    guest: ProvingGuest, client: Client, at: int
) -> None:
    proof = fetch_proof(endpoint(guest.address))
    quote = bytearray(proof.evidence.quote)
    quote[at] ^= 1
    evidence = dataclasses.replace(proof.evidence, quote=bytes(quote))
    assert client.failed(dataclasses.replace(proof, evidence=evidence))


def http(body: bytes) -> bytes:
    kind = "Content-Type: application/msgpack"
    head = f"HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
