"""What is fuzzed: each parser of bytes that a guest, a host or another program chose.

A target takes bytes and may raise one kind of error, nothing else. Where bytes are accepted and
the format is canonical, encoding the result must give the same bytes again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Callable

from tdxd.core import (
    ccel,
    endpoint_proof,
    event_meaning,
    eventlog,
    keyrelease,
    qgs,
    quote,
    runtime_log,
    td_report,
    wire,
)
from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.config import parse_config
from tdxd.core.foreign import (
    ForeignManifest,
    PassphraseBundle,
)
from tdxd.core.luks2 import read_header
from tdxd.core.named_secret import (
    NamedSecret,
    SecretManifest,
    parse_released_bundle,
    parse_released_manifest,
)
from tdxd.core.policy import parse_policy
from tdxd.core.secret import Secret
from tdxd.errors import (
    ConfigError,
    DataError,
    EvidenceError,
    EvidenceMalformedError,
    RemoteProtocolError,
)
from tdxd.guest.answer import parse_answer, parse_challenge
from tdxd.owner.collateral.bundle import encode_bundle, parse_bundle
from tests.fuzz import luks2_headers, manifests

__all__ = ["TARGETS", "Target"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A parser to fuzz, inputs to start from, and how many runs are within `make test`."""

    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    runs: int = 200_000


