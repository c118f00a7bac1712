"""Attacks on what follows a release: leases, the clock, and the record of what a guest serves."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.config import PlatformConfig
from tdxd.core.decode import encode_canonical
from tdxd.core.plan import VolumeState
from tdxd.core.runtime_log import RuntimeEvent
from tdxd.core.runtime_record import RuntimeHistory, parse_history
from tdxd.errors import BadBundleError, DeniedError, RemoteProtocolError
from tdxd.guest.attest import Bundles
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.daemon import Daemon
from tdxd.guest.events import Events
from tdxd.guest.keyfetch import fetch_bundles
from tdxd.guest.leased import Leased
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.host.ports import Host
from tdxd.owner.store.admin import set_policy
from tdxd.proto import keyrelease_pb2
from tdxd.sim.platform import SimPlatform
from tests.daemon.test_daemon import World, state
from tests.fakes import FakeBoottime
from tests.keyserver import (
    Guest,
    Owner,
    make_bundle,
    opened_owner,
    policy_text,
    serving,
)

ROOT = Path(__file__).parents[2]
LEASE_S = 3600
LEASED = f"[release]\nlease_s = {LEASE_S}\n"


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    directory = tmp_path / "owner"
    directory.mkdir()
    with opened_owner(directory) as made:
        yield made


class SimRtmr:
    """RTMR3 of the simulated platform, without a file system."""

    def __init__(self, platform: SimPlatform) -> None:
        self._platform = platform

    def value(self) -> bytes:
        return self._platform.rtmrs[3]

    def check(self) -> None:
        pass

    def extend(self, digest: bytes) -> None:
        self._platform.extend_rtmr(3, digest)


def record_of(owner: Owner, path: Path) -> RuntimeRecord:
    config = PlatformConfig(runtime_log=str(path))
    return RuntimeRecord(SimRtmr(owner.platform), config, events=Events())


# --- leases -------------------------------------------------------------------


async def test_the_lease_comes_with_the_bundle(owner: Owner) -> None:
    owner.add("v", release=LEASED)
    owner.add("w")
    got = await owner.fetch_leased("v", "w")
    leased, free = got["v"], got["w"]
    assert isinstance(leased, Leased)
    assert isinstance(free, Leased)
    assert (leased.lease_s, free.lease_s) == (LEASE_S, 0)


class Man:
    """In the middle, with a certificate of the pinned CA: changes the first verdict."""

    def __init__(self, owner: Owner, change: Callable[..., object]) -> None:
        self.service, self.change = owner.service, change

    def challenge(self, request, context):
        return self.service.challenge(request, context)

    def release(self, request, context):
        answer = self.service.release(request, context)
        message = keyrelease_pb2.ReleaseResponse.FromString(answer)
        self.change(request, message)
        return message.SerializeToString()


async def through(owner: Owner, change: Callable[..., object]) -> object:
    with serving(Man(owner, change), owner.server_tls()) as address:
        return (await owner.fetch_leased("v", config=owner.config(address)))["v"]


@pytest.mark.parametrize("token", [b"", b"t" * 1000])
async def test_a_token_of_another_size_is_no_error_of_ours(
    owner: Owner, token: bytes
) -> None:
    """It would keep the volume closed for good, and no other server would be asked."""
    owner.add("v")

    class Misleading(Man):
        def challenge(self, request, context):
            answer = super().challenge(request, context)
            message = keyrelease_pb2.ChallengeResponse.FromString(answer)
            message.token = token
            return message.SerializeToString()

    man = Misleading(owner, lambda *_: None)
    with serving(man, owner.server_tls()) as address:
        got = (await owner.fetch_leased("v", config=owner.config(address)))["v"]
        assert isinstance(got, RemoteProtocolError)
        assert f"{len(token)} bytes" in got.message
        both = owner.config(address, owner.address)
        assert isinstance((await owner.fetch_leased("v", config=both))["v"], Leased)


async def test_a_lease_cannot_be_stripped_or_changed_on_the_way(owner: Owner) -> None:
    """It is inside of what is sealed and signed: each byte of that is tried in turn."""
    owner.add("v", release=LEASED)
    size = 0

    def flip(place: int):
        def change(_request, message):
            nonlocal size
            sealed = bytearray(message.verdicts[0].sealed_bundle)
            size = len(sealed)
            sealed[place % size] ^= 1
            message.verdicts[0].sealed_bundle = bytes(sealed)

        return change

    assert isinstance(await through(owner, flip(0)), BadBundleError)
    for place in (1120, size - 40, size - 17, size - 16, size - 1):
        assert isinstance(await through(owner, flip(place)), BadBundleError), place


async def test_a_bundle_of_the_attackers_with_a_lease_for_good_is_refused(
    owner: Owner,
) -> None:
    owner.add("v", release=LEASED)

    def reseal(request, message):
        asked = keyrelease_pb2.ReleaseRequest.FromString(request)
        plain = protocol.encode_released(make_bundle("v").encode(), 0)
        info = protocol.sealed_info(protocol.transcript_hash(request), "v", 1)
        public = hpke.parse_public_key(asked.public_key)
        message.verdicts[0].sealed_bundle = hpke.seal(plain, public, info)

    assert isinstance(await through(owner, reseal), BadBundleError)


async def test_an_old_answer_with_a_longer_lease_replayed(owner: Owner) -> None:
    owner.add("v")  # released for good
    answers: list[bytes] = []

    class Replay(Man):
        def release(self, request, context):
            answers.append(self.service.release(request, context))
            return answers[0]

    with serving(Replay(owner, print), owner.server_tls()) as address:
        config = owner.config(address)
        first = (await owner.fetch_leased("v", config=config))["v"]
        file = owner.directory.parent / "leased.toml"
        file.write_text(policy_text(owner.platform, release=LEASED))
        set_policy(owner.directory, "v", file, 0)
        second = (await owner.fetch_leased("v", config=config))["v"]
    assert isinstance(first, Leased)
    assert isinstance(second, BadBundleError)


@pytest.mark.parametrize(
    "plain",
    [
        pytest.param(make_bundle("v").encode(), id="no lease at all"),
        pytest.param(
            encode_canonical({"bundle": make_bundle("v").encode(), "lease_s": -1}),
            id="negative",
        ),
        pytest.param(
            encode_canonical({"bundle": make_bundle("v").encode(), "lease_s": 2**40}),
            id="for ages",
        ),
        pytest.param(b"", id="empty"),
    ],
)
async def test_a_release_without_a_proper_lease_is_refused_though_signed(
    owner: Owner, plain: bytes
) -> None:
    """Only a server of another version would make it."""
    owner.add("v")
    signing = Ed25519PrivateKey.from_private_bytes(
        (owner.directory / "signing.key").read_bytes()
    )

    def confuse(request, message):
        asked = keyrelease_pb2.ReleaseRequest.FromString(request)
        digest = protocol.transcript_hash(request)
        info = protocol.sealed_info(digest, "v", 1)
        sealed = hpke.seal(plain, hpke.parse_public_key(asked.public_key), info)
        fields = protocol.VerdictFields(
            volume_id="v", generation=1, status=1, sealed_bundle=sealed
        )
        message.verdicts[0].sealed_bundle = sealed
        message.signature = protocol.sign_answer(signing, digest, [fields])

    assert isinstance(await through(owner, confuse), BadBundleError)


class Guarded(World):
    """A daemon on an in-memory kernel whose key server and quotes are real."""

    def __init__(self, directory: Path, owner: Owner) -> None:
        super().__init__(directory)
        self.owner = owner
        self.host = dataclasses.replace(
            self.host, tsm=Guest(owner.platform), rtmr=SimRtmr(owner.platform)
        )
        self.rtmr = self.host.rtmr  # type: ignore[assignment]
        release = dataclasses.replace(owner.config(), backoff_max_s=0.3)
        self.config = dataclasses.replace(self.config, key_release=release)

    def make_daemon(self, nursery: trio.Nursery) -> Daemon:
        events, host = Events(), self.host
        record = RuntimeRecord(host.rtmr, self.config.platform, events=events)

        async def fetch(loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
            return await fetch_real(host, record, loaded, ids)

        return Daemon(
            host=host,
            record=record,
            loaded=self.load(),
            load_config=self.load,
            fetch=fetch,
            successor=self.successor,
            events=events,
            nursery=nursery,
        )


async def fetch_real(
    host: Host, record: RuntimeRecord, loaded: LoadedConfig, ids: tuple[str, ...]
) -> Bundles:
    release = loaded.config.key_release
    return await fetch_bundles(ids, config=release, host=host, record=record)


async def test_revocation_reaches_a_guest_that_runs(
    owner: Owner, tmp_path: Path
) -> None:
    """The owner changes the policy; the guest goes on until its lease is over, and no longer."""
    owner.add("model", release=LEASED)
    world = Guarded(tmp_path, owner)
    world.image()
    boottime = world.host.boottime_s
    assert isinstance(boottime, FakeBoottime)
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        boottime.offset_s += LEASE_S * 0.7
        daemon.changes.ring()
        await until_event(daemon, "lease.renewed")  # RTMR3 shows the volume by now

        file = tmp_path / "revoked.toml"
        file.write_text(
            policy_text(owner.platform, platforms=f'["{"ab" * 16}"]', release=LEASED)
        )
        set_policy(owner.directory, "model", file, 0)
        boottime.offset_s += LEASE_S * 0.7
        daemon.changes.ring()
        await until_event(daemon, "lease.not_renewed")
        assert daemon.volumes.named("model").mounted
        boottime.offset_s += LEASE_S * 0.4
        daemon.changes.ring()
        await daemon.until(state(daemon, VolumeState.DENIED))
        assert (world.mounts.table, world.mapper.open) == ({}, {})
        shown = daemon.status()["volumes"][0]["error"]
        assert "its renewal was refused: key server denies volume" in shown["message"]


async def until_event(daemon: Daemon, name: str) -> None:
    await daemon.until(lambda: name in [one["event"] for one in daemon.events.after(0)])


# --- the clock ----------------------------------------------------------------


def wall_clock_readers(path: Path) -> list[str]:
    """Return what reads the time of day in a file: the host can set that."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if text in {"time.time", "time.time_ns", "time.CLOCK_REALTIME"} or (
                node.attr in {"now", "utcnow", "today"} and "dt" in text
            ):
                found.append(text)
    return found


