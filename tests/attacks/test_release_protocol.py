"""Attacks on the exchange itself: tokens, signatures, certificates, and men in the middle."""

from __future__ import annotations

import base64
import logging
import os
import ssl

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.bundle import KeyBundle
from tdxd.core.config import Address
from tdxd.core.secret import Secret
from tdxd.errors import (
    BadBundleError,
    DeniedError,
    EvidenceUnavailableError,
    HostError,
    KeyReleaseError,
    Retry,
    UnreachableError,
)
from tdxd.host.rpc import GrpcKeyServer
from tdxd.proto import keyrelease_pb2
from tests.keyserver import Guest, make_bundle, opened_owner, serving


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


@pytest.fixture
def other_owner(tmp_path):
    directory = tmp_path / "other"
    directory.mkdir()
    with opened_owner(directory) as made:
        yield made


class Relay:
    """A man in the middle with a certificate of the pinned CA: passes calls on, may change them."""

    def __init__(self, service):
        self.service = service
        self.requests = []

    def challenge(self, request, context):
        return self.service.challenge(request, context)

    def release(self, request, context):
        self.requests.append(request)
        return self.service.release(request, context)


class Tampered:
    """A client's `KeyServer` whose request is changed on its way, from inside the guest."""

    def __init__(self, address, ca_pem, change):
        self._inner = GrpcKeyServer(address, ca_pem)
        self._change = change

    async def challenge(self):
        return await self._inner.challenge()

    async def release(self, request):
        return await self._inner.release(self._change(request))

    async def aclose(self):
        await self._inner.aclose()


def changing(change):
    def connect(address, ca_pem):
        return Tampered(address, ca_pem, change)

    return connect


def changed(request, **fields):
    message = keyrelease_pb2.ReleaseRequest.FromString(request)
    for name, value in fields.items():
        setattr(message, name, value)
    return message.SerializeToString()


def attacker_key():
    return hpke.key_pair(Secret(os.urandom(96)))


async def raw_release(address, owner, request):
    """Send a request as an attacker: no check of the answer."""
    server = GrpcKeyServer(address, (owner.directory / "ca.pem").read_bytes())
    try:
        answer = await server.release(request)
    finally:
        await server.aclose()
    return keyrelease_pb2.ReleaseResponse.FromString(answer).verdicts


# --- tokens -------------------------------------------------------------------


async def test_expired_token(owner):
    owner.add("v")

    class Slow(Guest):
        def quote(self, report_data):
            owner.offset_s += 61
            return super().quote(report_data)

    got = (await owner.fetch("v", tsm=Slow(owner.platform)))["v"]
    assert type(got) is KeyReleaseError
    assert got.retry is Retry.BACKOFF
    assert "token-expired" in got.message
    assert "new token" in got.hint
    assert owner.last().reason == "token-expired"
    assert list(owner.failed()) == ["token_expiry"]


async def test_token_from_the_future_is_not_good_for_ever(owner):
    """A token of a server whose clock was once wrong must not outlive it."""
    owner.add("v")

    class Jump(Guest):
        def quote(self, report_data):
            owner.offset_s = -3600
            return super().quote(report_data)

    got = (await owner.fetch("v", tsm=Jump(owner.platform)))["v"]
    assert type(got) is KeyReleaseError
    assert list(owner.failed()) == ["token_expiry"]


async def test_replayed_token_with_another_key(owner):
    owner.add("v")
    relay = Relay(owner.service)
    with serving(relay, owner.server_tls()) as address:
        got = await owner.fetch("v", config=owner.config(address))
    assert isinstance(got["v"], KeyBundle)
    thief = attacker_key()
    replay = changed(relay.requests[0], public_key=thief.public)
    (verdict,) = await raw_release(owner.address, owner, replay)
    assert verdict.status == protocol.Status.DENIED
    assert verdict.reason == "report-data"
    assert not verdict.sealed_bundle
    assert owner.last().reason == "report-data"


async def test_evidence_that_is_none_fills_no_disk_by_naming_many_volumes(owner):
    """A stranger has a token like everybody: one record and one denial id for 64 volumes."""
    names = [f"v{index:02}" for index in range(64)]
    owner.add("v00")
    relay = Relay(owner.service)
    with serving(relay, owner.server_tls()) as address:
        await owner.fetch("v00", config=owner.config(address))
    before = len(owner.store.audit())
    hostile = keyrelease_pb2.ReleaseRequest.FromString(relay.requests[0])
    hostile.volume_ids[:] = names
    hostile.quote = b"none"
    request = hostile.SerializeToString()
    verdicts = await raw_release(owner.address, owner, request)
    assert [one.volume_id for one in verdicts] == names
    assert {one.reason for one in verdicts} == {"quote-format"}
    assert len({one.denial_id for one in verdicts}) == 1
    assert len(owner.store.audit()) == before + 1
    named = {check.name: check.actual for check in owner.last().checks}["volumes"]
    assert named.startswith("v00, v01, ")


