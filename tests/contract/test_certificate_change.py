"""Certificates that change while the real front runs: nobody notices but new connections."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import trio

from tdxd.core.plan import ServingState
from tdxd.errors import DataError, NotReadyError
from tests.certificates import self_signed
from tests.contract.certified import Certified, certified, leaf_of

pytestmark = pytest.mark.root

OLD, OLD_PUBLIC = self_signed("localhost")
NEW, NEW_PUBLIC = self_signed("localhost", subject="new")
OTHER, OTHER_PUBLIC = self_signed("localhost", subject="other")


@pytest.fixture
async def serving(front_dir: Path, host, backends) -> AsyncIterator[Certified]:
    secrets = {"web": OLD}
    async with certified(host, front_dir, secrets=secrets, tls_secret="web") as made:
        yield made


class Steady:
    """Callers that never pause, on connections of before and on new ones."""

    def __init__(
        self, serving: Certified, nursery: trio.Nursery, *roots: bytes
    ) -> None:
        """Those of before trust `roots`."""
        self._roots = {"old": roots, "new": (OLD_PUBLIC, NEW_PUBLIC)}
        self.calls = {"old": 0, "new": 0}
        self.failed: list[str] = []
        self._stop = trio.Event()
        self._serving = serving
        for kind in ("old", "old", "new"):
            nursery.start_soon(self._send, kind)

    async def _send(self, kind: str) -> None:
        channel = self._serving.channel(*self._roots[kind])
        while not self._stop.is_set():
            try:
                await self._serving.call(channel)
                self.calls[kind] += 1
            except grpc.RpcError as exc:
                self.failed.append(f"{kind}: {exc.code()} {exc.details()}")
            if kind == "new":
                channel.close()
                channel = self._serving.channel(*self._roots[kind])
        channel.close()

    async def more(self, calls: int) -> None:
        """Wait for so many more calls of each kind."""
        wanted = {kind: count + calls for kind, count in self.calls.items()}
        with trio.fail_after(20):
            while any(self.calls[kind] < count for kind, count in wanted.items()):
                assert self.failed == []
                await trio.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()


async def test_a_new_secret_is_shown_and_no_request_fails(serving: Certified) -> None:
    """Callers of before trust the old certificate alone: their connections go on."""
    front = serving.one.front
    assert front is not None
    before = front.served_key
    async with trio.open_nursery() as nursery:
        steady = Steady(serving, nursery, OLD_PUBLIC)
        await steady.more(20)
        serving.put("web", NEW)
        await serving.until_renewed()
        assert await serving.shown() == leaf_of(NEW_PUBLIC)
        await steady.more(20)
        steady.stop()
    assert steady.failed == []
    assert serving.one.front is front
    assert front.served_key not in (before, b"")
    assert front.certificate_sha256 == leaf_of(NEW_PUBLIC)
    assert front.sources == ("secret web@2",)
    with serving.channel(OLD_PUBLIC) as channel, pytest.raises(grpc.RpcError):
        await serving.call(channel, timeout_s=1)  # nothing new trusts what was replaced


async def test_a_hundred_changes_leak_nothing(serving: Certified) -> None:
    """No descriptor, here or in the front, and no change is lost."""

    def descriptors() -> tuple[int, int]:
        front = serving.one.front
        assert front is not None
        theirs = len(os.listdir(f"/proc/{front.child.pid}/fd"))
        return len(os.listdir("/proc/self/fd")), theirs

    await serving.shown()
    before = descriptors()
    for number in range(100):
        serving.put("web", (NEW, OLD)[number % 2])
        await serving.until_renewed(number + 1)
    assert await serving.shown() == leaf_of(OLD_PUBLIC)
    serving.put("web", NEW)
    await serving.until_renewed(101)
    assert await serving.shown() == leaf_of(NEW_PUBLIC)
    after = descriptors()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2


BAD = {
    "garbage": b"garbage\n",
    "empty": b"",
    "another's key": OLD_PUBLIC + NEW.removesuffix(NEW_PUBLIC),
    "no key": NEW_PUBLIC,
}


@pytest.mark.parametrize("what", BAD)
async def test_what_cannot_be_used_is_refused_and_the_old_one_goes_on(
    serving: Certified, what: str
) -> None:
    front = serving.one.front
    serving.put("web", BAD[what])
    await serving.until(lambda: serving.one.not_renewed is not None)
    failure = serving.one.not_renewed
    assert failure is not None
    assert isinstance(failure.error, DataError)
    assert failure.error.message.startswith("secret web@2: ")
    assert (serving.one.state, serving.one.serving) == (ServingState.READY, True)
    assert serving.one.settled
    assert await serving.shown() == leaf_of(OLD_PUBLIC)
    serving.put("web", NEW)
    await serving.until_renewed()
    assert await serving.shown() == leaf_of(NEW_PUBLIC)
    assert serving.one.not_renewed is None
    assert serving.one.front is front


async def test_haproxys_own_refusal_changes_nothing_and_ends_its_transaction(
    serving: Certified,
) -> None:
    front = serving.one.front
    assert front is not None
    no_key = NEW.replace(b"PRIVATE KEY", b"SECRET KEYS")
    with pytest.raises(DataError, match="refuses to commit ssl cert") as caught:
        await front.api.set_certificates(no_key, None)
    assert "BEGIN" not in caught.value.message
    assert "*" not in await front.api.command("show ssl cert")
    assert await serving.shown() == leaf_of(OLD_PUBLIC)
    await front.api.set_certificates(NEW, None)
    assert await serving.shown() == leaf_of(NEW_PUBLIC)


async def test_a_front_that_is_killed_comes_back_with_the_new_certificate(
    serving: Certified,
) -> None:
    serving.put("web", NEW)
    await serving.until_renewed()
    await serving.kill_front()
    assert await serving.shown() == leaf_of(NEW_PUBLIC)


async def test_one_that_is_killed_while_the_new_one_is_bad_has_the_last_good_one(
    serving: Certified,
) -> None:
    serving.put("web", NEW)
    await serving.until_renewed()
    serving.put("web", b"garbage")
    await serving.until(lambda: serving.one.not_renewed is not None)
    await serving.kill_front()
    assert await serving.shown() == leaf_of(NEW_PUBLIC)
    assert serving.one.not_renewed is not None
    front = serving.one.front
    assert front is not None
    assert front.sources == ("secret web@2",)


async def test_a_chain_too_long_for_a_command_is_taken_by_another_front(
    serving: Certified,
) -> None:
    front = serving.one.front
    long = NEW + NEW_PUBLIC * 40
    assert len(long) > 16384
    async with trio.open_nursery() as nursery:
        steady = Steady(serving, nursery, OLD_PUBLIC, NEW_PUBLIC)
        await steady.more(5)
        serving.put("web", long)
        await serving.until(lambda: serving.one.front not in (None, front))
        await serving.until_up()
        assert await serving.shown() == leaf_of(NEW_PUBLIC)
        await steady.more(5)
        steady.stop()
    assert steady.failed == []


async def test_a_secret_taken_away_ends_the_front_until_it_is_back(
    serving: Certified,
) -> None:
    """Its lease ran out: the certificate must not be used any longer."""
    serving.take_away("web")
    await serving.until(lambda: serving.one.front is None)
    await serving.until(lambda: serving.one.failure is not None)
    assert serving.one.failure is not None
    assert isinstance(serving.one.failure.error, NotReadyError)
    assert "secret web, which the front needs" in serving.one.failure.error.message
    serving.contents["web"] = (5, NEW)
    serving.one.retry_now()
    await serving.until_up()
    assert await serving.shown() == leaf_of(NEW_PUBLIC)


async def test_a_new_generation_of_the_volume_brings_its_certificate(
    front_dir: Path, host, backends
) -> None:
    async with certified(host, front_dir, sealed=OLD) as serving:
        front = serving.one.front
        assert front is not None
        assert front.sources == ("volume m@1",)
        serving.seal(2, NEW)
        serving.add("b", (serving.volume(2),))
        serving.served = (serving.volume(2),)
        serving.changes.ring()
        await serving.until_renewed()
        await serving.until(lambda: list(serving.one.servers) == ["b"])
        assert await serving.shown() == leaf_of(NEW_PUBLIC)
        assert serving.one.front is front
        assert front.active == "b"
        serving.revoked = frozenset({("m", 1)})  # which it does not use any more
        serving.changes.ring()
        await serving.until_up()
        assert serving.one.front is front


# --- client certificates ---


@pytest.fixture
async def closed(front_dir: Path, host, backends) -> AsyncIterator[Certified]:
    """A front that only owners of OLD may use."""
    async with certified(
        host,
        front_dir,
        secrets={"web": OTHER, "clients": OLD_PUBLIC},
        tls_secret="web",
        client_ca="secret",
        client_ca_secret="clients",
    ) as made:
        yield made


def key_file(directory: Path, name: str, pem: bytes) -> Path:
    path = directory / f"{name}.pem"
    path.write_bytes(pem)
    return path


async def test_other_clients_are_let_in_and_those_of_before_no_more(
    closed: Certified, tmp_path: Path
) -> None:
    """Nor by a session of before; only connections that are open go on."""
    front = closed.one.front
    before = closed.context(key_file(tmp_path, "old", OLD))
    after = closed.context(key_file(tmp_path, "new", NEW))
    with closed.visit(before) as kept:
        assert kept.answered()
        session = kept.session
        assert session is not None
        assert closed.lets_in(before, session)
        assert not closed.lets_in(after)
        closed.put("clients", NEW_PUBLIC)
        await closed.until_renewed()
        assert closed.lets_in(after)
        assert not closed.lets_in(before)
        assert not closed.lets_in(before, session)
        assert kept.answered()
    assert closed.one.front is front


async def test_garbage_as_authority_leaves_the_certificate_unchanged_too(
    closed: Certified, tmp_path: Path
) -> None:
    """All or nothing, though the certificate itself is good."""
    closed.contents["clients"] = (2, b"garbage")
    closed.put("web", NEW)
    await closed.until(lambda: closed.one.not_renewed is not None)
    assert closed.one.not_renewed is not None
    assert closed.one.not_renewed.error.message.startswith("secret clients@2: ")
    client = closed.context(key_file(tmp_path, "old", OLD))
    with closed.visit(client) as one:
        assert one.answered()
        assert one.certificate == leaf_of(OTHER_PUBLIC)


async def test_a_front_whose_clients_need_certificates_now_is_another_one(
    serving: Certified, tmp_path: Path
) -> None:
    front = serving.one.front
    serving.contents["clients"] = (1, NEW_PUBLIC)
    config = serving.one.config
    assert config.serving is not None
    strict = dataclasses.replace(
        config.serving, client_ca="secret", client_ca_secret="clients"
    )
    serving.one.config = dataclasses.replace(config, serving=strict)
    serving.changes.ring()
    await serving.until(lambda: serving.one.front not in (None, front))
    await serving.until_up()
    assert not serving.lets_in(serving.context())
    assert serving.lets_in(serving.context(key_file(tmp_path, "new", NEW)))