def _quote(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        quote.parse_quote(data)


def _event_log(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        events = eventlog.parse_event_log(data)
        eventlog.replay(events)
        for event in events:
            assert event_meaning.describe(event).isprintable()


def _runtime_log(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        events = runtime_log.parse_runtime_log(data)
        assert runtime_log.encode_runtime_log(events) == data
        for event in events:
            runtime_log.read_volume_event(event)


def _endpoint_evidence(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        evidence = endpoint_proof.parse_endpoint_evidence(data, source="fuzz")
        assert evidence.encode() == data
    with contextlib.suppress(DataError):
        assert len(endpoint_proof.key_digest_of_der(data)) == 32
    nonce = endpoint_proof.nonce_of_target(data.decode("latin-1"))
    if nonce is not None:
        assert endpoint_proof.evidence_target(nonce).encode() == data


def _qgs_frames(data: bytes) -> None:
    with contextlib.suppress(EvidenceError):
        qgs.parse_quote_response(data)
    with contextlib.suppress(EvidenceError):
        qgs.parse_quote_request(data)


def _td_report(data: bytes) -> None:
    with contextlib.suppress(EvidenceMalformedError):
        td_report.parse_td_report(data)
    with contextlib.suppress(EvidenceMalformedError):
        ccel.parse_ccel_table(data)


def _collateral_bundle(data: bytes) -> None:
    with contextlib.suppress(DataError):
        parse_bundle(data, source="fuzz")


def _control_frame(data: bytes) -> None:
    reader = wire.FrameReader()
    with contextlib.suppress(RemoteProtocolError):
        for message in reader.feed(data):
            wire.parse_request(message)


_TOKEN_KEY = bytes(range(32))


def _token(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        claims = keyrelease.decode_token(data, keys=[_TOKEN_KEY])
        assert keyrelease.encode_token(claims, key=_TOKEN_KEY, iv=data[8:20]) == data


def _policy(data: bytes) -> None:
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        parse_policy(data.decode())


def _config(data: bytes) -> None:
    with contextlib.suppress(ConfigError, UnicodeDecodeError):
        parse_config([("tdxd.toml", data.decode())])


def _manifest(data: bytes) -> None:
    with contextlib.suppress(DataError):
        assert parse_released_manifest(data).encode() == data


def _bundle(data: bytes) -> None:
    with contextlib.suppress(DataError):
        assert parse_released_bundle(data).encode() == data


def _answer(data: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        parse_answer(data)
    with contextlib.suppress(RemoteProtocolError):
        parse_challenge(data)


def _luks2(data: bytes) -> None:
    with contextlib.suppress(DataError):
        read_header(data, source="fuzz")


def _quote_seed(version: int, kind: int, size: int) -> bytes:
    head = struct.pack("<HHI", version, 2, 0x81) + bytes(40)
    if version == 5:
        head += struct.pack("<HI", kind, size)
    return head + bytes(size) + struct.pack("<I", 200) + bytes(200)


_EVENTS = tuple(
    eventlog.Event(rtmr=rtmr, type=kind, digest=bytes([rtmr + 1] * 48), data=b"data")
    for rtmr, kind in ((0, 4), (1, 0x80000001), (2, 13), (3, 0x08000001))
)
_MANIFEST = Manifest(
    volume_id="digits",
    generation=1,
    payload_offset_bytes=16 << 20,
    data_blocks=10,
    hash_blocks=1,
    root_hash=bytes(32),
    salt=bytes(32),
)
_FOREIGN = ForeignManifest(volume_id="digits", generation=1, header_sha256=bytes(32))
_NAMED = SecretManifest(volume_id="digits", generation=1, content="file")
_CLAIMS = keyrelease.TokenClaims(nonce=bytes(32), expiry_s=1, deployment=bytes(16))
_EVIDENCE = endpoint_proof.EndpointEvidence(
    key_sha256=bytes(32), quote=b"q", event_log=b"", runtime_log=b"r"
)
_POLICY = b"""
[tdx]
mrtd = ["%s"]
rtmr = [{ name = "a", rtmr0 = "%s", rtmr1 = "%s", rtmr2 = "%s", rtmr3 = "%s" }]
td_attributes = ["SEPT_VE_DISABLE"]
tcb_status = ["UpToDate"]
platforms = "any"
[release]
max_per_hour = 1
""" % ((b"00" * 48,) * 5)
_CONFIG = b"""
[key_release]
servers = ["a:1"]
ca = "/ca"
signing_key = "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
[[volume]]
id = "a"
image = "/a*.img"
"""

TARGETS = {
    "quote": Target(
        run=_quote,
        seeds=(
            _quote_seed(4, 0, 584),
            _quote_seed(5, 2, 584),
            _quote_seed(5, 3, 648),
            _quote_seed(5, 4, 885),
        ),
    ),
    "event_log": Target(run=_event_log, seeds=(eventlog.encode_event_log(_EVENTS),)),
    "runtime_log": Target(
        run=_runtime_log,
        seeds=(runtime_log.encode_runtime_log([runtime_log.volume_event(_MANIFEST)]),),
    ),
    "endpoint_evidence": Target(
        run=_endpoint_evidence,
        seeds=(_EVIDENCE.encode(), endpoint_proof.evidence_target(bytes(32)).encode()),
        runs=50_000,
    ),
    "qgs": Target(
        run=_qgs_frames,
        seeds=(
            qgs.quote_request(bytes(td_report.TD_REPORT_BYTES)),
            qgs.quote_response(bytes(600)),
            qgs.quote_response(b"", error=0x12001),
        ),
    ),
    "td_report": Target(
        run=_td_report,
        seeds=(b"\x81" + bytes(td_report.TD_REPORT_BYTES - 1), b"CCEL\x38" + bytes(51)),
    ),
    "collateral_bundle": Target(run=_collateral_bundle, seeds=(encode_bundle(()),)),
    "control_frame": Target(
        run=_control_frame, seeds=(wire.encode_frame(wire.request("status", {"a": 1})),)
    ),
    "token": Target(
        run=_token,
        seeds=(keyrelease.encode_token(_CLAIMS, key=_TOKEN_KEY, iv=bytes(12)),),
    ),
    "policy": Target(run=_policy, seeds=(_POLICY,)),
    "config": Target(run=_config, seeds=(_CONFIG,)),
    "manifest": Target(
        run=_manifest,
        seeds=(_MANIFEST.encode(), _FOREIGN.encode(), _NAMED.encode()),
    ),
    "bundle": Target(
        run=_bundle,
        seeds=(
            KeyBundle(manifest=_MANIFEST, secret=Secret(bytes(64))).encode(),
            PassphraseBundle(manifest=_FOREIGN, secret=Secret(b"x")).encode(),
            NamedSecret(manifest=_NAMED, secret=Secret(b"x")).encode(),
        ),
        runs=50_000,
    ),
    "forged_manifest": Target(
        run=manifests.read_forged, seeds=manifests.SEEDS, runs=5_000
    ),
    "answer": Target(run=_answer, seeds=(b"\x12\x01\0", b"\n\x03\n\x01a\x12\x01\0")),
    "luks2_headers": Target(
        run=luks2_headers.read_forged, seeds=luks2_headers.SEEDS, runs=10_000
    ),
    "luks2": Target(run=_luks2, seeds=(b"LUKS\xba\xbe\0\x02" + bytes(16376),)),
}
"""By name, as `python -m tests.fuzz NAME` takes it."""