async def test_replay_of_a_whole_request_only_seals_to_the_same_guest(owner):
    owner.add("v")
    relay = Relay(owner.service)
    with serving(relay, owner.server_tls()) as address:
        await owner.fetch("v", config=owner.config(address))
    (verdict,) = await raw_release(owner.address, owner, relay.requests[0])
    assert verdict.status == protocol.Status.RELEASED
    info = protocol.sealed_info(protocol.transcript_hash(relay.requests[0]), "v", 1)
    with pytest.raises(BadBundleError):
        hpke.open_sealed(
            verdict.sealed_bundle,
            attacker_key().private,
            info,
            error=BadBundleError,
            what="x",
        )


async def test_token_of_another_server(owner, other_owner):
    owner.add("v")
    foreign = other_owner.service.challenge(b"", None)
    token = keyrelease_pb2.ChallengeResponse.FromString(foreign).token
    got = await owner.fetch("v", connect=changing(lambda r: changed(r, token=token)))
    assert isinstance(got["v"], BadBundleError)  # the answer is to another request
    assert owner.last().reason == "token"
    assert "unknown key" in owner.failed()["token"][1]


async def test_token_of_another_deployment_with_the_same_key(owner):
    owner.add("v")
    key = owner.service._token_keys.sealing()
    claims = protocol.TokenClaims(
        nonce=b"n" * 32, expiry_s=int(owner.now_s()) + 60, deployment=bytes(16)
    )
    token = protocol.encode_token(claims, key=key, iv=os.urandom(12))
    await owner.fetch("v", connect=changing(lambda r: changed(r, token=token)))
    assert owner.last().reason == "token"
    assert list(owner.failed()) == ["token_deployment"]


async def test_quote_for_one_server_relayed_to_another(owner, other_owner):
    """The report data names the signing key: evidence for one owner is worth nothing to another."""
    owner.add("v")
    token = keyrelease_pb2.ChallengeResponse.FromString(
        owner.service.challenge(b"", None)
    ).token

    class Impostor(Relay):
        def challenge(self, request, context):
            answer = self.service.challenge(request, context)
            message = keyrelease_pb2.ChallengeResponse.FromString(answer)
            message.token = token
            return message.SerializeToString()

    relay = Impostor(other_owner.service)
    with serving(relay, other_owner.server_tls()) as address:
        config = other_owner.config(address)
        await other_owner.fetch("v", config=config, tsm=Guest(owner.platform))
    (verdict,) = await raw_release(owner.address, owner, relay.requests[0])
    assert verdict.reason == "report-data"
    assert not verdict.sealed_bundle


# --- answers ------------------------------------------------------------------


def resealed(request, volume_id, bundle):
    """A bundle of the attacker's, sealed to the guest's key for this very request."""
    message = keyrelease_pb2.ReleaseRequest.FromString(request)
    info = protocol.sealed_info(protocol.transcript_hash(request), volume_id, 1)
    plain = protocol.encode_released(bundle.encode(), 0)
    return hpke.seal(plain, hpke.parse_public_key(message.public_key), info)


async def test_answer_with_one_bundle_swapped_by_a_certificate_of_the_pinned_ca(owner):
    owner.add("a")
    owner.add("v")
    evil = make_bundle("v")

    class Swap(Relay):
        def release(self, request, context):
            answer = self.service.release(request, context)
            message = keyrelease_pb2.ReleaseResponse.FromString(answer)
            message.verdicts[1].sealed_bundle = resealed(request, "v", evil)
            return message.SerializeToString()

    with serving(Swap(owner.service), owner.server_tls()) as address:
        got = await owner.fetch("a", "v", config=owner.config(address))
    for name in ("a", "v"):
        assert isinstance(got[name], BadBundleError)
        assert "is not signed by a pinned key" in got[name].message
        assert str(address) in got[name].message
    assert owner.last().decision == "released"  # sealed to the guest, so nobody else's


