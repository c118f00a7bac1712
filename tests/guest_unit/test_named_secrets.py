"""Secrets of their own in the guest: asked for, polled, renewed, never older, forgotten, wiped.

The attester and what holds the content are real; the exchange is a script, time is trio's mock.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tdxd.core.config import Config, KeyReleaseConfig, ServingConfig
from tdxd.core.named_secret import NamedSecret, SecretManifest
from tdxd.core.secret import Secret
from tdxd.errors import (
    DeniedError,
    KeyReleaseError,
    StaleSecretError,
    TdxdError,
    UnreachableError,
    WrongKindError,
)
from tdxd.guest.attest import Attester, Bundles
from tdxd.guest.changes import Changes
from tdxd.guest.events import Events
from tdxd.guest.handover import HandedSecret, descriptors
from tdxd.guest.leased import Leased, LeasedSecret
from tdxd.guest.named_secrets import NamedSecrets
from tdxd.guest.standstill import Standstill
from tdxd.host.sealed_memory import is_sealed, sealed_memory
from tests.fakes import make_bundle

KEY = "ed25519:" + "A" * 43 + "="
POLL_S = 3600.0
CONTENT = b"-----BEGIN a certificate and its key\n"
BACKOFF_MAX_S = 60.0


def config(
    tls: str | None = "web", client_ca: str | None = None, **release: Any
) -> Config:
    return Config(
        key_release=KeyReleaseConfig(
            servers=("127.0.0.1:1",), ca="/ca", signing_key=KEY, **release
        ),
        serving=ServingConfig(
            tls_secret=tls,
            client_ca="secret" if client_ca else None,
            client_ca_secret=client_ca,
        ),
    )


class Server:
    """Answers with what is put into `held`: (generation, content), or an error."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[int, bytes] | TdxdError] = {}
        self.lease_s = 0
        self.asked: list[tuple[float, tuple[str, ...]]] = []
        self.given: list[Leased | LeasedSecret] = []
        self.hangs = False

    async def fetch(self, ids: tuple[str, ...]) -> Bundles:
        self.asked.append((trio.current_time(), ids))
        if self.hangs:
            await trio.sleep_forever()
        answers: dict[str, Leased | LeasedSecret | TdxdError] = {}
        for name in ids:
            found = self.held.get(name, DeniedError(f"no such secret {name}"))
            if isinstance(found, TdxdError):
                answers[name] = found
                continue
            manifest = SecretManifest(
                volume_id=name, generation=found[0], content="tls-pem"
            )
            one = LeasedSecret(
                bundle=NamedSecret(manifest=manifest, secret=Secret(found[1])),
                lease_s=self.lease_s,
                sent_s=trio.current_time(),
            )
            self.given.append(one)
            answers[name] = one
        return answers

    @property
    def times_s(self) -> list[float]:
        return [at_s for at_s, _ in self.asked]


@dataclasses.dataclass
class World:
    """One daemon's worth of what secrets need; `config` may be replaced, as by a reload."""

    server: Server
    config: Config
    nursery: trio.Nursery
    events: Events = dataclasses.field(default_factory=Events)
    changes: Changes = dataclasses.field(default_factory=Changes)
    standstill: Standstill = dataclasses.field(default_factory=Standstill)
    suspended_s: float = 0.0

    def __post_init__(self) -> None:
        self.attester = Attester(self.server.fetch, self.standstill)
        self.secrets = self.make()

    def make(self) -> NamedSecrets:
        return NamedSecrets(
            config=lambda: self.config,
            attester=self.attester,
            changes=self.changes,
            events=self.events,
            standstill=self.standstill,
            nursery=self.nursery,
            boottime_s=lambda: trio.current_time() + self.suspended_s,
        )

    async def settled(self) -> None:
        while not self.secrets.settled:
            await self.changes.after(self.changes.count)

    def error(self) -> TdxdError:
        """Why the last attempt to get `web` failed."""
        failure = self.secrets.failure("web")
        assert failure is not None
        return failure.error

    def names(self) -> list[str]:
        return [str(one["event"]) for one in self.events.after(0)]

    def last(self, event: str) -> dict[str, object]:
        return [one for one in self.events.after(0) if one["event"] == event][-1]