def test_no_decision_of_the_guest_reads_the_time_of_day() -> None:
    """A clock that is ten years wrong, either way, changes nothing but what people read."""
    found = {
        path.relative_to(ROOT / "tdxd"): readers
        for part in ("core", "host", "guest")
        for path in (ROOT / "tdxd" / part).glob("**/*.py")
        if (readers := wall_clock_readers(path))
    }
    facts = {Path("host/facts.py"), Path("host/key_server_facts.py")}
    assert set(found) - facts == {Path("host/clock.py")}
    for path in (ROOT / "tdxd" / "guest").glob("*.py"):
        text = path.read_text()  # those facts tell a person that the clock is far off
        doctor = path.name.startswith(("doctor", "finding"))
        assert "facts" not in text or doctor, path.name
    uses = set()
    for path in (ROOT / "tdxd" / "guest").glob("*.py"):
        for line in path.read_text().splitlines():
            if "wall_clock()" in line:
                uses.add(line.strip())
    # Shown by status and events, read by nobody.
    texts = ("since", "started", '"time"', "time=")
    assert uses
    assert all(any(text in line for text in texts) for line in uses), uses


async def test_a_lease_does_not_outlast_a_suspension(
    owner: Owner, tmp_path: Path
) -> None:
    """The host stops the machine for a day: CLOCK_BOOTTIME went on."""
    owner.add("model", release=LEASED)
    world = Guarded(tmp_path, owner)
    world.image()
    boottime = world.host.boottime_s
    assert isinstance(boottime, FakeBoottime)
    async with world.daemon() as daemon:
        await daemon.until(state(daemon, VolumeState.MOUNTED))
        boottime.offset_s += 86400
        assert not daemon.volumes.named("model").mounted
        assert daemon.volumes.revoked() == {("model", 1)}