async def test_answer_of_one_volume_presented_for_another(owner):
    owner.add("a")
    owner.add("v")

    class Exchange(Relay):
        def release(self, request, context):
            answer = self.service.release(request, context)
            message = keyrelease_pb2.ReleaseResponse.FromString(answer)
            first, second = message.verdicts
            first.sealed_bundle, second.sealed_bundle = (
                second.sealed_bundle,
                first.sealed_bundle,
            )
            return message.SerializeToString()

    with serving(Exchange(owner.service), owner.server_tls()) as address:
        got = await owner.fetch("a", "v", config=owner.config(address))
    assert all(isinstance(one, BadBundleError) for one in got.values())


@pytest.mark.parametrize("how", ["drop", "double", "deny", "older"])
async def test_verdicts_dropped_doubled_or_changed(owner, how):
    owner.add("a")
    owner.add("v")

    class Change(Relay):
        def release(self, request, context):
            answer = self.service.release(request, context)
            message = keyrelease_pb2.ReleaseResponse.FromString(answer)
            if how == "drop":
                del message.verdicts[1]
            elif how == "double":
                message.verdicts.append(message.verdicts[0])
            elif how == "deny":
                message.verdicts[1].status = keyrelease_pb2.STATUS_DENIED
            else:
                message.verdicts[1].generation = 0
            return message.SerializeToString()

    with serving(Change(owner.service), owner.server_tls()) as address:
        got = await owner.fetch("a", "v", config=owner.config(address))
    assert all(isinstance(one, BadBundleError) for one in got.values())


async def test_old_answer_replayed_to_the_guest(owner):
    owner.add("v")

    class Replay(Relay):
        answers: list[bytes] = []  # noqa: RUF012

        def release(self, request, context):
            self.answers.append(self.service.release(request, context))
            return self.answers[0]

    with serving(Replay(owner.service), owner.server_tls()) as address:
        first = (await owner.fetch("v", config=owner.config(address)))["v"]
        second = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert isinstance(first, KeyBundle)
    assert isinstance(second, BadBundleError)


async def test_answer_that_is_garbage(owner):
    class Garbage(Relay):
        def release(self, request, context):
            return b"\xff\xff"

    with serving(Garbage(owner.service), owner.server_tls()) as address:
        got = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert got.message == "key server's answer is malformed"


async def test_signed_bundle_of_another_generation(owner):
    """Only the owner could make this; the guest still checks that manifest and verdict agree."""
    owner.add("v")
    signing = Ed25519PrivateKey.from_private_bytes(
        (owner.directory / "signing.key").read_bytes()
    )

    class Confused(Relay):
        def release(self, request, context):
            sealed = resealed(request, "v", make_bundle("v", 7))
            fields = protocol.VerdictFields(
                volume_id="v", generation=1, status=1, sealed_bundle=sealed
            )
            digest = protocol.transcript_hash(request)
            message = keyrelease_pb2.ReleaseResponse(
                signature=protocol.sign_answer(signing, digest, [fields])
            )
            message.verdicts.add(
                volume_id="v", generation=1, status=1, sealed_bundle=sealed
            )
            return message.SerializeToString()

    with serving(Confused(owner.service), owner.server_tls()) as address:
        got = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert isinstance(got, BadBundleError)
    assert got.message.endswith("holds volume 'v' generation 7")


# --- servers ------------------------------------------------------------------


def pin_of(key):
    raw = key.public_key().public_bytes_raw()
    return "ed25519:" + base64.b64encode(raw).decode()


async def test_wrong_response_signing_key(owner):
    owner.add("v")
    config = owner.config(signing_key=pin_of(Ed25519PrivateKey.generate()))
    got = (await owner.fetch("v", config=config))["v"]
    assert isinstance(got, BadBundleError)
    assert str(owner.address) in got.message
    assert "which is not pinned" in got.message
    assert "signing_key" in got.hint
    assert owner.store.audit() == ()  # no quote was shown to it


async def test_server_that_claims_a_pinned_key_and_signs_with_another(owner):
    """Right CA, right name, wrong key."""
    owner.add("v")
    thief = Ed25519PrivateKey.generate()

    class Resigned(Relay):
        def release(self, request, context):
            answer = self.service.release(request, context)
            message = keyrelease_pb2.ReleaseResponse.FromString(answer)
            fields = [
                protocol.VerdictFields(
                    volume_id=one.volume_id,
                    generation=one.generation,
                    status=one.status,
                    sealed_bundle=one.sealed_bundle,
                )
                for one in message.verdicts
            ]
            digest = protocol.transcript_hash(request)
            message.signature = protocol.sign_answer(thief, digest, fields)
            return message.SerializeToString()

    with serving(Resigned(owner.service), owner.server_tls()) as address:
        got = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert isinstance(got, BadBundleError)
    assert "is not signed by a pinned key" in got.message


