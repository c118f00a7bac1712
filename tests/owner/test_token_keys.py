"""Token keys in the store: shared by replicas, rotated, forgotten when nothing needs them."""

from __future__ import annotations

import contextlib
import dataclasses
import os

import pytest

from tdxd.core import keyrelease as protocol
from tdxd.errors import RemoteProtocolError
from tdxd.owner.server.init import InitOptions, init_store
from tdxd.owner.server.token_keys import (
    PUBLISH_S,
    REFRESH_S,
    RETAIN_S,
    TokenKeys,
    drop_before_s,
    rotate_token_key,
    wrap_token_key,
)
from tdxd.owner.store.kek import read_kek
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import Store

DAY_S = 86400


class Replica:
    """One process with the store's keys, and its own clock."""

    def __init__(self, directory, now_s):
        self.store = Store.open(directory)
        self.now_s = now_s
        self.keys = TokenKeys(
            self.store,
            read_kek(directory / "kek.private"),
            rotate_s=DAY_S,
            clock=lambda: self.now_s,
            random_bytes=os.urandom,
        )

    def token(self):
        claims = protocol.TokenClaims(
            nonce=os.urandom(32), expiry_s=int(self.now_s) + 120, deployment=bytes(16)
        )
        key = self.keys.sealing()
        return protocol.encode_token(claims, key=key, iv=os.urandom(12))

    def opens(self, token):
        self.keys.learn(token)
        try:
            protocol.decode_token(token, keys=self.keys.opening())
        except RemoteProtocolError:
            return False
        return True


@pytest.fixture
def directory(tmp_path):
    options = InitOptions(names=("127.0.0.1",), listen="127.0.0.1:0")
    init_store(tmp_path / "store", options, os.urandom)
    return tmp_path / "store"


@pytest.fixture
def replicas(directory):
    with Store.open(directory) as store:
        start_s = store.token_keys()[0].made_at_s
    made = [Replica(directory, start_s + 60) for _ in range(2)]
    yield made
    for one in made:
        one.store.close()


def pass_time(replicas, seconds):
    for one in replicas:
        one.now_s += seconds


def test_two_replicas_open_each_others_tokens(replicas):
    first, second = replicas
    assert second.opens(first.token())
    assert first.opens(second.token())


def test_key_is_rotated_by_its_age(replicas):
    first, second = replicas
    old = first.token()
    pass_time(replicas, DAY_S)
    assert first.token()[:8] == old[:8]  # published, and not used yet
    assert len(first.keys.opening()) == 2
    pass_time(replicas, PUBLISH_S)
    assert first.token()[:8] == second.token()[:8] != old[:8]
    assert len(first.store.token_keys()) == 2  # the second made none of its own


def test_rotation_by_hand_reaches_running_servers(directory, replicas):
    first, second = replicas
    old = first.token()
    with Store.open(directory) as store:
        key_id = rotate_token_key(directory, store, int(first.now_s), os.urandom)
    assert first.token()[:8] == old[:8]
    pass_time(replicas, PUBLISH_S + REFRESH_S)
    assert first.token()[:8] == key_id
    assert second.opens(first.token())


def test_old_key_opens_until_its_last_token_expires_and_then_never(replicas):
    first, second = replicas
    old = first.token()
    pass_time(replicas, DAY_S)
    first.token()
    pass_time(replicas, PUBLISH_S - 1)
    last = second.token()
    assert last[:8] == old[:8]
    pass_time(replicas, 1)
    assert first.token()[:8] == second.token()[:8] != old[:8]
    pass_time(replicas, protocol.TOKEN_LIFETIME_MAX_S)
    assert first.opens(last)
    assert second.opens(last)
    pass_time(replicas, DAY_S)  # the next rotation sweeps
    first.token()
    pass_time(replicas, REFRESH_S)
    for one in replicas:
        assert not one.opens(last)
        assert len(one.keys.opening()) == 2
    assert len(first.store.token_keys()) == 2


def test_new_key_is_learnt_before_the_next_refresh(directory, replicas):
    first, second = replicas
    for one in replicas:
        one.token()
    key = os.urandom(32)
    row = wrap_token_key(
        read_kek(directory / "kek.private").public, key, int(first.now_s)
    )
    with first.store.transaction() as change:
        change.add_token_key(row)
    claims = protocol.TokenClaims(nonce=bytes(32), expiry_s=0, deployment=bytes(16))
    token = protocol.encode_token(claims, key=key, iv=bytes(12))
    assert not second.opens(token)  # asked a moment ago
    second.now_s += 1.0
    assert second.opens(token)


def test_invented_key_ids_do_not_make_the_store_busy(replicas):
    first, _ = replicas
    first.token()
    reads = []
    ask = first.store.token_keys

    def counted():
        reads.append(first.now_s)
        return ask()

    first.store.token_keys = counted
    for _ in range(1000):
        first.now_s += 0.01
        assert not first.opens(os.urandom(protocol.TOKEN_BYTES))
    assert len(reads) <= 11


def test_clock_that_goes_back_reads_again_and_seals_on(replicas):
    first, second = replicas
    first.token()
    first.now_s -= 10 * DAY_S
    assert second.opens(first.token())


def test_row_of_somebody_with_the_public_half_only_is_no_key(directory, replicas):
    """It can be sealed by anybody; the row's MAC cannot be made."""
    first, _ = replicas
    first.token()
    key = os.urandom(32)
    row = wrap_token_key(
        read_kek(directory / "kek.private").public, key, int(first.now_s)
    )
    first.store._sqlite.execute(
        "INSERT INTO token_keys (key_id, wrapped, made_at_s, mac) VALUES (?, ?, ?, ?)",
        (row.key_id, row.wrapped, row.made_at_s, bytes(32)),
    )
    first.now_s += REFRESH_S
    with contextlib.suppress(StoreIntegrityError):
        first.token()
    assert key not in first.keys.opening()


def test_wrapped_key_under_another_id_or_time_is_not_opened(directory, replicas):
    first, _ = replicas
    kek = read_kek(directory / "kek.private")
    good = wrap_token_key(kek.public, os.urandom(32), 1000)
    other = wrap_token_key(kek.public, os.urandom(32), 1000)
    assert first.keys._open(good) is not None
    assert first.keys._open(dataclasses.replace(good, made_at_s=1001)) is None
    assert first.keys._open(dataclasses.replace(good, wrapped=other.wrapped)) is None
    lied = protocol.token_key_id(os.urandom(32))
    assert first.keys._open(dataclasses.replace(good, key_id=lied)) is None


def test_no_secret_of_a_key_in_the_database(directory, replicas):
    first, _ = replicas
    key = first.keys.sealing() if first.token() else b""
    data = b"".join(path.read_bytes() for path in directory.glob("store.sqlite3*"))
    assert key not in data
    assert protocol.token_key_id(key) in data


def test_what_can_go():
    assert drop_before_s([], 10_000) == 0
    assert drop_before_s([1000, 9999], 10_000) == 1000  # older ones than the first
    assert drop_before_s([1000, 10_000 - RETAIN_S], 10_000) == 10_000 - RETAIN_S
    assert drop_before_s([1000, 10_001 - RETAIN_S], 10_000) == 1000