@asynccontextmanager
async def running(
    server: Server,
    first: Config | None = None,
    before: Callable[[World], None] = lambda _: None,
) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        world = World(server, first or config(), nursery)
        before(world)
        nursery.start_soon(world.attester.run)
        nursery.start_soon(world.secrets.run)
        yield world
        world.secrets.close()
        nursery.cancel_scope.cancel()


@pytest.fixture
def server() -> Server:
    made = Server()
    made.held["web"] = (1, CONTENT)
    return made


@pytest.fixture
def run() -> Callable[[Callable[[], Awaitable[None]]], None]:
    """Run on a clock that jumps to the next deadline, so hours take no time."""

    async def in_time(main: Callable[[], Awaitable[None]]) -> None:
        with trio.fail_after(100_000):
            await main()

    def on_mock_clock(main: Callable[[], Awaitable[None]]) -> None:
        trio.run(in_time, main, clock=MockClock(autojump_threshold=0))

    return on_mock_clock


def test_an_answer_for_what_is_configured_no_more_is_not_kept(server, run):
    """It came in the moment in which the reload took the name away."""

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            came, ask = trio.Event(), world.attester.secret

            async def late(secret_id: str) -> LeasedSecret:
                got = await ask(secret_id)
                world.config = config(tls=None)
                world.changes.ring()
                with trio.CancelScope(shield=True):
                    while secret_id in world.secrets._asked:
                        await trio.lowlevel.checkpoint()
                came.set()
                return got

            world.attester.secret = late  # type: ignore[method-assign]
            server.held["web"] = (2, CONTENT + b"2")
            world.secrets.ask_now()
            await came.wait()
            await trio.sleep(1)
            assert all(one.fd < 0 for one in world.secrets.hand_over())
            assert all(one.bundle.secret.wiped for one in server.given)

    run(main)


def test_it_is_asked_for_at_the_start_and_lies_in_sealed_memory(server, run):
    async def main() -> None:
        async with running(server) as world:
            assert not world.secrets.settled
            assert world.secrets.pem("web") is None
            assert world.secrets.tag("web") is None
            await world.settled()
            assert world.secrets.pem("web") == CONTENT
            assert world.secrets.tag("web") == "web@1"
            assert world.secrets.failure("web") is None
            (handed,) = world.secrets.hand_over()
            assert is_sealed(handed.fd)
            with pytest.raises(PermissionError):
                os.pwrite(handed.fd, b"x", 0)
            assert not os.get_inheritable(handed.fd)
            assert [one.bundle.secret.wiped for one in server.given] == [True]
            told = world.last("secret.received")
            assert (told["secret"], told["generation"]) == ("web", 1)
            assert told["sha256"] == hashlib.sha256(CONTENT).hexdigest()[:12]

    run(main)


def test_what_nobody_names_is_not_there(server, run):
    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            assert world.secrets.pem("other") is None
            assert world.secrets.tag("other") is None
            assert world.secrets.failure("other") is None

    run(main)


def test_two_secrets_share_one_exchange(server, run):
    server.held["clients"] = (4, b"a CA")

    async def main() -> None:
        async with running(server, config(client_ca="clients")) as world:
            await world.settled()
            assert [ids for _, ids in server.asked] == [("clients", "web")]
            assert world.secrets.tag("clients") == "clients@4"
            assert world.secrets.pem("clients") == b"a CA"

    run(main)


def test_it_is_polled_and_a_newer_generation_takes_its_place(server, run):
    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            (before,) = world.secrets.hand_over()
            await trio.sleep(4 * POLL_S)
            pauses_s = [
                later - earlier
                for earlier, later in zip(
                    server.times_s, server.times_s[1:], strict=False
                )
            ]
            assert len(pauses_s) >= 3
            assert all(0.9 * POLL_S <= one <= 1.1 * POLL_S + 1 for one in pauses_s)
            assert len(set(pauses_s)) == len(pauses_s)  # with jitter
            assert world.names().count("secret.received") == 1  # nothing new, no event
            assert world.secrets.hand_over() == (before,)
            server.held["web"] = (2, b"another")
            count = world.changes.count
            await trio.sleep(1.2 * POLL_S)
            assert world.changes.count > count
            assert world.secrets.tag("web") == "web@2"
            assert world.secrets.pem("web") == b"another"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(before.fd)

    run(main)