async def test_any_pinned_key_may_sign(owner):
    owner.add("v")
    config = owner.config(
        signing_key=pin_of(Ed25519PrivateKey.generate()),
        signing_keys=(owner.pin.signing_key,),
    )
    assert isinstance((await owner.fetch("v", config=config))["v"], KeyBundle)


async def test_certificate_of_another_ca(owner, other_owner):
    owner.add("v")
    config = other_owner.config(owner.address, signing_key=owner.pin.signing_key)
    got = (await owner.fetch("v", config=config))["v"]
    assert isinstance(got, UnreachableError)
    assert got.retry is Retry.BACKOFF
    assert str(owner.address) in got.message
    assert "key_release.ca" in got.hint
    assert owner.store.audit() == ()


async def test_certificate_for_another_name(owner):
    owner.add("v")
    tls = owner.server_tls(names=("elsewhere.example",))
    with serving(owner.service, tls) as address:
        got = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert isinstance(got, UnreachableError)
    assert owner.store.audit() == ()


async def test_key_server_down(owner):
    down = Address("127.0.0.1", 1)
    got = (await owner.fetch("v", config=owner.config(down)))["v"]
    assert isinstance(got, UnreachableError)
    assert "127.0.0.1:1" in got.message
    assert got.retry is Retry.BACKOFF


async def test_next_server_is_asked(owner):
    owner.add("v")
    down = Address("127.0.0.1", 1)
    got = await owner.fetch("v", config=owner.config(down, owner.address))
    assert isinstance(got["v"], KeyBundle)


async def test_all_servers_tried_are_named(owner):
    config = owner.config(Address("127.0.0.1", 1), Address("localhost", 2))
    got = (await owner.fetch("v", config=config))["v"]
    assert isinstance(got, UnreachableError)
    assert "127.0.0.1:1" in got.message
    assert "localhost:2" in got.message


async def test_impostor_does_not_hide_the_right_server(owner):
    owner.add("v")
    tls = owner.server_tls()

    class Garbled(Relay):
        def challenge(self, request, context):
            return b"\xff"

    with serving(Garbled(owner.service), tls) as address:
        got = await owner.fetch("v", config=owner.config(address, owner.address))
    assert isinstance(got["v"], KeyBundle)


async def test_server_that_never_answers(owner):
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        address = Address("127.0.0.1", listener.socket.getsockname()[1])
        config = owner.config(address, timeout_s=0.3)
        started = trio.current_time()
        got = (await owner.fetch("v", config=config))["v"]
        assert trio.current_time() - started < 3
    assert isinstance(got, UnreachableError)
    assert "within 0.3 s" in got.message


async def test_slow_quote_does_not_use_up_the_servers_time(owner):
    owner.add("v")

    class Slow(Guest):
        def quote(self, report_data):
            with_pause = trio.from_thread.run
            with_pause(trio.sleep, 0.6)
            return super().quote(report_data)

    config = owner.config(timeout_s=0.5)
    got = await owner.fetch("v", config=config, tsm=Slow(owner.platform))
    assert isinstance(got["v"], KeyBundle)


async def test_cancelled_fetch_ends_at_once(owner):
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    async with listener:
        address = Address("127.0.0.1", listener.socket.getsockname()[1])
        with trio.move_on_after(0.2) as scope:
            await owner.fetch("v", config=owner.config(address))
    assert scope.cancelled_caught


async def test_platform_without_quotes(owner):
    class Broken(Guest):
        def quote(self, report_data):
            raise EvidenceUnavailableError("outblob is empty")

    got = (await owner.fetch("v", tsm=Broken(owner.platform)))["v"]
    assert isinstance(got, EvidenceUnavailableError)


async def test_ca_file_missing(owner):
    got = (await owner.fetch("v", config=owner.config(ca="/nowhere/ca.pem")))["v"]
    assert isinstance(got, HostError)
    assert "/nowhere/ca.pem" in got.message


async def test_plain_text_client_gets_nothing(owner):
    import grpc

    from tdxd.host.rpc import RpcFailedError, unary_call

    channel = grpc.insecure_channel(str(owner.address))
    with pytest.raises(RpcFailedError):
        await unary_call(channel, protocol.CHALLENGE_PATH, b"", timeout_s=5)
    channel.close()


