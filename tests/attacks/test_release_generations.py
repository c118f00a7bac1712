"""An older generation of a volume: served only where the owner's policy lets it be.

The host keeps every image that it ever saw, and offers the guest whichever it likes.
"""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.named_secret import (
    NamedSecret,
    SecretManifest,
    parse_released_bundle,
)
from tdxd.core.secret import Secret
from tdxd.errors import BadBundleError, DeniedError
from tdxd.guest import keyfetch
from tdxd.guest.leased import Leased
from tdxd.owner.store.admin import set_policy
from tdxd.proto import keyrelease_pb2
from tests.keyserver import make_bundle, opened_owner, policy_text, serving


@pytest.fixture
def owner(tmp_path):
    with opened_owner(tmp_path) as made:
        yield made


def rules(line, rest=""):
    return f"[release]\ngenerations = {line}\n{rest}"


def policy(owner, line, rest=""):
    file = owner.directory.parent / "policy.toml"
    file.write_text(policy_text(owner.platform, release=rules(line, rest)))
    set_policy(owner.directory, "v", file, 0)


async def released(owner):
    """The generations that a guest gets the keys of, newest first."""
    got = (await owner.fetch_leased("v"))["v"]
    assert isinstance(got, Leased), got
    return [one.manifest.generation for one in got.bundles]


@pytest.fixture
def three(owner):
    for number in (1, 2, 3):
        owner.add("v", number)
    return owner


async def test_only_the_current_generation_unless_the_policy_says_more(three):
    assert await released(three) == [3]
    policy(three, '"current"')
    assert await released(three) == [3]
    assert three.last().generation == 3
    assert "generations" not in [one.name for one in three.last().checks]


async def test_a_window_and_nothing_before_it(owner):
    sealed = {number: owner.add("v", number) for number in (1, 2, 3)}
    policy(owner, 2, "lease_s = 3600\n")
    got = (await owner.fetch_leased("v"))["v"]
    assert isinstance(got, Leased)
    assert got.lease_s == 3600
    for one, number in zip(got.bundles, (3, 2), strict=True):
        assert one.manifest == sealed[number].manifest
        assert one.secret.matches(sealed[number].secret)
    assert owner.last().generation == 3
    seen = {one.name: (one.expected, one.actual) for one in owner.last().checks}
    assert seen["generations"] == ("the newest 2", "3, 2")


async def test_a_removed_generation_is_in_no_window(three):
    with three.store.transaction() as change:
        change.remove("v", 2, 7)
    policy(three, 2)
    assert await released(three) == [3, 1]
    policy(three, "[2, 3]")
    assert await released(three) == [3]


async def test_a_list_holds_a_newer_generation_back(three):
    policy(three, "[1, 2]")
    assert await released(three) == [2, 1]
    assert three.last().generation == 2
    policy(three, "[1]")
    assert await released(three) == [1]


async def test_none_of_the_list_is_there(three):
    policy(three, "[7, 8]")
    got = (await three.fetch("v"))["v"]
    assert isinstance(got, DeniedError)
    assert three.last().reason == "no-generation"
    assert three.failed()["generations"] == (
        "8, 7",
        "none of those in the store: 3, 2, 1",
    )


async def test_one_of_the_window_that_does_not_open_denies_the_volume(three):
    policy(three, 2)
    three.store._sqlite.execute(
        "UPDATE generations SET wrapped = x'00' WHERE generation = 2"
    )
    got = (await three.fetch("v"))["v"]
    assert isinstance(got, DeniedError)
    assert three.last().reason == "store"


async def test_more_generations_than_a_release_holds(owner):
    for number in range(1, 12):
        owner.add("v", number)
    policy(owner, 8)
    assert await released(owner) == [11, 10, 9, 8, 7, 6, 5, 4]


class Sender:
    """A server with the owner's signing key that releases whatever it is told to."""

    def __init__(self, owner, *bundles):
        self._owner = owner
        self._plain = protocol.encode_released(
            bundles[0].encode(), 60, [one.encode() for one in bundles[1:]]
        )
        self._generation = bundles[0].manifest.generation

    def challenge(self, request, context):
        return self._owner.service.challenge(request, context)

    def release(self, request, _context):
        key = Ed25519PrivateKey.from_private_bytes(
            (self._owner.directory / "signing.key").read_bytes()
        )
        asked = keyrelease_pb2.ReleaseRequest.FromString(request)
        digest = protocol.transcript_hash(request)
        sealed = hpke.seal(
            self._plain,
            hpke.parse_public_key(asked.public_key),
            protocol.sealed_info(digest, "v", self._generation),
        )
        fields = protocol.VerdictFields(
            volume_id="v", generation=self._generation, status=1, sealed_bundle=sealed
        )
        message = keyrelease_pb2.ReleaseResponse(
            signature=protocol.sign_answer(key, digest, [fields])
        )
        message.verdicts.add(
            volume_id="v",
            generation=self._generation,
            status=1,
            sealed_bundle=sealed,
        )
        return message.SerializeToString()


@pytest.mark.parametrize(
    "sent",
    [
        [("v", 3), ("w", 2)],
        [("v", 3), ("v", 3)],
        [("v", 3), ("v", 4)],
        [("v", 3), ("v", 1), ("v", 2)],
        [("v", 3), ("v", 2), ("w", 1)],
    ],
)
async def test_older_bundles_that_are_none_are_refused_and_wiped(
    owner, sent, monkeypatch
):
    """Only the owner could sign this; the guest still checks what it is."""
    owner.add("v")
    read = []

    def seen(*args, **fields):
        read.append(parse_released_bundle(*args, **fields))
        return read[-1]

    monkeypatch.setattr(keyfetch, "parse_released_bundle", seen)
    sender = Sender(owner, *(make_bundle(*one) for one in sent))
    with serving(sender, owner.server_tls()) as address:
        got = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert isinstance(got, BadBundleError)
    assert f"holds volume '{sent[-1][0]}' generation {sent[-1][1]}" in got.message
    assert len(read) == len(sent)
    assert all(one.secret.wiped for one in read)


def named_secret(generation):
    manifest = SecretManifest(volume_id="v", generation=generation, content="file")
    return NamedSecret(manifest=manifest, secret=Secret(b"open sesame"))


@pytest.mark.parametrize("older", [named_secret, lambda one: make_bundle("v", one)])
async def test_a_secret_that_does_not_come_alone_is_refused_and_wiped(
    owner, older, monkeypatch
):
    owner.add("v")
    read = []

    def seen(*args, **fields):
        read.append(parse_released_bundle(*args, **fields))
        return read[-1]

    monkeypatch.setattr(keyfetch, "parse_released_bundle", seen)
    sender = Sender(owner, named_secret(3), older(2))
    with serving(sender, owner.server_tls()) as address:
        got = (await owner.fetch("v", config=owner.config(address)))["v"]
    assert isinstance(got, BadBundleError)
    assert "a secret comes alone" in got.message
    assert [one.secret.wiped for one in read] == [True, True]


async def test_older_bundles_reach_the_guest_in_order(owner):
    owner.add("v")
    sender = Sender(owner, *(make_bundle("v", one) for one in (9, 4, 2)))
    with serving(sender, owner.server_tls()) as address:
        got = (await owner.fetch_leased("v", config=owner.config(address)))["v"]
    assert isinstance(got, Leased)
    assert [one.manifest.generation for one in got.bundles] == [9, 4, 2]