def test_the_pause_is_what_the_configuration_says(server, run):
    async def main() -> None:
        async with running(server, config(secret_poll_s=10.0)) as world:
            await world.settled()
            await trio.sleep(100)
            assert 9 <= len(server.asked) <= 13

    run(main)


@pytest.mark.parametrize(
    "held", [(1, CONTENT), (2, b"the same number, another content")]
)
def test_no_older_generation_and_no_other_content_takes_its_place(server, run, held):
    server.held["web"] = (2, b"newest")

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            server.held["web"] = held
            world.secrets.ask_now()
            assert not world.secrets.settled
            await world.settled()
            assert world.secrets.tag("web") == "web@2"
            assert world.secrets.pem("web") == b"newest"
            failure = world.secrets.failure("web")
            assert failure is not None
            assert isinstance(failure.error, StaleSecretError)
            assert "tdx-keyd secret put" in failure.error.hint
            assert failure.until_s - failure.since_s >= 300
            assert [one.bundle.secret.wiped for one in server.given] == [True, True]
            assert world.last("secret.failed")["code"] == "secret-stale"
            server.held["web"] = (3, b"mended")
            world.secrets.ask_now()
            await world.settled()
            assert world.secrets.tag("web") == "web@3"
            assert world.secrets.failure("web") is None

    run(main)


def test_none_takes_its_place_either_once_it_was_forgotten(server, run):
    """Neither when it is configured again, nor after its lease."""
    server.held["web"] = (2, b"newest")

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            world.config = config(tls=None)
            world.changes.ring()
            await wait_all_tasks_blocked()
            assert world.secrets.tag("web") is None
            assert world.secrets.settled
            server.held["web"] = (1, CONTENT)
            world.config = config()
            world.changes.ring()
            await world.settled()
            assert world.secrets.tag("web") is None
            assert isinstance(world.error(), StaleSecretError)

    run(main)


def test_failures_back_off_and_the_content_stays(server, run):
    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            server.held["web"] = UnreachableError("no key server")
            began = len(server.asked)
            world.secrets.ask_now()
            await trio.sleep(600)
            pauses_s = [
                later - earlier
                for earlier, later in zip(
                    server.times_s[began:], server.times_s[began + 1 :], strict=False
                )
            ]
            assert len(pauses_s) > 5
            assert max(pauses_s) <= BACKOFF_MAX_S + 1
            assert world.secrets.pem("web") == CONTENT
            failure = world.secrets.failure("web")
            assert failure is not None
            assert failure.error.message == "no key server"
            assert failure.attempts == len(server.asked) - began
            server.held["web"] = (2, b"back")
            await trio.sleep(70)
            assert world.secrets.tag("web") == "web@2"
            assert world.secrets.failure("web") is None

    run(main)


def test_a_refusal_is_asked_about_slowly_but_at_once_when_told(server, run):
    server.held["web"] = DeniedError("no policy")

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            await trio.sleep(299)
            assert len(server.asked) == 1
            world.secrets.network_came_up()  # no network mends it
            await trio.sleep(0.5)
            assert len(server.asked) == 1
            server.held["web"] = (1, CONTENT)
            world.secrets.ask_now()
            await world.settled()
            assert world.secrets.tag("web") == "web@1"

    run(main)


def test_a_network_that_comes_up_is_asked_at_once(server, run):
    server.held["web"] = UnreachableError("no route")

    async def main() -> None:
        async with running(server, config(backoff_max_s=1e6)) as world:
            await trio.sleep(2000)
            began_s = trio.current_time()
            server.held["web"] = (1, CONTENT)
            world.secrets.network_came_up()
            while world.secrets.tag("web") is None:
                await world.changes.after(world.changes.count)
            assert trio.current_time() - began_s < 1

    run(main)