def test_server_speaks_tls_13(owner):
    context = ssl.create_default_context(cafile=str(owner.directory / "ca.pem"))
    context.set_alpn_protocols(["h2"])
    import socket

    with (
        socket.create_connection(("127.0.0.1", owner.address.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        assert tls.version() == "TLSv1.3"


# --- malformed requests -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token", b""),
        ("public_key", b"\xff" * 1184 + (9).to_bytes(32, "little")),
        ("public_key", b""),
        ("quote", bytes(16385)),
        ("event_log", bytes(1024 * 1024 + 1)),
        ("runtime_log", bytes(256 * 1024 + 1)),
    ],
)
async def test_field_of_a_wrong_size_is_refused_before_any_work(owner, name, value):
    owner.add("v")
    got = await owner.fetch(
        "v", connect=changing(lambda r: changed(r, **{name: value}))
    )
    assert isinstance(got["v"], KeyReleaseError)
    assert "INVALID_ARGUMENT" in got["v"].message
    assert owner.store.audit() == ()


@pytest.mark.parametrize(
    "share",
    [
        bytes(32),
        (1).to_bytes(32, "little"),
        (2**255 - 20).to_bytes(32, "little"),
        (2**255 - 19 + 9).to_bytes(32, "little"),
        (9 + 2**255).to_bytes(32, "little"),
    ],
)
async def test_bad_x25519_point_is_refused(owner, share):
    def change(request):
        key = keyrelease_pb2.ReleaseRequest.FromString(request).public_key
        return changed(request, public_key=key[:1184] + share)

    got = (await owner.fetch("v", connect=changing(change)))["v"]
    assert "INVALID_ARGUMENT" in got.message
    assert "X25519" in got.message


@pytest.mark.parametrize("ids", [[], ["v", "a"], ["v", "v"], ["../v"], ["v"] * 65])
async def test_bad_volume_ids_are_refused(owner, ids):
    def change(request):
        message = keyrelease_pb2.ReleaseRequest.FromString(request)
        del message.volume_ids[:]
        message.volume_ids.extend(ids)
        return message.SerializeToString()

    got = (await owner.fetch("v", connect=changing(change)))["v"]
    assert "INVALID_ARGUMENT" in got.message


async def test_request_over_the_size_limit(owner):
    got = (await owner.fetch("v", connect=changing(lambda r: r + bytes(2_000_000))))[
        "v"
    ]
    assert isinstance(got, KeyReleaseError)
    assert "RESOURCE_EXHAUSTED" in got.message


# --- the store ----------------------------------------------------------------


async def test_wrapped_secret_swapped_in_the_database(owner):
    owner.add("a")
    owner.add("v")
    wrapped = owner.store.generations("a")[0].wrapped
    with owner.store.transaction() as change:
        from tdxd.owner.store.schema import GENERATIONS

        statement = GENERATIONS.update().where(GENERATIONS.c.volume_id == "v")
        change._connection.execute(statement.values(wrapped=wrapped))
    got = (await owner.fetch("v"))["v"]
    assert isinstance(got, DeniedError)
    assert owner.last().reason == "store"
    assert "volume 'v' generation 1" in owner.failed()["secret"][1]


async def test_no_audit_record_no_answer(owner):
    owner.add("v")
    assert isinstance((await owner.fetch("v"))["v"], KeyBundle)
    with owner.store.transaction() as change:
        change._connection.exec_driver_sql("DROP TABLE audit")
    got = (await owner.fetch("v"))["v"]
    assert isinstance(got, UnreachableError)
    assert "store fails" in got.message


# --- secrets ------------------------------------------------------------------


async def test_no_secret_in_logs_or_audit(owner, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    bundle = owner.add("v")
    owner.add("w", simulated="false")
    got = await owner.fetch("v", "w")
    assert isinstance(got["v"], KeyBundle)
    secret = bundle.secret.reveal()
    out, err = capfd.readouterr()
    database = b"".join(
        path.read_bytes() for path in owner.directory.glob("store.sqlite3*")
    )
    shown = (out + err + caplog.text + repr(got) + repr(owner.store.audit())).encode()
    assert "key.released" in out + err
    for needle in (secret[:16], secret[:16].hex().encode(), repr(secret[:8]).encode()):
        assert needle not in shown
        assert needle not in database