# --- the runtime record -------------------------------------------------------


async def test_a_guest_that_serves_can_ask_again_and_the_log_is_judged(
    owner: Owner, tmp_path: Path
) -> None:
    bundle = owner.add("v", release=LEASED)
    record = record_of(owner, tmp_path / "log")
    assert isinstance((await owner.fetch_leased("v", record=record))["v"], Leased)
    await record.add(bundle.manifest)
    assert isinstance((await owner.fetch_leased("v", record=record))["v"], Leased)


async def edited(
    owner: Owner,
    tmp_path: Path,
    change: Callable[[RuntimeHistory], RuntimeHistory],
) -> object:
    """Serve two volumes, have somebody edit the file, ask again as a new daemon would."""
    bundles = [owner.add("v"), owner.add("w")]
    record = record_of(owner, tmp_path / "log")
    for one in bundles:
        await record.add(one.manifest)
    path = tmp_path / "log"
    path.write_bytes(change(parse_history(path.read_bytes())).encode())
    after = record_of(owner, path)
    assert after.status()["error"]["code"] == "runtime-record"
    return (await owner.fetch_leased("v", record=after))["v"]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda h: dataclasses.replace(h, events=h.events[1:]), id="removed"
        ),
        pytest.param(
            lambda h: dataclasses.replace(h, events=h.events[::-1]), id="reordered"
        ),
        pytest.param(
            lambda h: dataclasses.replace(
                h, events=(*h.events, RuntimeEvent(name="x", payload=b""), *h.events)
            ),
            id="added",
        ),
        pytest.param(lambda h: dataclasses.replace(h, events=()), id="emptied"),
    ],
)
async def test_a_runtime_log_that_does_not_replay_is_denied(
    owner: Owner,
    tmp_path: Path,
    change: Callable[[RuntimeHistory], RuntimeHistory],
) -> None:
    """What was served cannot be hidden from later quotes, by root in the guest either."""
    assert isinstance(await edited(owner, tmp_path, change), DeniedError)


async def test_where_the_register_began_is_not_the_guests_to_say(
    owner: Owner, tmp_path: Path
) -> None:
    """The base in the file is for the guest's own eyes: the server takes it from the event log."""
    got = await edited(
        owner, tmp_path, lambda h: dataclasses.replace(h, base=b"\x01" * 48)
    )
    assert isinstance(got, Leased)


async def test_an_extension_by_somebody_else_is_denied(
    owner: Owner, tmp_path: Path
) -> None:
    bundle = owner.add("v")
    record = record_of(owner, tmp_path / "log")
    await record.add(bundle.manifest)
    owner.platform.extend_rtmr(3, b"x" * 48)
    got = (await owner.fetch_leased("v", record=record))["v"]
    assert isinstance(got, DeniedError)
    assert "RTMR3 is" in record.status()["error"]["message"]