def test_a_wish_during_an_exchange_is_asked_again(server, run):
    """What is under way may be older than what was put meanwhile."""

    async def main() -> None:
        async with running(server) as world:
            await wait_all_tasks_blocked()
            world.secrets.ask_now()
            await world.settled()
            assert len(server.asked) == 2
            assert trio.current_time() - server.times_s[0] < 1

    run(main)


def test_a_volume_under_its_id_is_refused_and_wiped(server, run):
    async def main() -> None:
        volume = Leased(bundle=make_bundle("web"))

        async def fetch(ids: tuple[str, ...]) -> Bundles:
            return dict.fromkeys(ids, volume)

        server.fetch = fetch
        async with running(server) as world:
            await world.settled()
            assert world.secrets.tag("web") is None
            error = world.error()
            assert isinstance(error, WrongKindError)
            assert error.message == (
                "secret web: the key server has a volume of this id, no secret"
            )
            assert volume.bundle.secret.wiped

    run(main)


def test_a_secret_under_a_volumes_id_is_refused_and_wiped(server, run):
    async def main() -> None:
        async with running(server, config(tls=None)) as world:
            with pytest.raises(WrongKindError, match="a secret of this id, no volume"):
                await world.attester.bundle("web")
            assert [one.bundle.secret.wiped for one in server.given] == [True]

    run(main)


