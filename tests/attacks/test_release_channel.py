"""Attacks on the channel: floods, slow and late clients, flipped bits, keys of others."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import grpc
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.bundle import KeyBundle
from tdxd.core.config import Address
from tdxd.core.secret import Secret
from tdxd.errors import BadBundleError, KeyReleaseError, RemoteProtocolError
from tdxd.host.rpc import RpcFailedError, tls_channel, unary_call
from tdxd.owner.server.assembly import make_keyd
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import read_tls
from tdxd.owner.server.limits import LimitsConfig
from tdxd.owner.server.signing_keys import (
    pin_line,
    publish_next,
    retire_previous,
    use_next,
)
from tdxd.owner.store.admin import set_policy
from tdxd.owner.store.store import Store
from tdxd.proto import keyrelease_pb2
from tests.keyserver import Guest, opened_owner, policy_text, serving


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


class Service:
    """Answers at once, and counts what it was asked."""

    def __init__(self):
        self.asked = []

    def challenge(self, _request, peer):
        self.asked.append(peer)
        return b"challenge"

    def release(self, request, peer):
        self.asked.append(peer)
        return request


def limits(**changes):
    wide = {
        "challenges_per_s": 1e6,
        "releases_per_s": 1e6,
        "peer_challenges_per_s": 1e6,
        "peer_releases_per_s": 1e6,
    }
    return LimitsConfig(**{**wide, **changes})


@contextlib.contextmanager
def channel_to(owner, address):
    ca_pem = (owner.directory / "ca.pem").read_bytes()
    with contextlib.closing(tls_channel(address, ca_pem)) as channel:
        yield channel


@contextlib.asynccontextmanager
async def from_another_address(target):
    """A way to the server on which it sees 127.0.0.2 as its client."""

    async def copy(source, sink):
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                await sink.send_all(data)
        await sink.aclose()

    async def carry(near):
        far = await trio.open_tcp_stream(
            target.host, target.port, local_address="127.0.0.2"
        )
        async with near, far, trio.open_nursery() as both:
            both.start_soon(copy, near, far)
            both.start_soon(copy, far, near)

    async with trio.open_nursery() as nursery:
        listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
        nursery.start_soon(trio.serve_listeners, carry, [listener])
        yield Address("127.0.0.1", listener.socket.getsockname()[1])
        nursery.cancel_scope.cancel()


async def challenge(channel):
    return await unary_call(channel, protocol.CHALLENGE_PATH, b"", timeout_s=10)


async def release(channel, request, timeout_s=10.0):
    return await unary_call(
        channel, protocol.RELEASE_PATH, request, timeout_s=timeout_s
    )


async def outcome(call):
    try:
        await call
    except RpcFailedError as exc:
        return exc.status
    return "OK"


# --- floods -------------------------------------------------------------------


async def test_flood_from_one_peer_does_not_starve_another(owner):
    service = Service()
    rules = limits(peer_releases_per_s=5, releases_per_s=100, burst_s=2)
    seen = []
    with serving(service, owner.server_tls(), rules) as address:
        async with from_another_address(address) as other:
            with (
                channel_to(owner, address) as flood,
                channel_to(owner, other) as quiet,
            ):
                async with trio.open_nursery() as nursery:

                    async def keep_asking():
                        while True:
                            seen.append(await outcome(release(flood, b"x")))

                    for _ in range(16):
                        nursery.start_soon(keep_asking)
                    await trio.sleep(0.5)
                    for _ in range(8):
                        with trio.fail_after(5):
                            assert await release(quiet, b"quiet") == b"quiet"
                    nursery.cancel_scope.cancel()
    assert set(seen) == {"OK", "RESOURCE_EXHAUSTED"}
    assert seen.count("RESOURCE_EXHAUSTED") > 10 * seen.count("OK") > 0


async def test_refusal_says_when_to_come_again(owner):
    service = Service()
    rules = limits(peer_challenges_per_s=1, burst_s=1)
    with (
        serving(service, owner.server_tls(), rules) as address,
        channel_to(owner, address) as channel,
    ):
        await challenge(channel)
        with pytest.raises(RpcFailedError) as caught:
            await challenge(channel)
        assert caught.value.status == "RESOURCE_EXHAUSTED"
        assert caught.value.details.startswith("127.0.0.1: at most 1 challenges")
        assert "try again in 1 s" in caught.value.details
        assert await release(channel, b"x") == b"x"  # counted apart
    assert len(service.asked) == 2


async def test_guest_backs_off_when_it_is_refused(owner):
    owner.add("v")
    rules = limits(peer_releases_per_s=0.01, burst_s=100)
    with serving(owner.service, owner.server_tls(), rules) as address:
        config = owner.config(address)
        assert isinstance((await owner.fetch("v", config=config))["v"], KeyBundle)
        refused = (await owner.fetch("v", config=config))["v"]
    assert isinstance(refused, KeyReleaseError)
    assert "RESOURCE_EXHAUSTED" in refused.message
    assert len(owner.store.audit()) == 1  # refused before any work


async def test_oversized_requests_harm_nobody_else(owner):
    service = Service()
    with (
        serving(service, owner.server_tls()) as address,
        channel_to(owner, address) as bad,
        channel_to(owner, address) as good,
    ):
        async with trio.open_nursery() as nursery:
            seen = []

            async def too_much():
                request = bytes(protocol.REQUEST_MAX_BYTES + 1)
                seen.append(await outcome(release(bad, request)))

            for _ in range(8):
                nursery.start_soon(too_much)
            for _ in range(8):
                assert await release(good, b"good") == b"good"
    assert seen == ["RESOURCE_EXHAUSTED"] * 8
    assert len(service.asked) == 8


# --- slow and late clients ----------------------------------------------------


def dangling_calls(channel, count, never):
    """Calls whose headers are sent, and whose message never comes."""

    def nothing():
        never.wait(60)
        yield b""

    return [
        channel.stream_unary(protocol.RELEASE_PATH).future(nothing(), timeout=60)
        for _ in range(count)
    ]


async def test_slow_clients_hold_only_their_own_share_and_are_ended(owner):
    service = Service()
    rules = limits(receive_s=1.5, peer_calls=8, calls=64)
    never = threading.Event()
    with serving(service, owner.server_tls(), rules) as address:
        async with from_another_address(address) as other:
            with channel_to(owner, address) as slow, channel_to(owner, other) as quiet:
                calls = dangling_calls(slow, 8, never)
                await trio.sleep(0.3)
                for _ in range(20):
                    with trio.fail_after(2):
                        assert await release(quiet, b"quiet") == b"quiet"
                started_s = time.monotonic()
                codes = await trio.to_thread.run_sync(
                    lambda: [call.exception(20).code().name for call in calls]
                )
                assert time.monotonic() - started_s < 6
                never.set()
                assert codes == ["DEADLINE_EXCEEDED"] * 8
                with trio.fail_after(5):
                    assert await release(slow, b"again") == b"again"


async def test_calls_at_once_of_one_peer_over_several_connections(owner):
    rules = limits(receive_s=30, peer_calls=4, calls=64)
    never = threading.Event()
    with (
        serving(Service(), owner.server_tls(), rules) as address,
        channel_to(owner, address) as one,
        channel_to(owner, address) as two,
    ):
        calls = dangling_calls(one, 4, never)
        await trio.sleep(0.5)
        assert await outcome(release(two, b"x")) == "RESOURCE_EXHAUSTED"
        for call in calls:
            call.cancel()
        never.set()
        with trio.fail_after(10):
            while await outcome(release(two, b"x")) != "OK":
                await trio.sleep(0.05)


async def test_call_that_waited_longer_than_its_deadline_is_not_worked_on(owner):
    class Slow(Service):
        def release(self, request, peer):
            super().release(request, peer)
            time.sleep(0.8)
            return request

    service = Slow()
    with (
        serving(service, owner.server_tls()) as address,
        channel_to(owner, address) as first,
        channel_to(owner, address) as second,
    ):
        await challenge(first)
        await challenge(second)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(release, first, b"x")
            await trio.sleep(0.2)
            late = await outcome(release(second, b"late", timeout_s=0.3))
        assert late == "DEADLINE_EXCEEDED"
        await challenge(first)
    assert len(service.asked) == 4  # the late one is not among them


async def test_client_that_goes_away_leaves_nothing_behind(owner):
    rules = limits(peer_calls=2, calls=2, receive_s=60)
    never = threading.Event()
    with serving(Service(), owner.server_tls(), rules) as address:
        for _ in range(5):
            with channel_to(owner, address) as channel:
                dangling_calls(channel, 2, never)
                await trio.sleep(0.2)
        never.set()
        with channel_to(owner, address) as channel, trio.fail_after(10):
            while await outcome(challenge(channel)) != "OK":
                await trio.sleep(0.05)


async def test_connections_that_say_nothing_keep_nobody_out(owner):
    with serving(Service(), owner.server_tls()) as address:
        idle = [
            await trio.open_tcp_stream("127.0.0.1", address.port) for _ in range(50)
        ]
        with channel_to(owner, address) as channel, trio.fail_after(5):
            assert await release(channel, b"x") == b"x"
        for stream in idle:
            await stream.aclose()


async def test_collateral_service_that_hangs_keeps_nobody_else_waiting(owner):
    """A new platform's guest waits for its collateral; the loop does not wait with it."""
    owner.add("v")
    asked = threading.Event()
    go_on = threading.Event()

    def hang(collateral):
        asked.set()
        go_on.wait(30)
        return collateral

    owner.platform.mangle = hang
    ends = []

    async def new_platform():
        ends.append((await owner.fetch("v"))["v"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(new_platform)
        await trio.to_thread.run_sync(asked.wait, 20)
        with channel_to(owner, owner.address) as channel:
            for _ in range(20):
                with trio.fail_after(2):
                    await challenge(channel)
        assert ends == []
        go_on.set()
    assert isinstance(ends[0], KeyBundle)


async def test_long_request_is_judged_beside_the_loop_and_like_any_other(owner):
    owner.add("v")

    class Chatty(Guest):
        def event_log(self):
            return b"x" * 400_000

    got = (await owner.fetch("v", tsm=Chatty(owner.platform)))["v"]
    assert isinstance(got, KeyReleaseError)
    assert owner.last().reason == "event-log"


# --- what a client is told ----------------------------------------------------


async def test_a_bug_of_the_server_tells_the_client_nothing(owner, capfd):
    class Broken(Service):
        def release(self, request, peer):
            raise ValueError("the secret is 0xdeadbeef")

    with (
        serving(Broken(), owner.server_tls()) as address,
        channel_to(owner, address) as channel,
    ):
        with pytest.raises(RpcFailedError) as caught:
            await release(channel, b"x")
        assert (caught.value.status, caught.value.details) == (
            "INTERNAL",
            "internal error",
        )
        assert await challenge(channel) == b"challenge"
    out, err = capfd.readouterr()
    assert "request.crashed" in out + err
    assert "deadbeef" not in out + err


async def test_call_without_a_message_and_call_of_nothing(owner):
    service = Service()
    with (
        serving(service, owner.server_tls()) as address,
        channel_to(owner, address) as channel,
    ):

        def empty():
            method = channel.stream_unary(protocol.RELEASE_PATH)
            with pytest.raises(grpc.RpcError) as caught:
                method(iter(()), timeout=10)
            return caught.value.code().name

        assert await trio.to_thread.run_sync(empty) == "INVALID_ARGUMENT"
        nothing = unary_call(
            channel, "/tdxd.keyrelease.v1.KeyRelease/X", b"", timeout_s=5
        )
        assert await outcome(nothing) == "UNIMPLEMENTED"
    assert service.asked == []


# --- bits flipped on the way --------------------------------------------------


class Recorded:
    """A good request of a guest, made once and sent past gRPC."""

    def __init__(self, owner):
        self.service = owner.service
        self.pair = hpke.key_pair(Secret(os.urandom(hpke.SEED_BYTES)))
        answer = self.service.challenge(b"", "ipv4:127.0.0.1:1")
        said = keyrelease_pb2.ChallengeResponse.FromString(answer)
        self.token = said.token
        bound = protocol.report_data(
            token=said.token,
            public_key=self.pair.public,
            volume_ids=("v",),
            signing_key_sha256=said.signing_key_sha256,
            event_log=owner.platform.event_log,
            runtime_log=b"",
        )
        self.message = keyrelease_pb2.ReleaseRequest(
            token=said.token,
            public_key=self.pair.public,
            volume_ids=["v"],
            quote=owner.platform.quote(bound),
            event_log=owner.platform.event_log,
        )

    def verdict(self, service=None, **fields):
        message = keyrelease_pb2.ReleaseRequest()
        message.CopyFrom(self.message)
        for name, value in fields.items():
            setattr(message, name, value)
        request = message.SerializeToString()
        answer = (service or self.service).release(request, "ipv4:127.0.0.1:1")
        (verdict,) = keyrelease_pb2.ReleaseResponse.FromString(answer).verdicts
        return verdict


def flipped(data, bit):
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_every_single_bit_of_the_token_counts(owner):
    owner.add("v")
    recorded = Recorded(owner)
    assert recorded.verdict().status == protocol.Status.RELEASED
    for bit in range(8 * protocol.TOKEN_BYTES):
        verdict = recorded.verdict(token=flipped(recorded.token, bit))
        assert verdict.status == protocol.Status.DENIED
        assert verdict.reason == "token"
        assert not verdict.sealed_bundle


@pytest.mark.parametrize("name", ["public_key", "event_log", "quote"])
def test_no_single_bit_of_the_request_can_be_changed(owner, name):
    """A sample of bits; quotes have some that no signature covers, such as padding."""
    owner.add("v")
    recorded = Recorded(owner)
    data = getattr(recorded.message, name)
    released = []
    for bit in range(0, 8 * len(data), max(1, 8 * len(data) // 97)):
        try:
            verdict = recorded.verdict(**{name: flipped(data, bit)})
        except RemoteProtocolError:
            continue
        if verdict.status == protocol.Status.RELEASED:
            released.append(bit)
    if (
        name == "quote"
    ):  # what it proves is the same, and so is whom the bundle is sealed to
        assert all(bit >= 8 * (48 + 584) for bit in released)
    else:
        assert released == []


async def test_no_single_bit_of_the_answer_changes_what_the_guest_accepts(owner):
    bundle = owner.add("v")
    bits = iter(range(3, 100_000, 311))
    ends = []

    class Flip:
        def challenge(self, request, peer):
            return owner.service.challenge(request, peer)

        def release(self, request, peer):
            answer = owner.service.release(request, peer)
            bit = next(bits)
            ends.append(bit >= 8 * len(answer))
            return answer if ends[-1] else flipped(answer, bit)

    with serving(Flip(), owner.server_tls()) as address:
        config = owner.config(address)
        while not any(ends):
            got = (await owner.fetch("v", config=config))["v"]
            if isinstance(got, KeyBundle):
                assert ends[-1]
                assert got.encode() == bundle.encode()
            else:
                assert isinstance(got, KeyReleaseError | RemoteProtocolError)
    assert len(ends) > 30


# --- points -------------------------------------------------------------------

GOOD_KEY = hpke.key_pair(Secret(bytes(range(96)))).public


def with_coefficient(key, index, value):
    """Put a 12-bit coefficient into the ML-KEM part (FIPS 203, ByteEncode12)."""
    number = int.from_bytes(key[:1152], "little")
    shift = 12 * index
    number = number & ~(0xFFF << shift) | value << shift
    return number.to_bytes(1152, "little") + key[1152:]


@given(st.integers(0, 767), st.integers(3329, 4095))
def test_mlkem_coefficient_that_is_not_reduced(index, value):
    with pytest.raises(RemoteProtocolError, match="ML-KEM-768"):
        hpke.parse_public_key(with_coefficient(GOOD_KEY, index, value))


@given(st.integers(0, 767))
def test_largest_coefficient_is_good(index):
    hpke.parse_public_key(with_coefficient(GOOD_KEY, index, 3328))


@settings(max_examples=200)
@given(st.integers(2**255 - 19, 2**256 - 1))
def test_x25519_value_that_is_not_canonical(value):
    with pytest.raises(RemoteProtocolError, match="X25519"):
        hpke.parse_public_key(GOOD_KEY[:1184] + value.to_bytes(32, "little"))


LOW_ORDER = (
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "00" * 32,
    "01" + "00" * 31,
)
"""Source: RFC 7748, section 6.1, and the list of libsodium, blacklist of crypto_scalarmult."""


@pytest.mark.parametrize("share", LOW_ORDER)
@pytest.mark.parametrize("high_bit", [0, 0x80])
async def test_low_order_point_is_refused_before_any_work(owner, share, high_bit):
    owner.add("v")
    recorded = Recorded(owner)
    raw = bytearray.fromhex(share)
    raw[31] |= high_bit
    with pytest.raises(RemoteProtocolError, match="X25519"):
        recorded.verdict(public_key=GOOD_KEY[:1184] + bytes(raw))
    assert owner.store.audit() == ()


# --- replicas and rotation ----------------------------------------------------


@contextlib.contextmanager
def replica(owner):
    """Another server process's view of the same store."""
    with Store.open(owner.directory) as store:
        config = read_config(owner.directory)
        yield make_keyd(owner.directory, config, store, clock=owner.now_s)


async def test_replicas_answer_each_others_tokens(owner):
    owner.add("v")
    with replica(owner) as second:
        there = Recorded(owner).verdict(service=second)
        assert there.status == protocol.Status.RELEASED

        class Split:
            def challenge(self, request, peer):
                return second.challenge(request, peer)

            def release(self, request, peer):
                return owner.service.release(request, peer)

        with serving(Split(), read_tls(owner.directory)) as address:
            got = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert isinstance(got, KeyBundle)


async def test_token_of_a_replica_with_another_store_is_refused(owner, tmp_path):
    """The same certificates and the same signing key do not make a replica."""
    owner.add("v")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with opened_owner(elsewhere) as other:
        recorded = Recorded(owner)
        said = keyrelease_pb2.ChallengeResponse.FromString(
            other.service.challenge(b"", "ipv4:127.0.0.1:1")
        )
        verdict = recorded.verdict(token=said.token)
    assert verdict.reason == "token"


def test_quota_is_counted_once_for_a_nonce_on_whatever_replica(owner):
    owner.add("v", release="[release]\nmax_per_hour = 2\n")
    recorded = Recorded(owner)
    with replica(owner) as second:
        for service in (owner.service, second, second, owner.service):
            assert recorded.verdict(service).status == protocol.Status.RELEASED
        assert Recorded(owner).verdict(second).status == protocol.Status.RELEASED
        assert Recorded(owner).verdict(second).reason == "quota"
        assert Recorded(owner).verdict().reason == "quota"
        assert (
            recorded.verdict().status == protocol.Status.RELEASED
        )  # sealed to the same key


def test_race_for_the_last_release_of_a_quota_has_one_winner_each(owner):
    owner.add("v", release="[release]\nmax_per_hour = 5\n")
    requests = [Recorded(owner) for _ in range(12)]
    start = threading.Barrier(len(requests))
    reasons = []

    def race(recorded, service):
        start.wait(20)
        reasons.append(recorded.verdict(service).reason)

    with replica(owner) as second:
        racers = [
            threading.Thread(target=race, args=(one, (owner.service, second)[n % 2]))
            for n, one in enumerate(requests)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(60)
    assert sorted(reasons) == [""] * 5 + ["quota"] * 7


def test_policy_changed_while_a_request_is_judged_counts(owner, tmp_path):
    """The records say what was decided by the state that they are written on, never by an older."""
    owner.add("v")
    recorded = Recorded(owner)
    assert recorded.verdict().status == protocol.Status.RELEASED
    stricter = tmp_path / "stricter.toml"
    stricter.write_text(policy_text(owner.platform, simulated="false"))
    draw = owner.service._random_bytes

    def draw_late(size):  # an id is drawn after the judgement, before the transaction
        owner.service._random_bytes = draw
        set_policy(owner.directory, "v", stricter, 0)
        return draw(size)

    owner.service._random_bytes = draw_late
    assert recorded.verdict().reason == "simulated"
    assert owner.last().policy_version == 2
    assert recorded.verdict().reason == "simulated"


async def test_signing_key_rotates_without_a_guest_left_out(owner):
    owner.add("v")
    old_pin = owner.pin.signing_key
    new_pin = pin_line(publish_next(owner.directory, os.urandom))
    before = owner.service
    use_next(owner.directory)
    with replica(owner) as after:

        class Midway:
            """The guest was told the old key; the server it comes back to uses the new one."""

            def challenge(self, request, peer):
                return before.challenge(request, peer)

            def release(self, request, peer):
                return after.release(request, peer)

        with serving(Midway(), read_tls(owner.directory)) as address:
            only_old = owner.config(address, signing_key=old_pin)
            got = (await owner.fetch("v", config=only_old))["v"]
            assert isinstance(got, KeyBundle)
        with serving(after, read_tls(owner.directory)) as address:
            both = owner.config(address, signing_key=old_pin, signing_keys=(new_pin,))
            assert isinstance((await owner.fetch("v", config=both))["v"], KeyBundle)
            only_old = owner.config(address, signing_key=old_pin)
            got = (await owner.fetch("v", config=only_old))["v"]
            assert isinstance(got, BadBundleError)
            assert "not pinned" in got.message
    retire_previous(owner.directory)
    with (
        replica(owner) as retired,
        serving(
            type(
                "Midway",
                (),
                {
                    "challenge": lambda _self, *call: before.challenge(*call),
                    "release": lambda _self, *call: retired.release(*call),
                },
            )(),
            read_tls(owner.directory),
        ) as address,
    ):
        got = (await owner.fetch("v", config=owner.config(address)))["v"]
        assert isinstance(got, BadBundleError)
        assert owner.last().reason == "report-data"


async def test_lease_reaches_the_guest_sealed(owner):
    """Whoever relays the answer can neither read nor stretch it."""
    owner.add("v", release="[release]\nlease_s = 600\n")
    recorded = Recorded(owner)
    request = recorded.message.SerializeToString()
    verdict = recorded.verdict()
    info = protocol.sealed_info(protocol.transcript_hash(request), "v", 1)
    plain = hpke.open_sealed(
        verdict.sealed_bundle,
        recorded.pair.private,
        info,
        error=BadBundleError,
        what="x",
    )
    assert protocol.parse_released(plain, error=BadBundleError).lease_s == 600
    assert owner.last().lease_s == 600
    assert b"lease" not in verdict.sealed_bundle
