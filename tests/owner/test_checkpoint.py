"""Checkpoints: their bytes, and how they leave the store in time."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import http.server
import sys
import threading
import time

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from hypothesis import given
from hypothesis import strategies as st

from tdxd.core.secret import Secret
from tdxd.errors import DataError, UnavailableError
from tdxd.owner.audit.checkpoint import Checkpoint, VolumeMark, read_checkpoint
from tdxd.owner.audit.checkpoint_export import CheckpointExporter, Exports
from tdxd.owner.audit.config import AuditConfig
from tdxd.owner.store.kek import create_kek
from tdxd.owner.store.key import StoreKey
from tdxd.owner.store.rows import GenerationRow, TokenKeyRow, row_mac
from tdxd.owner.store.seal import Seal
from tdxd.owner.store.state import State
from tdxd.owner.store.store import Store
from tests.owner.test_store import generation, record

SIGNING = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = SIGNING.public_key().public_bytes_raw()
DEPLOYMENT = bytes(range(16))


@pytest.fixture
def store(tmp_path):
    create_kek(tmp_path, Secret(bytes(range(96))))
    with Store.create(tmp_path) as made:
        yield made


def exports(store, tmp_path, **config):
    return Exports(
        store,
        tmp_path,
        AuditConfig(**config),
        keys=lambda: (SIGNING,),
        deployment=DEPLOYMENT,
    )


def decide(store, count=1):
    for _ in range(count):
        with store.transaction() as change:
            change.record([record()])


def read(path):
    return read_checkpoint(path.read_bytes(), (PUBLIC,), source="it")


# --- bytes --------------------------------------------------------------------


def test_store_key_and_macs_byte_by_byte():
    """HKDF-SHA256 (RFC 5869, no salt) and HMAC over LP, as the protocol says."""
    seed = bytes(range(96))
    extracted = hmac.digest(bytes(32), seed, "sha256")
    key = hmac.digest(extracted, b"tdxd/store-mac/v1\x01", "sha256")
    lp = [b"policy", b"v", (3).to_bytes(8, "big"), b"text", (5).to_bytes(8, "big")]
    message = b"".join(len(one).to_bytes(4, "big") + one for one in lp)
    made = StoreKey(Secret(seed)).mac("policy", ("v", 3, "text", 5))
    assert made == hmac.digest(key, message, "sha256")
    assert (
        made.hex() == "a06bd55123d95a697d2b8455725d3d53b89e26f9303ab2b9458ba041a89e162d"
    )
    assert repr(StoreKey(Secret(seed))) == "StoreKey()"


def test_macs_of_the_other_kinds():
    """The vectors of docs/protocol.md."""
    key = StoreKey(Secret(bytes(range(96))))
    row = GenerationRow(
        volume_id="v",
        generation=3,
        wrapped=b"w",
        manifest_sha256="ab" * 32,
        added_at_s=5,
    )
    token = TokenKeyRow(key_id=b"k" * 8, wrapped=b"w", made_at_s=5)
    seal = Seal(
        revision=7,
        seq=2,
        head=b"h" * 32,
        state_sha256=b"s" * 32,
        exported_revision=6,
        exported_seq=1,
        exported_at_s=5,
    )
    assert [
        one.hex() for one in (row_mac(key, row), row_mac(key, token), seal.mac(key))
    ] == [
        "69edb1804f0823a7af1694518dba7d354a70c92edabd8845cd71e5d4d8ce8804",
        "a1c3845e5c8b97de0d54f18ec760af140c1b2bb9212e9cd01fb9a4389f0c41d5",
        "df2c6dfb059ae6275873181f618351d689ea2d654627d7e55bbe0275584080d4",
    ]
    fields = [b"seal", *map(_field, seal.columns())]
    message = b"".join(len(one).to_bytes(4, "big") + one for one in fields)
    derived = hmac.digest(
        hmac.digest(bytes(32), bytes(range(96)), "sha256"),
        b"tdxd/store-mac/v1\x01",
        "sha256",
    )
    assert seal.mac(key) == hmac.digest(derived, message, "sha256")


def _field(value):
    return value if isinstance(value, bytes) else value.to_bytes(8, "big")


def test_state_byte_by_byte():
    state = State(
        policies={"b": (2, b"m" * 32), "a": (1, b"n" * 32)},
        generations={"a": {10: (b"x" * 32, True), 9: (b"y" * 32, False)}},
        floors={"f": 7},
        token_keys={"00": b"k" * 32},
    )
    data = state.encode()
    assert msgpack.unpackb(data) == {
        "floors": {"f": 7},
        "generations": {"a": [[9, b"y" * 32, False], [10, b"x" * 32, True]]},
        "policies": {"a": [1, b"n" * 32], "b": [2, b"m" * 32]},
        "token_keys": {"00": b"k" * 32},
    }
    assert State.parse(data, source="it") == state
    assert state.current("a") == 10
    assert state.current("none") == 0
    assert state.policy_version("b") == 2


@pytest.mark.parametrize(
    "body", [b"\x80", b"\x90", msgpack.packb({"floors": {}, "policies": {"a": 1}})]
)
def test_other_bytes_are_no_state(body):
    with pytest.raises(DataError):
        State.parse(body, source="it")


def test_checkpoint_byte_by_byte():
    made = Checkpoint.of(
        Seal(revision=7, seq=2, head=b"h" * 32, state_sha256=b"s" * 32),
        State(
            policies={"v": (3, b"m" * 32), "gone": (1, b"m" * 32)},
            generations={"v": {1: (b"x" * 32, True), 2: (b"y" * 32, False)}},
            floors={"root-crl/r": 1},
        ),
        deployment=DEPLOYMENT,
        now_s=1764072000,
    )
    data = made.sign(SIGNING)
    outer = msgpack.unpackb(data)
    assert set(outer) == {"body", "key", "signature"}
    label = b"\x00\x00\x00\x12tdxd/checkpoint/v1"
    signed = label + len(outer["body"]).to_bytes(4, "big") + outer["body"]
    Ed25519PublicKey.from_public_bytes(outer["key"]).verify(outer["signature"], signed)
    assert msgpack.unpackb(outer["body"]) == {
        "deployment": DEPLOYMENT,
        "floors": {"root-crl/r": 1},
        "head": b"h" * 32,
        "made_at_s": 1764072000,
        "revision": 7,
        "seq": 2,
        "state_sha256": b"s" * 32,
        "version": 1,
        "volumes": {
            "gone": {"generation": 0, "policy_version": 1},
            "v": {"generation": 1, "policy_version": 3},
        },
    }
    assert (
        hashlib.sha256(data).hexdigest()
        == "339143300334a97bed6febf7c8a4c4a57a772ac474c5ff4b4185ac8c862c3e73"
    )
    again = read_checkpoint(data, (PUBLIC,), source="it")
    assert again == made
    assert again.volumes["v"] == VolumeMark(generation=1, policy_version=3)


def test_checkpoint_of_a_later_version_is_refused():
    made = Checkpoint.of(Seal(), State(), deployment=DEPLOYMENT, now_s=1)
    later = dataclasses.replace(made, version=2).sign(SIGNING)
    with pytest.raises(DataError, match="version 2, not 1"):
        read_checkpoint(later, (PUBLIC,), source="it")


@given(st.binary(max_size=64), st.binary(max_size=64), st.binary(max_size=64))
def test_any_bytes_give_an_error_that_is_expected(body, key, signature):
    outer = {"body": body, "key": key, "signature": signature}
    for data in (body, msgpack.packb(outer), msgpack.packb({**outer, "key": PUBLIC})):
        with pytest.raises(DataError):
            read_checkpoint(data, (PUBLIC,), source="it")


@pytest.mark.parametrize("data", [b"", b"\x80", b"\xc0", b"junk", msgpack.packb([1])])
def test_other_bytes_are_no_checkpoint(data):
    with pytest.raises(DataError):
        read_checkpoint(data, (PUBLIC,), source="it")


# --- export -------------------------------------------------------------------


def test_exported_to_a_file_once_and_again_when_there_is_more(store, tmp_path):
    path = tmp_path / "elsewhere"
    made = exports(store, tmp_path, checkpoint_file=str(path))
    made.export(5)
    first = path.read_bytes()
    assert read(path).seq == 0
    made.export(6)
    assert path.read_bytes() == first  # nothing new
    decide(store, 3)
    made.export(7)
    assert (read(path).seq, read(path).made_at_s) == (3, 7)
    assert (store.seal().exported_seq, store.seal().exported_at_s) == (3, 7)
    with store.transaction() as change:
        change.add_generation(generation())
    made.export(8)
    assert read(path).volumes["v"].generation == 1
    assert sorted(
        one.name for one in tmp_path.iterdir() if "elsewhere" in one.name
    ) == ["elsewhere"]


def test_exported_to_a_command(store, tmp_path):
    path = tmp_path / "got"
    argv = ("/bin/sh", "-c", f"cat > {path}")
    exports(store, tmp_path, checkpoint_command=argv).export(5)
    assert read(path).made_at_s == 5


class Receiver:
    """An HTTP server that answers as told and keeps what it got."""

    def __init__(self, status=200):
        receiver = self
        self.got: list[tuple[str, bytes]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                size = int(self.headers["Content-Length"])
                kind = self.headers["Content-Type"]
                receiver.got.append((kind, self.rfile.read(size)))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *_args):
                pass

        self.status = status
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/in?x=1"

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_exc):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def test_exported_to_an_address(store, tmp_path):
    with Receiver() as receiver:
        exports(store, tmp_path, checkpoint_url=receiver.url).export(5)
    ((kind, data),) = receiver.got
    assert kind == "application/msgpack"
    assert read_checkpoint(data, (PUBLIC,), source="it").made_at_s == 5


def test_one_target_that_fails_is_named_and_the_others_are_told(store, tmp_path):
    path = tmp_path / "file"
    with Receiver(status=500) as receiver:
        made = exports(
            store, tmp_path, checkpoint_file=str(path), checkpoint_url=receiver.url
        )
        with pytest.raises(UnavailableError, match="HTTP status 500"):
            made.export(5)
        assert read(path).made_at_s == 5
        assert store.seal().exported_at_s == 0  # so all are told again
        receiver.status = 204
        made.export(6)
    assert store.seal().exported_at_s == 6


def test_file_that_is_no_checkpoint_is_not_overwritten(store, tmp_path):
    path = tmp_path / "precious"
    path.write_text("something else")
    with pytest.raises(UnavailableError, match="precious"):
        exports(store, tmp_path, checkpoint_file=str(path)).export(5)
    assert path.read_text() == "something else"


def test_file_of_the_previous_signing_key_is_replaced(store, tmp_path):
    path = tmp_path / "file"
    exports(store, tmp_path, checkpoint_file=str(path)).export(5)
    decide(store)
    following = Ed25519PrivateKey.from_private_bytes(bytes(32))
    config = AuditConfig(checkpoint_file=str(path))

    def turned(*known):
        return Exports(
            store,
            tmp_path,
            config,
            keys=lambda: (following, *known),
            deployment=DEPLOYMENT,
        )

    with pytest.raises(UnavailableError, match="unknown key"):
        turned().export(6)
    turned(SIGNING).export(7)
    mine = following.public_key().public_bytes_raw()
    assert read_checkpoint(path.read_bytes(), (mine,), source="it").seq == 1


def wait_for(condition, limit_s=20.0):
    stop_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < stop_s
        time.sleep(0.02)


def test_exporter_exports_while_it_runs_and_at_its_end(store, tmp_path):
    path = tmp_path / "file"
    config = AuditConfig(
        checkpoint_file=str(path), checkpoint_records=3, checkpoint_s=1e6
    )
    made = Exports(
        store, tmp_path, config, keys=lambda: (SIGNING,), deployment=DEPLOYMENT
    )
    with CheckpointExporter(made, config, time.time):
        wait_for(path.exists)  # the state of a new store is told at once
        assert read(path).seq == 0
        decide(store, 3)
        wait_for(lambda: read(path).seq == 3)
        decide(store, 1)
        time.sleep(1.5)
        assert read(path).seq == 3  # one record waits for its time
    assert read(path).seq == 4


def test_exporter_exports_after_some_time(store, tmp_path):
    path = tmp_path / "file"
    now_s = [1000.0]
    config = AuditConfig(
        checkpoint_file=str(path), checkpoint_records=1000, checkpoint_s=60
    )
    made = Exports(
        store, tmp_path, config, keys=lambda: (SIGNING,), deployment=DEPLOYMENT
    )
    with CheckpointExporter(made, config, lambda: now_s[0]):
        wait_for(path.exists)
        decide(store)
        time.sleep(1.5)
        now_s[0] += 61
        wait_for(lambda: read(path).seq == 1)


def test_exporter_that_fails_says_so_and_goes_on(store, tmp_path, capfd):
    directory = tmp_path / "mount"
    path = directory / "file"
    config = AuditConfig(checkpoint_file=str(path), checkpoint_records=1)
    made = Exports(
        store, tmp_path, config, keys=lambda: (SIGNING,), deployment=DEPLOYMENT
    )
    with CheckpointExporter(made, config, time.time) as exporter:
        wait_for(lambda: exporter.trouble)
        assert "No such file" in exporter.trouble
        directory.mkdir()
    assert exporter.trouble == ""
    assert read(path).seq == 0
    assert "checkpoint.export_failed" in "".join(capfd.readouterr())


def test_no_target_is_said(store, tmp_path, capfd):
    config = AuditConfig()
    made = Exports(
        store, tmp_path, config, keys=lambda: (SIGNING,), deployment=DEPLOYMENT
    )
    with CheckpointExporter(made, config, time.time):
        pass
    assert "checkpoint.not_configured" in "".join(capfd.readouterr())


def test_two_processes_export_by_turns(store, tmp_path):
    """Each sees what the other has told, through the store."""
    path = tmp_path / "file"
    with Store.open(tmp_path) as other:
        one = exports(store, tmp_path, checkpoint_file=str(path))
        two = exports(other, tmp_path, checkpoint_file=str(path))
        decide(store)
        one.export(5)
        two.export(6)
        assert read(path).made_at_s == 5
        assert two.pending()[1] == 0


# --- the configuration --------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"checkpoint_file": "here"}, "checkpoint_file 'here' is not an absolute path"),
        ({"checkpoint_url": "ftp://x"}, "checkpoint_url 'ftp://x' is not an http"),
        ({"on_denial_url": "nowhere"}, "on_denial_url 'nowhere' is not an http"),
        ({"on_denial_url": "http://[::1"}, "is not an http"),
        ({"checkpoint_url": "http://h:99999/"}, "is not an http"),
        ({"on_denial_command": ("mail",)}, "'mail' is not an absolute path"),
        ({"checkpoint_command": ("tee", "x")}, "'tee' is not an absolute path"),
        ({"checkpoint_records": 0}, "checkpoint_records must be greater than 0"),
        ({"checkpoint_s": -1.0}, "checkpoint_s must be greater than 0"),
        ({"hook_timeout_s": 0.0}, "hook_timeout_s must be greater than 0"),
    ],
)
def test_wrong_values_are_refused(fields, named):
    with pytest.raises(ValueError, match=named):
        AuditConfig(**fields)


def test_defaults_tell_nobody():
    assert not AuditConfig().exports
    assert not AuditConfig().hooks
    assert AuditConfig(checkpoint_url="https://x.example/in").exports
    assert AuditConfig(on_denial_command=(sys.executable,)).hooks