def test_each_who_asks_gets_a_copy_of_its_own(run):
    bundle = make_bundle("v")

    async def main() -> None:
        async def fetch(ids: tuple[str, ...]) -> Bundles:
            return dict.fromkeys(ids, Leased(bundle=bundle, older=(make_bundle("v"),)))

        attester = Attester(fetch, Standstill())
        got: list[Leased] = []

        async def ask() -> None:
            got.append(await attester.bundle("v"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(attester.run)
            async with trio.open_nursery() as asking:
                asking.start_soon(ask)
                asking.start_soon(ask)
            nursery.cancel_scope.cancel()
        got[0].wipe()
        assert [one.secret.wiped for one in got[1].bundles] == [False, False]
        assert got[1].bundle.secret.reveal() == b"k" * 64

    run(main)


# --- leases -------------------------------------------------------------------


def test_a_lease_is_renewed_in_time(server, run):
    server.lease_s = 1000

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            assert world.secrets.shown()[0].lease_left_s == pytest.approx(1000, abs=1)
            await trio.sleep(3000)
            assert world.secrets.tag("web") == "web@1"
            pauses_s = [
                later - earlier
                for earlier, later in zip(
                    server.times_s, server.times_s[1:], strict=False
                )
            ]
            assert all(400 <= one <= 601 for one in pauses_s)
            assert "secret.renewed" in world.names()
            assert world.names().count("secret.received") == 1

    run(main)


def test_when_it_runs_out_the_content_is_forgotten(server, run):
    server.lease_s = 1000

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            (held,) = world.secrets.hand_over()
            server.held["web"] = DeniedError("revoked", hint="tdx-keyd explain 7")
            await trio.sleep(990)
            assert world.secrets.tag("web") == "web@1"  # until then it is there
            await trio.sleep(20)
            assert world.secrets.tag("web") is None
            assert world.secrets.pem("web") is None
            assert world.error().message == "revoked"
            told = world.last("secret.expired")
            assert (told["secret"], told["generation"]) == ("web", 1)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(held.fd)
            shown = world.secrets.shown()[0]
            assert (shown.generation, shown.sha256) == (None, "")
            server.held["web"] = (1, CONTENT)  # the same one is let be used again
            world.secrets.ask_now()
            await world.settled()
            assert world.secrets.tag("web") == "web@1"

    run(main)


def test_a_lease_goes_on_while_the_machine_is_suspended(server, run):
    server.lease_s = 1000

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            server.hangs = True
            world.suspended_s = 1001
            assert world.secrets.tag("web") is None  # at once, before anybody looked
            assert world.secrets.pem("web") is None
            await trio.sleep(10)
            assert "secret.expired" in world.names()

    run(main)


# --- standstill, re-exec, end ---------------------------------------------------


def test_it_goes_over_an_exec_by_descriptor(server, run):
    handed: tuple[HandedSecret, ...] = ()
    server.lease_s = 1000

    async def first() -> None:
        nonlocal handed
        async with running(server) as world:
            await world.settled()
            handed = tuple(
                dataclasses.replace(one, fd=os.dup(one.fd))
                for one in world.secrets.hand_over()
            )

    async def second() -> None:
        assert list(descriptors(handed)) == [handed[0].fd]
        async with running(
            server, before=lambda world: world.secrets.adopt(handed)
        ) as world:
            assert world.secrets.tag("web") == "web@1"
            assert world.secrets.pem("web") == CONTENT
            assert world.secrets.settled
            assert world.secrets.shown()[0].lease_left_s is not None
            assert len(server.asked) == 1
            server.held["web"] = (1, b"older program's number")
            world.secrets.ask_now()
            await world.settled()
            assert isinstance(world.error(), StaleSecretError)

    run(first)
    run(second)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handed[0].fd)


def test_what_was_forgotten_hands_over_how_new_it_was(server, run):
    server.held["web"] = (7, CONTENT)

    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            world.config = config(tls=None)
            world.changes.ring()
            await wait_all_tasks_blocked()
            (handed,) = world.secrets.hand_over()
            assert (handed.fd, handed.generation) == (-1, 7)
            server.held["web"] = (6, CONTENT)
        async with running(
            server, before=lambda world: world.secrets.adopt((handed,))
        ) as world:
            await world.settled()
            assert world.secrets.tag("web") is None
            assert isinstance(world.error(), StaleSecretError)

    run(main)


@pytest.mark.parametrize("what", ["another content", "not sealed"])
def test_what_is_not_as_it_was_handed_over_is_asked_for(server, run, what):
    fd = sealed_memory("x", b"another content")
    if what == "not sealed":
        os.close(fd)
        fd = os.memfd_create("x")
        os.write(fd, CONTENT)
    handed = HandedSecret(
        secret_id="web",
        generation=1,
        content="tls-pem",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        since="",
        fd=fd,
        lease=None,
    )

    async def main() -> None:
        async with running(
            server, before=lambda world: world.secrets.adopt((handed,))
        ) as world:
            assert world.secrets.tag("web") is None
            assert "secret.not_adopted" in world.names()
            await world.settled()
            assert world.secrets.pem("web") == CONTENT

    run(main)


def test_nothing_is_under_way_while_the_daemon_stands_still(server, run):
    server.hangs = True

    async def main() -> None:
        async with running(server) as world:
            await trio.sleep(1)
            assert len(server.asked) == 1
            world.standstill.freeze()
            world.attester.give_up()
            await world.standstill.reached(1)
            world.secrets.ask_now()
            await trio.sleep(30)
            assert len(server.asked) == 1
            server.hangs = False
            world.standstill.release()
            await world.settled()
            assert world.secrets.tag("web") == "web@1"

    run(main)


def test_at_the_end_no_content_is_open(server, run):
    async def main() -> None:
        before = set(os.listdir("/proc/self/fd"))
        async with running(server) as world:
            await world.settled()
            world.secrets.close()
            world.secrets.close()
            assert world.secrets.pem("web") is None
            gc.collect()
            after = set(os.listdir("/proc/self/fd"))
            assert not [one for one in after - before if _is_secret(one)]

    run(main)


def _is_secret(fd: str) -> bool:
    try:
        return "tdxd:secret" in os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False


def test_nothing_shows_the_content(server, run):
    async def main() -> None:
        async with running(server) as world:
            await world.settled()
            server.held["web"] = KeyReleaseError("no")
            world.secrets.ask_now()
            await world.settled()
            (handed,) = world.secrets.hand_over()
            text = f"{world.secrets!r} {handed!r} {world.secrets.shown()!r}"
            text += repr(world.events.after(0))
            assert "BEGIN" not in text
            assert "web@1" in repr(world.secrets)

    run(main)


def test_the_watchdog_sees_it_look(server, run):
    async def main() -> None:
        async with running(server) as world:
            for _ in range(20):
                await trio.sleep(7)
                assert trio.current_time() - world.secrets.beat_s <= 5.1

    run(main)
