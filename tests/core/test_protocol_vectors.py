"""The vectors of docs/protocol-vectors.json, computed twice.

Once by the product, and once from the text of docs/protocol.md alone, with nothing of the product:
what another implementation would do. The document's tables are compared with the code, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import (
    X25519PrivateKey,
    X25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tdxd.core import endpoint_proof, hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.check import Check
from tdxd.core.config_trust import config_digest
from tdxd.core.eventlog import Event, encode_event_log, parse_event_log, replay
from tdxd.core.foreign import PassphraseBundle, parse_any_bundle, parse_any_manifest
from tdxd.core.named_secret import NamedSecret, parse_released_bundle
from tdxd.core.runtime_log import (
    RuntimeEvent,
    encode_runtime_log,
    parse_runtime_log,
    read_volume_event,
    replay_runtime,
    volume_event,
)
from tdxd.core.secret import Secret
from tdxd.errors import DataError, RemoteProtocolError
from tdxd.owner.appraisal import judge
from tdxd.owner.audit.checkpoint import Checkpoint, read_checkpoint
from tdxd.owner.audit.record import (
    AuditRecord,
    chain_hash,
    encode_record,
    parse_record,
)
from tdxd.owner.server.token_keys import wrap_token_key
from tdxd.owner.store import kek
from tdxd.owner.store.key import StoreKey
from tdxd.owner.store.rows import GenerationRow, PolicyRow, TokenKeyRow, row_mac
from tdxd.owner.store.seal import Seal
from tdxd.owner.store.state import State
from tdxd.proto import keyrelease_pb2

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "protocol.md").read_text(encoding="utf-8")
VECTORS: dict[str, Any] = json.loads((DOCS / "protocol-vectors.json").read_bytes())

TOKEN = VECTORS["token"]
EVENT_LOG = VECTORS["event_log"]
VOLUME = VECTORS["volume_event"]
RUNTIME = VECTORS["runtime_log"]
REPORT = VECTORS["report_data"]
HPKE = VECTORS["hpke"]
REQUEST = VECTORS["request"]
RELEASED = VECTORS["released"]
WINDOW = VECTORS["released_window"]
FOREIGN = VECTORS["released_luks2"]
NAMED = VECTORS["released_secret"]
ANSWER = VECTORS["answer"]
CONFIG = VECTORS["config_digest"]
ENDPOINT = VECTORS["endpoint"]
KEK = VECTORS["kek"]
TOKEN_KEY = VECTORS["token_key"]
STORE = VECTORS["store"]
FOREIGN_ROW = VECTORS["store_luks2"]
AUDIT = VECTORS["audit"]
CHECKPOINT = VECTORS["checkpoint"]


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


# --- from the text: nothing below comes from the product until the next heading ------------------


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def lp(data: bytes) -> bytes:
    return u32(len(data)) + data


def pack(value: Any) -> bytes:
    """Canonical msgpack: the shortest form of each value, keys of maps in bytewise order."""
    if value is None:
        return b"\xc0"
    if isinstance(value, bool):
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return _pack_number(value)
    if isinstance(value, bytes):
        return _head(len(value), (0xC4, 0xC5, 0xC6)) + value
    if isinstance(value, str):
        data = value.encode()
        if len(data) < 32:
            return bytes([0xA0 | len(data)]) + data
        return _head(len(data), (0xD9, 0xDA, 0xDB)) + data
    if isinstance(value, list):
        head = bytes([0x90 | len(value)]) if len(value) < 16 else b"\xdc"
        tail = b"" if len(value) < 16 else struct.pack(">H", len(value))
        return head + tail + b"".join(map(pack, value))
    assert isinstance(value, dict)
    pairs = sorted((key.encode(), key, one) for key, one in value.items())
    head = bytes([0x80 | len(pairs)]) if len(pairs) < 16 else b"\xde"
    tail = b"" if len(pairs) < 16 else struct.pack(">H", len(pairs))
    return head + tail + b"".join(pack(key) + pack(one) for _, key, one in pairs)


def _pack_number(value: int) -> bytes:
    assert value >= 0
    if value < 0x80:
        return bytes([value])
    for code, form, limit in (
        (0xCC, ">B", 2**8),
        (0xCD, ">H", 2**16),
        (0xCE, ">I", 2**32),
    ):
        if value < limit:
            return bytes([code]) + struct.pack(form, value)
    return b"\xcf" + u64(value)


def _head(size: int, codes: tuple[int, int, int]) -> bytes:
    if size < 2**8:
        return bytes([codes[0], size])
    if size < 2**16:
        return bytes([codes[1]]) + struct.pack(">H", size)
    return bytes([codes[2]]) + u32(size)


def proto_field(number: int, data: bytes) -> bytes:
    size, length = len(data), b""
    while size >= 0x80:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def extract(salt: bytes, key: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), key, "sha256")


def expand(key: bytes, info: bytes, size: int) -> bytes:
    made, block, counter = b"", b"", 1
    while len(made) < size:
        block = hmac.digest(key, block + info + bytes([counter]), "sha256")
        made, counter = made + block, counter + 1
    return made[:size]


def hpke_open(seed: bytes, info: bytes, sealed: bytes) -> bytes:
    """Open by RFC 9180, base mode, one message, with an empty AAD."""
    mlkem = MLKEM768PrivateKey.from_seed_bytes(seed[:64])
    x25519 = X25519PrivateKey.from_private_bytes(seed[64:])
    mlkem_part, share, box = sealed[:1088], sealed[1088:1120], sealed[1120:]
    shared = hashlib.sha3_256(
        mlkem.decapsulate(mlkem_part)
        + x25519.exchange(X25519PublicKey.from_public_bytes(share))
        + share
        + x25519.public_key().public_bytes_raw()
        + rb"\.//^\ "[:-1]
    ).digest()
    suite = b"HPKE\x64\x7a\x00\x01\x00\x02"

    def labelled_extract(salt: bytes, label: bytes, key: bytes) -> bytes:
        return extract(salt, b"HPKE-v1" + suite + label + key)

    def labelled_expand(key: bytes, label: bytes, about: bytes, size: int) -> bytes:
        head = struct.pack(">H", size) + b"HPKE-v1" + suite + label
        return expand(key, head + about, size)

    context = b"\0" + labelled_extract(b"", b"psk_id_hash", b"")
    context += labelled_extract(b"", b"info_hash", info)
    secret = labelled_extract(shared, b"secret", b"")
    key = labelled_expand(secret, b"key", context, 32)
    nonce = labelled_expand(secret, b"base_nonce", context, 12)
    return AESGCM(key).decrypt(nonce, box, b"")


def test_text_token() -> None:
    label = lp(b"tdxd/token/v1")
    key = raw(TOKEN["key"])
    key_id = hashlib.sha256(label + key).digest()[:8]
    plain = raw(TOKEN["nonce"]) + u64(TOKEN["expiry_s"]) + raw(TOKEN["deployment"])
    box = AESGCM(key).encrypt(raw(TOKEN["iv"]), plain, label + key_id)
    assert key_id == raw(TOKEN["key_id"])
    assert key_id + raw(TOKEN["iv"]) + box == raw(TOKEN["token"])
    assert len(raw(TOKEN["token"])) == 92


def test_text_event_log() -> None:
    """Build the log of its events, and replay them: EV_NO_ACTION and MR index 0 extend nothing."""
    spec = struct.pack("<16sI4BI", b"Spec ID Event03\0", 0, 0, 2, 0, 2, 1)
    spec += struct.pack("<HHB", 0x0C, 48, 0)
    log = struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec
    registers = [bytes(48)] * 5
    for one in EVENT_LOG["events"]:
        digest, data = raw(one["digest"]), raw(one["data"])
        log += struct.pack("<IIIH", one["mr_index"], one["type"], 1, 0x0C) + digest
        log += struct.pack("<I", len(data)) + data
        if one["type"] != 3 and one["mr_index"]:
            index = one["mr_index"]
            registers[index] = hashlib.sha384(registers[index] + digest).digest()
    found = raw(EVENT_LOG["log"])
    assert found.startswith(log)
    assert set(found[len(log) :]) == {0xFF}
    for number in range(4):
        assert registers[number + 1] == raw(EVENT_LOG[f"rtmr{number}"]), number


def runtime_digest(name: str, payload: bytes) -> bytes:
    head = struct.pack("<I", 0x08000001) + b":" + name.encode() + b":"
    return hashlib.sha384(head + payload).digest()


def test_text_volume_event() -> None:
    manifest = raw(VOLUME["manifest"])
    payload = pack(
        {
            "generation": VOLUME["generation"],
            "manifest_sha256": hashlib.sha256(manifest).digest(),
            "volume_id": VOLUME["volume_id"],
        }
    )
    assert hashlib.sha256(manifest).digest() == raw(VOLUME["manifest_sha256"])
    assert payload == raw(VOLUME["payload"])
    assert VOLUME["name"] == "tdxd/volume"
    assert runtime_digest("tdxd/volume", payload) == raw(VOLUME["digest"])


def test_text_runtime_log() -> None:
    register = raw(RUNTIME["rtmr3_before"])
    for one in RUNTIME["events"]:
        digest = runtime_digest(one["name"], raw(one["payload"]))
        assert digest == raw(one["digest"])
        register = hashlib.sha384(register + digest).digest()
    pairs = [[one["name"], raw(one["payload"])] for one in RUNTIME["events"]]
    assert register == raw(RUNTIME["rtmr3_after"])
    assert pack(pairs) == raw(RUNTIME["log"])


def test_text_report_data() -> None:
    key_id = hashlib.sha256(raw(REPORT["signing_key"])).digest()
    events = hashlib.sha384(raw(EVENT_LOG["log"])).digest()
    runtime = hashlib.sha384(raw(RUNTIME["log"])).digest()
    ids = [one.encode() for one in REPORT["volume_ids"]]
    wanted = hashlib.sha512(
        lp(b"tdxd/key-release/v1")
        + lp(raw(TOKEN["token"]))
        + lp(raw(HPKE["public_key"]))
        + u32(len(ids))
        + b"".join(map(lp, ids))
        + lp(key_id)
        + lp(events)
        + lp(runtime)
    ).digest()
    assert key_id == raw(REPORT["signing_key_sha256"])
    assert events == raw(REPORT["event_log_sha384"])
    assert runtime == raw(REPORT["runtime_log_sha384"])
    assert wanted == raw(REPORT["report_data"])


def test_text_request() -> None:
    request = (
        proto_field(1, raw(TOKEN["token"]))
        + proto_field(2, raw(HPKE["public_key"]))
        + b"".join(proto_field(3, one.encode()) for one in REPORT["volume_ids"])
        + proto_field(4, raw(REQUEST["quote"]))
        + proto_field(5, raw(EVENT_LOG["log"]))
        + proto_field(6, raw(RUNTIME["log"]))
    )
    assert request == raw(REQUEST["request"])
    assert hashlib.sha384(request).digest() == raw(REQUEST["request_sha384"])


def public_key_of(seed: bytes) -> bytes:
    mlkem = MLKEM768PrivateKey.from_seed_bytes(seed[:64]).public_key()
    x25519 = X25519PrivateKey.from_private_bytes(seed[64:]).public_key()
    return mlkem.public_bytes_raw() + x25519.public_bytes_raw()


def test_text_hpke() -> None:
    """The ciphertext was made once: sealing draws randomness."""
    seed, info = raw(HPKE["seed"]), raw(HPKE["info"])
    wanted = raw(REQUEST["request_sha384"])
    wanted += lp(HPKE["volume_id"].encode()) + u64(HPKE["generation"])
    assert public_key_of(seed) == raw(HPKE["public_key"])
    assert info == wanted
    assert hpke_open(seed, info, raw(HPKE["sealed"])) == raw(HPKE["plaintext"])
    with pytest.raises(InvalidTag):
        hpke_open(seed, info + b"\0", raw(HPKE["sealed"]))


@pytest.mark.parametrize("share", VECTORS["refused_x25519"])
def test_text_refused_points(share: str) -> None:
    """Not canonical, or of low order: then the shared secret is zero whatever the key is."""
    if int.from_bytes(raw(share), "little") >= 2**255 - 19:
        return
    point = X25519PublicKey.from_public_bytes(raw(share))
    with pytest.raises(ValueError, match="shared key"):
        X25519PrivateKey.from_private_bytes(raw(HPKE["seed"])[64:]).exchange(point)


def test_text_released() -> None:
    fields = {"bundle": raw(RELEASED["bundle"]), "lease_s": RELEASED["lease_s"]}
    assert pack(fields) == raw(RELEASED["plaintext"]) == raw(HPKE["plaintext"])


def test_text_released_window() -> None:
    fields = {
        "bundle": raw(WINDOW["bundle"]),
        "lease_s": WINDOW["lease_s"],
        "older": [raw(one) for one in WINDOW["older"]],
    }
    assert pack(fields) == raw(WINDOW["plaintext"])


def foreign_manifest(header_sha256: bytes) -> bytes:
    return pack(
        {
            "kind": "luks2",
            "format": 1,
            "volume_id": FOREIGN["volume_id"],
            "generation": FOREIGN["generation"],
            "fs": "ext4",
            "header_sha256": header_sha256,
        }
    )


def test_text_released_luks2() -> None:
    manifest = foreign_manifest(raw(FOREIGN["header_sha256"]))
    bundle = pack({"manifest": manifest, "secret": raw(FOREIGN["passphrase"])})
    assert manifest == raw(FOREIGN["manifest"])
    assert foreign_manifest(b"") == raw(FOREIGN["manifest_of_any_header"])
    assert bundle == raw(FOREIGN["bundle"])
    released = {"bundle": bundle, "lease_s": FOREIGN["lease_s"]}
    assert pack(released) == raw(FOREIGN["plaintext"])
    digest = hashlib.sha256(manifest).digest()
    payload = pack(
        {
            "generation": FOREIGN["generation"],
            "manifest_sha256": digest,
            "volume_id": FOREIGN["volume_id"],
        }
    )
    assert digest == raw(FOREIGN["manifest_sha256"])
    assert payload == raw(FOREIGN["event_payload"])
    assert runtime_digest("tdxd/volume", payload) == raw(FOREIGN["event_digest"])


def test_text_released_secret() -> None:
    manifest = pack(
        {
            "content": NAMED["content"],
            "format": 1,
            "generation": NAMED["generation"],
            "kind": "secret",
            "volume_id": NAMED["secret_id"],
        }
    )
    bundle = pack({"manifest": manifest, "secret": raw(NAMED["data"])})
    assert manifest == raw(NAMED["manifest"])
    assert hashlib.sha256(manifest).digest() == raw(NAMED["manifest_sha256"])
    assert bundle == raw(NAMED["bundle"])
    released = {"bundle": bundle, "lease_s": NAMED["lease_s"]}
    assert pack(released) == raw(NAMED["plaintext"])


def test_text_answer() -> None:
    signed = lp(b"tdxd/key-release-answer/v1") + raw(ANSWER["request_sha384"])
    for one in ANSWER["verdicts"]:
        signed += lp(one["volume_id"].encode()) + u64(one["generation"])
        signed += bytes([one["status"]]) + lp(raw(one["sealed_bundle"]))
    key = Ed25519PrivateKey.from_private_bytes(raw(ANSWER["signing_seed"]))
    assert key.public_key().public_bytes_raw() == raw(ANSWER["signing_key"])
    assert signed == raw(ANSWER["signed"])
    assert key.sign(signed) == raw(ANSWER["signature"])


def test_text_config_digest() -> None:
    files = CONFIG["files"]
    data = lp(b"tdxd/config/v1") + u32(len(files))
    for one in files:
        data += lp(one["name"].encode()) + lp(one["content"].encode())
    assert hashlib.sha384(data).digest() == raw(CONFIG["mr_config_id"])


def test_text_endpoint() -> None:
    key = hashlib.sha256(raw(ENDPOINT["public_key_info"])).digest()
    events, runtime = raw(EVENT_LOG["log"]), raw(RUNTIME["log"])
    wanted = hashlib.sha512(
        lp(b"tdxd/endpoint/v1")
        + lp(raw(ENDPOINT["nonce"]))
        + lp(key)
        + lp(hashlib.sha384(events).digest())
        + lp(hashlib.sha384(runtime).digest())
    ).digest()
    answer = {
        "format": 1,
        "key_sha256": key,
        "quote": raw(REQUEST["quote"]),
        "event_log": events,
        "runtime_log": runtime,
    }
    path = "/.well-known/tdxd/evidence?nonce="
    assert ENDPOINT["target"] == path + ENDPOINT["nonce"]
    assert raw(ENDPOINT["public_key_info"]) in raw(ENDPOINT["certificate"])
    assert key == raw(ENDPOINT["key_sha256"])
    assert wanted == raw(ENDPOINT["report_data"])
    assert pack(answer) == raw(ENDPOINT["answer"])


def test_text_kek() -> None:
    seed = raw(KEK["seed"])
    info = lp(b"tdxd/kek/v1") + lp(KEK["volume_id"].encode()) + u64(KEK["generation"])
    assert info == raw(KEK["info"])
    assert public_key_of(seed) == raw(KEK["public_key"])
    assert hpke_open(seed, info, raw(KEK["wrapped"])) == raw(KEK["bundle"])


def test_text_token_key() -> None:
    info = lp(b"tdxd/token-key/v1") + lp(raw(TOKEN["key_id"]))
    info += u64(TOKEN_KEY["made_at_s"])
    assert info == raw(TOKEN_KEY["info"])
    opened = hpke_open(raw(KEK["seed"]), info, raw(TOKEN_KEY["wrapped"]))
    assert opened == raw(TOKEN_KEY["key"]) == raw(TOKEN["key"])


def row_bytes(kind: str, row: dict[str, Any]) -> bytes:
    """Bytes columns are given in hex, but for the one whose column is hex itself."""
    data = lp(kind.encode())
    for name, value in row.items():
        if name == "mac":
            continue
        if isinstance(value, int):
            data += lp(u64(value))
        elif name in {"wrapped", "key_id", "head", "state_sha256", "manifest"}:
            data += lp(raw(value))
        else:
            data += lp(value.encode())
    return data


def test_text_store() -> None:
    seed = raw(STORE["kek_seed"])
    key = expand(extract(b"", seed), b"tdxd/store-mac/v1", 32)
    assert key == raw(STORE["mac_key"])
    for kind, name in (
        ("policy", "policy"),
        ("generation", "generation"),
        ("token-key", "token_key"),
        ("seal", "seal"),
    ):
        mac = hmac.digest(key, row_bytes(kind, STORE[name]), "sha256")
        assert mac == raw(STORE[name]["mac"]), kind
    policy, generation = STORE["policy"], STORE["generation"]
    state = pack(
        {
            "floors": STORE["floors"],
            "generations": {
                generation["volume_id"]: [
                    [generation["generation"], raw(generation["mac"]), True]
                ]
            },
            "policies": {policy["volume_id"]: [policy["version"], raw(policy["mac"])]},
            "token_keys": {
                STORE["token_key"]["key_id"]: raw(STORE["token_key"]["mac"])
            },
        }
    )
    assert state == raw(STORE["state"])
    assert hashlib.sha256(state).hexdigest() == STORE["seal"]["state_sha256"]


def test_text_store_luks2() -> None:
    seed, row = raw(FOREIGN_ROW["kek_seed"]), FOREIGN_ROW["generation"]
    key = expand(extract(b"", seed), b"tdxd/store-mac/v1", 32)
    mac = hmac.digest(key, row_bytes("generation", row), "sha256")
    assert mac == raw(row["mac"])
    assert row["manifest"] == FOREIGN["manifest"]
    info = lp(b"tdxd/kek/v1") + lp(row["volume_id"].encode()) + u64(row["generation"])
    bundle = hpke_open(seed, info, raw(row["wrapped"]))
    assert bundle == raw(FOREIGN_ROW["bundle"]) == raw(FOREIGN["bundle"])


def test_text_audit() -> None:
    head = raw(AUDIT["genesis"])
    assert head == bytes(32)
    for one in AUDIT["records"]:
        record = pack(one["fields"])
        head = hashlib.sha256(lp(b"tdxd/audit/v1") + head + lp(record)).digest()
        assert record == raw(one["record"])
        assert head == raw(one["hash"])
    assert head == raw(STORE["seal"]["head"])


def test_text_checkpoint() -> None:
    seal = STORE["seal"]
    body = pack(
        {
            "deployment": raw(CHECKPOINT["deployment"]),
            "floors": STORE["floors"],
            "head": raw(seal["head"]),
            "made_at_s": CHECKPOINT["made_at_s"],
            "revision": seal["revision"],
            "seq": seal["seq"],
            "state_sha256": raw(seal["state_sha256"]),
            "version": 1,
            "volumes": {"resnet": {"generation": 3, "policy_version": 3}},
        }
    )
    message = lp(b"tdxd/checkpoint/v1") + lp(body)
    key = Ed25519PrivateKey.from_private_bytes(raw(CHECKPOINT["signing_seed"]))
    public = key.public_key().public_bytes_raw()
    assert body == raw(CHECKPOINT["body"])
    assert key.sign(message) == raw(CHECKPOINT["signature"])
    Ed25519PublicKey.from_public_bytes(raw(CHECKPOINT["key"])).verify(
        raw(CHECKPOINT["signature"]), message
    )
    whole = {"body": body, "key": public, "signature": key.sign(message)}
    assert pack(whole) == raw(CHECKPOINT["checkpoint"])


# --- by the product ------------------------------------------------------------------------------


def test_product_token() -> None:
    key, token = raw(TOKEN["key"]), raw(TOKEN["token"])
    claims = protocol.TokenClaims(
        nonce=raw(TOKEN["nonce"]),
        expiry_s=TOKEN["expiry_s"],
        deployment=raw(TOKEN["deployment"]),
    )
    assert protocol.encode_token(claims, key=key, iv=raw(TOKEN["iv"])) == token
    assert protocol.decode_token(token, keys=[key]) == claims


def test_product_event_log() -> None:
    events = tuple(
        Event(
            rtmr=one["mr_index"] - 1,
            type=one["type"],
            digest=raw(one["digest"]),
            data=raw(one["data"]),
        )
        for one in EVENT_LOG["events"]
    )
    log = raw(EVENT_LOG["log"])
    assert parse_event_log(log) == events
    assert encode_event_log(events, size_bytes=len(log)) == log
    assert replay(events) == tuple(raw(EVENT_LOG[f"rtmr{n}"]) for n in range(4))


def test_product_volume_event_and_runtime_log() -> None:
    manifest = Manifest.parse(raw(VOLUME["manifest"]))
    event = volume_event(manifest)
    assert (event.name, event.payload) == (VOLUME["name"], raw(VOLUME["payload"]))
    assert event.digest() == raw(VOLUME["digest"])
    served = read_volume_event(event)
    assert served is not None
    assert served.manifest_sha256 == raw(VOLUME["manifest_sha256"])
    events = tuple(
        RuntimeEvent(name=one["name"], payload=raw(one["payload"]))
        for one in RUNTIME["events"]
    )
    assert encode_runtime_log(events) == raw(RUNTIME["log"])
    assert parse_runtime_log(raw(RUNTIME["log"])) == events
    after = replay_runtime(raw(RUNTIME["rtmr3_before"]), events)
    assert after == raw(RUNTIME["rtmr3_after"])


def test_product_report_data_and_request() -> None:
    request = raw(REQUEST["request"])
    message = keyrelease_pb2.ReleaseRequest.FromString(request)
    evidence = protocol.Evidence(
        token=message.token,
        public_key=message.public_key,
        volume_ids=tuple(message.volume_ids),
        quote=message.quote,
        event_log=message.event_log,
        runtime_log=message.runtime_log,
    )
    protocol.check_evidence(evidence)
    report_data = protocol.report_data(
        token=evidence.token,
        public_key=evidence.public_key,
        volume_ids=evidence.volume_ids,
        signing_key_sha256=protocol.signing_key_id(raw(REPORT["signing_key"])),
        event_log=evidence.event_log,
        runtime_log=evidence.runtime_log,
    )
    assert report_data == raw(REPORT["report_data"])
    assert evidence.event_log == raw(EVENT_LOG["log"])
    assert evidence.runtime_log == raw(RUNTIME["log"])
    assert message.SerializeToString() == request
    assert protocol.transcript_hash(request) == raw(REQUEST["request_sha384"])


def test_product_hpke_and_released() -> None:
    pair = hpke.key_pair(Secret(raw(HPKE["seed"])))
    digest, generation = raw(REQUEST["request_sha384"]), HPKE["generation"]
    info = protocol.sealed_info(digest, HPKE["volume_id"], generation)
    plain = hpke.open_sealed(
        raw(HPKE["sealed"]), pair.private, info, error=DataError, what="it"
    )
    released = protocol.parse_released(plain, error=DataError)
    assert pair.public == raw(HPKE["public_key"])
    assert plain == raw(HPKE["plaintext"])
    assert protocol.encode_released(released.bundle, released.lease_s) == plain
    assert released.lease_s == RELEASED["lease_s"]
    bundle = KeyBundle.parse(released.bundle)
    assert bundle.manifest.encode() == raw(VOLUME["manifest"])
    assert bundle.encode() == raw(RELEASED["bundle"])


def test_product_released_window() -> None:
    plain = raw(WINDOW["plaintext"])
    released = protocol.parse_released(plain, error=DataError)
    older = [raw(one) for one in WINDOW["older"]]
    assert released.older == tuple(older)
    assert protocol.encode_released(released.bundle, released.lease_s, older) == plain
    bundles = [KeyBundle.parse(one) for one in (released.bundle, *released.older)]
    assert [one.manifest.generation for one in bundles] == [3, 2, 1]
    assert {one.manifest.volume_id for one in bundles} == {"resnet"}


def test_product_released_luks2() -> None:
    plain = raw(FOREIGN["plaintext"])
    released = protocol.parse_released(plain, error=DataError)
    assert protocol.encode_released(released.bundle, released.lease_s) == plain
    bundle = parse_any_bundle(released.bundle)
    assert isinstance(bundle, PassphraseBundle)
    assert bundle.secret.reveal() == raw(FOREIGN["passphrase"])
    assert bundle.manifest.header_sha256 == raw(FOREIGN["header_sha256"])
    assert bundle.encode() == raw(FOREIGN["bundle"])
    event = volume_event(bundle.manifest)
    assert event.payload == raw(FOREIGN["event_payload"])
    assert event.digest() == raw(FOREIGN["event_digest"])
    anybody = parse_any_manifest(raw(FOREIGN["manifest_of_any_header"]))
    assert anybody == dataclasses.replace(bundle.manifest, header_sha256=b"")


def test_product_released_secret() -> None:
    plain = raw(NAMED["plaintext"])
    released = protocol.parse_released(plain, error=DataError)
    assert protocol.encode_released(released.bundle, released.lease_s) == plain
    bundle = parse_released_bundle(released.bundle)
    assert isinstance(bundle, NamedSecret)
    assert bundle.secret.reveal() == raw(NAMED["data"])
    assert bundle.manifest.content == NAMED["content"]
    assert bundle.manifest.digest() == raw(NAMED["manifest_sha256"])
    assert bundle.encode() == raw(NAMED["bundle"])


@pytest.mark.parametrize("share", VECTORS["refused_x25519"])
def test_product_refuses_the_points(share: str) -> None:
    mlkem = raw(HPKE["public_key"])[:1184]
    with pytest.raises(RemoteProtocolError, match="X25519"):
        hpke.parse_public_key(mlkem + raw(share))


def test_product_answer() -> None:
    digest = raw(ANSWER["request_sha384"])
    verdicts = [
        protocol.VerdictFields(
            volume_id=one["volume_id"],
            generation=one["generation"],
            status=one["status"],
            sealed_bundle=raw(one["sealed_bundle"]),
        )
        for one in ANSWER["verdicts"]
    ]
    key = Ed25519PrivateKey.from_private_bytes(raw(ANSWER["signing_seed"]))
    signature = raw(ANSWER["signature"])
    assert protocol.answer_bytes(digest, verdicts) == raw(ANSWER["signed"])
    assert protocol.sign_answer(key, digest, verdicts) == signature
    pin = raw(ANSWER["signing_key"])
    assert protocol.signed_by([pin], signature, digest, verdicts) == pin


def test_product_config_digest() -> None:
    files = [(one["name"], one["content"].encode()) for one in CONFIG["files"]]
    assert config_digest(files) == raw(CONFIG["mr_config_id"])


def test_product_endpoint() -> None:
    nonce = endpoint_proof.nonce_of_target(ENDPOINT["target"])
    assert nonce == raw(ENDPOINT["nonce"])
    evidence = endpoint_proof.parse_endpoint_evidence(
        raw(ENDPOINT["answer"]), source="vector"
    )
    key_sha256 = endpoint_proof.key_digest_of_der(raw(ENDPOINT["certificate"]))
    assert key_sha256 == evidence.key_sha256 == raw(ENDPOINT["key_sha256"])
    report_data = endpoint_proof.endpoint_report_data(
        nonce=nonce,
        key_sha256=key_sha256,
        event_log=evidence.event_log,
        runtime_log=evidence.runtime_log,
    )
    assert report_data == raw(ENDPOINT["report_data"])
    assert evidence.encode() == raw(ENDPOINT["answer"])


def test_product_kek_and_token_key(tmp_path: Path) -> None:
    kek.create_kek(tmp_path, Secret(raw(KEK["seed"])))
    pair = kek.read_kek(tmp_path / "kek.private")
    wrapped, volume_id = raw(KEK["wrapped"]), KEK["volume_id"]
    opened = kek.unwrap(pair, wrapped, volume_id, KEK["generation"])
    assert opened.encode() == raw(KEK["bundle"])
    row = wrap_token_key(
        pair.public, raw(TOKEN_KEY["key"]), made_at_s=TOKEN_KEY["made_at_s"]
    )
    assert row.key_id == raw(TOKEN_KEY["key_id"])
    info = raw(TOKEN_KEY["info"])
    for sealed in (row.wrapped, raw(TOKEN_KEY["wrapped"])):
        key = hpke.open_sealed(sealed, pair.private, info, error=DataError, what="it")
        assert key == raw(TOKEN_KEY["key"])


def stored_rows() -> tuple[PolicyRow, GenerationRow, TokenKeyRow]:
    policy, generation = STORE["policy"], STORE["generation"]
    token = STORE["token_key"]
    return (
        PolicyRow(**{**policy, "mac": raw(policy["mac"])}),
        GenerationRow(
            **{
                **generation,
                "wrapped": raw(generation["wrapped"]),
                "mac": raw(generation["mac"]),
            }
        ),
        TokenKeyRow(
            key_id=raw(token["key_id"]),
            wrapped=raw(token["wrapped"]),
            made_at_s=token["made_at_s"],
            mac=raw(token["mac"]),
        ),
    )


def stored_seal() -> Seal:
    fields = {name: value for name, value in STORE["seal"].items() if name != "mac"}
    hexes = {name: raw(fields[name]) for name in ("head", "state_sha256")}
    return Seal(**{**fields, **hexes})


def test_product_store() -> None:
    key = StoreKey(Secret(raw(STORE["kek_seed"])))
    policy, generation, token = stored_rows()
    for row in (policy, generation, token):
        assert row_mac(key, row) == row.mac
    assert stored_seal().mac(key) == raw(STORE["seal"]["mac"])
    state = State.parse(raw(STORE["state"]), source="it")
    assert state.policies == {"resnet": (policy.version, policy.mac)}
    assert state.generations == {
        "resnet": {generation.generation: (generation.mac, True)}
    }
    assert state.token_keys == {token.key_id.hex(): token.mac}
    assert state.floors == STORE["floors"]
    assert state.encode() == raw(STORE["state"])


def test_product_store_luks2() -> None:
    seed, fields = Secret(raw(FOREIGN_ROW["kek_seed"])), FOREIGN_ROW["generation"]
    hexes = {name: raw(fields[name]) for name in ("wrapped", "manifest", "mac")}
    row = GenerationRow(**{**fields, **hexes})
    assert row.kind == "luks2"
    assert row_mac(StoreKey(seed), row) == row.mac
    pair = hpke.key_pair(seed)
    opened = kek.unwrap(pair, row.wrapped, row.volume_id, row.generation)
    assert opened.encode() == raw(FOREIGN_ROW["bundle"])
    assert opened.manifest.encode() == row.manifest
    assert opened.manifest.digest().hex() == row.manifest_sha256


def test_product_audit() -> None:
    head = raw(AUDIT["genesis"])
    for seq, one in enumerate(AUDIT["records"], 1):
        fields = dict(one["fields"])
        checks = tuple(
            Check(name=found[0], ok=found[1], expected=found[2], actual=found[-1])
            for found in fields["checks"]
        )
        record = AuditRecord(**{**fields, "checks": checks})
        assert record.seq == seq
        data = encode_record(dataclasses.replace(record, seq=0), seq)
        head = chain_hash(head, data)
        assert data == raw(one["record"])
        assert parse_record(data, source="it") == record
        assert head == raw(one["hash"])


def test_product_checkpoint() -> None:
    key = Ed25519PrivateKey.from_private_bytes(raw(CHECKPOINT["signing_seed"]))
    state = State.parse(raw(STORE["state"]), source="it")
    made = Checkpoint.of(
        stored_seal(),
        state,
        deployment=raw(CHECKPOINT["deployment"]),
        now_s=CHECKPOINT["made_at_s"],
    )
    data = raw(CHECKPOINT["checkpoint"])
    assert made.sign(key) == data
    assert read_checkpoint(data, [raw(CHECKPOINT["key"])], source="it") == made


# --- the document --------------------------------------------------------------------------------


def rows_of(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading, without its head."""
    section = TEXT.partition(f"\n{heading}\n")[2]
    assert section, heading
    lines = re.split(r"\n##+ ", section)[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_every_vector_is_named_by_the_document() -> None:
    names = {name for name in VECTORS if name != "about"}
    named = set(re.findall(r"Vectors?:\s((?:`\w+`(?:,\s)?)+)", TEXT))
    assert {name for text in named for name in re.findall(r"\w+", text)} == names


def test_every_reason_is_in_the_document() -> None:
    """And which of them pass by themselves."""
    rows = rows_of("### Reasons")
    told = {name: row[-1] for row in rows for name in re.findall(r"`([\w-]+)`", row[0])}
    given = {*judge._REASONS.values(), "measurements", "event-log"}
    assert set(told) == given
    passing = {name for name, guest in told.items() if guest.startswith("backs off")}
    assert passing == protocol.PASSING_REASONS


def test_the_limits_are_those_of_the_document() -> None:
    rows = {row[0]: row[1] for row in rows_of("## 3. Release")}
    assert rows["request"] == f"{protocol.REQUEST_MAX_BYTES:,} bytes"
    assert rows["token"] == f"{protocol.TOKEN_BYTES} bytes"
    assert rows["public key"] == f"{hpke.PUBLIC_KEY_BYTES} bytes"
    assert rows["quote"] == f"at most {protocol.QUOTE_MAX_BYTES // 1024} KiB"
    assert rows["event log"] == f"at most {protocol.EVENT_LOG_MAX_BYTES >> 20} MiB"
    assert rows["runtime log"] == f"at most {protocol.RUNTIME_LOG_MAX_BYTES >> 10} KiB"
