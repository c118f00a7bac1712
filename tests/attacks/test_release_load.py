"""Hostile evidence that costs the key server: time, memory, its audit log, or questions to Intel.

Whoever reaches the port gets a token, and may send a quote that is no quote, with logs of any
content that its report data binds. None of it may end the call without a decision.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import time

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tdxd.core import event_rules
from tdxd.core.decode import encode_canonical
from tdxd.core.eventlog import Event, encode_event_log
from tdxd.core.runtime_log import (
    VOLUME_EVENT,
    RuntimeEvent,
    encode_runtime_log,
    parse_runtime_log,
)
from tdxd.owner.appraisal.judge import Finding, judge_volume
from tdxd.sim.pki import Signer, _certificate
from tdxd.sim.platform import SimPlatform
from tests.judged import Court

VOLUMES = 16
CPU_MAX_S = 0.4
"""For that many volumes; each case took seconds before there was a bound."""
RECORD_MAX_BYTES = 20_000
SIGNATURE_AT = 48 + 584 + 4


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


@pytest.fixture
def court(tmp_path, platform):
    return Court(tmp_path, platform)


def invented_pck(court: Court, fmspc: bytes, name: str = "pck") -> Signer:
    """A PCK of an invented family, signed by nobody that counts."""
    keys = {
        one: ec.generate_private_key(ec.SECP256R1()) for one in ("root", "pck_ca", name)
    }
    identity = dataclasses.replace(court.platform.pki.identity, fmspc=fmspc)
    return Signer(key=keys[name], certificate=_certificate(name, keys, identity))


def asked(court: Court) -> list[tuple[str, str]]:
    """Note what the server asks for from now on."""
    questions: list[tuple[str, str]] = []
    original = court.collateral

    def fetch(fmspc: str, ca: str) -> str:
        questions.append((fmspc, ca))
        return original().to_json()

    _, cache = court.judge._roots[court.root.key_sha384]
    cache._fetch = fetch
    return questions


# --- an invented family of platforms --------------------------------------------


def test_an_invented_fmspc_makes_the_server_ask_nobody(court):
    """The leaf is the attacker's; CA and root are Intel's own, which everybody has."""
    pki, questions = court.platform.pki, asked(court)
    leaf = invented_pck(court, b"\xaa" * 6)
    for chain in (
        leaf.pem + pki.pck_ca.pem + pki.root.pem,
        leaf.pem + pki.root.pem,
        leaf.pem + leaf.pem + pki.pck_ca.pem + pki.root.pem,
        pki.pck.pem + invented_pck(court, b"", "pck_ca").pem + pki.root.pem,
    ):
        shape = {"pck_chain_pem": chain, "pck_key": leaf.key}
        assert set(court.failed(**shape)) == {"pck_chain"}
        assert court.reason(**shape) == "quote"
    assert questions == []
    assert court.failed() == {}
    assert [fmspc for fmspc, _ in questions] == [
        court.platform.pki.identity.fmspc.hex().upper()
    ]


def test_a_root_with_intels_key_that_nobody_signed_is_refused(court):
    """Its name would stand in the audit log."""
    pki, questions = court.platform.pki, asked(court)
    der = bytearray(pki.root.der)
    at = der.rindex(b"tdx-sim")
    der[at : at + 7] = b"\x1b[2Jxyz"
    body = base64.encodebytes(bytes(der)).decode()
    root = f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
    failed = court.failed(pck_chain_pem=pki.pck.pem + pki.pck_ca.pem + root)
    assert set(failed) == {"pck_chain"}
    assert "\x1b" not in str(failed)
    assert questions == []


def test_the_fmspc_is_that_of_the_certificate_that_was_verified(court):
    """dcap-qvl reads PEM blocks of any label: one of FOO must not name the family."""
    pki, questions = court.platform.pki, asked(court)
    hidden = invented_pck(court, b"\xaa" * 6).pem.replace("CERTIFICATE", "FOO")
    assert set(court.failed(pck_chain_pem=hidden + pki.pck_chain_pem)) == {"quote"}
    assert "AAAAAAAAAAAA" not in {fmspc for fmspc, _ in questions}


def test_no_name_in_a_certificate_ends_the_call_without_a_decision(court):
    """A common name of type BIT STRING is a TypeError of `cryptography`."""
    pki = court.platform.pki
    der = bytearray(pki.pck.der)
    at = der.index(bytes.fromhex("0603550403")) + 5
    for kind in range(256):
        der[at] = kind
        body = base64.encodebytes(bytes(der)).decode()
        leaf = f"-----BEGIN CERTIFICATE-----\n{body}-----END CERTIFICATE-----\n"
        chain = leaf + pki.pck_ca.pem + pki.root.pem
        good = bytes(der) == pki.pck.der
        assert bool(court.reason(pck_chain_pem=chain)) is not good, kind


# --- logs -------------------------------------------------------------------------


def unsigned(court: Court):
    """What needs no TD at all: a quote with the right report data and a wrong signature."""

    def make(data: bytes) -> bytes:
        quote = bytearray(court.platform.quote(data))
        quote[SIGNATURE_AT] ^= 1
        return bytes(quote)

    return make


def events(count: int, rtmr: int, size: int) -> bytes:
    return encode_event_log(
        [
            Event(rtmr=rtmr, type=0xD, digest=os.urandom(48), data=b"x" * size)
            for _ in range(count)
        ]
    )


def volume_events() -> bytes:
    fields = {"volume_id": "a", "generation": 1, "manifest_sha256": bytes(32)}
    event = RuntimeEvent(name=VOLUME_EVENT, payload=encode_canonical(fields))
    return encode_runtime_log([event] * 2500)


HOSTILE = {
    "name-of-250000": (b"", msgpack.packb([["n" * 250_000, b""]])),
    "name-of-escapes": (b"", msgpack.packb([["\x1b" * 250_000, b""]])),
    "volume-events": (b"", volume_events()),
    "other-events": (
        b"",
        encode_runtime_log([RuntimeEvent(name="a", payload=b"")] * 4096),
    ),
    "mrtd-events": (events(4000, -1, 170), b""),
    "huge-ipl": (events(1, 0, 900_000), b""),
    "many-events": (events(3000, 0, 0), b""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_logs_cost_little_for_many_volumes(court, case):
    """The record of each volume holds every check, and is written before the answer."""
    assert court.failed() == {}
    court.event_log, court.runtime_log = HOSTILE[case]
    judgement = court.judgement(unsigned(court))
    finding = Finding(known=True, policy=court.policy)
    began_s = time.thread_time()
    tables = [
        judge_volume("v", judgement, finding, lambda *_: True) for _ in range(VOLUMES)
    ]
    assert time.thread_time() - began_s < CPU_MAX_S
    for table in tables:
        assert not all(check.ok for check in table)
        record = json.dumps([dataclasses.asdict(check) for check in table])
        assert len(record) < RECORD_MAX_BYTES


def test_a_runtime_log_is_read_once_for_all_volumes(court, monkeypatch):
    reads = []

    def parse(log: bytes) -> tuple[RuntimeEvent, ...]:
        reads.append(log)
        return parse_runtime_log(log)

    monkeypatch.setattr(event_rules, "parse_runtime_log", parse)
    court.runtime_log = encode_runtime_log(
        [RuntimeEvent(name=f"once-{os.urandom(4).hex()}", payload=b"")]
    )
    judgement = court.judgement(unsigned(court))
    finding = Finding(known=True, policy=court.policy)
    for _ in range(VOLUMES):
        judge_volume("v", judgement, finding)
    assert len(reads) == 1


def test_a_volume_event_is_looked_up_once_however_often_it_stands_there(court):
    court.runtime_log = volume_events()
    judgement = court.judgement(unsigned(court))
    finding = Finding(known=True, policy=court.policy)
    looked_up = []

    def known(*one: object) -> bool:
        looked_up.append(one)
        return True

    table = judge_volume("v", judgement, finding, known)
    assert len(looked_up) == 1
    line = next(check for check in table if check.name == "runtime_events")
    assert line.actual == "2500 events"
