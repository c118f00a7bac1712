"""Foreign volumes on an in-memory kernel: who brings the passphrase, and where it ends."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path
from typing import Any, Literal

import msgpack
import pytest
import trio

from tdxd.core.bundle import KeyBundle
from tdxd.core.config import VolumeConfig, parse_config
from tdxd.core.foreign import PassphraseBundle
from tdxd.core.plan import VolumeState
from tdxd.core.secret import Secret
from tdxd.errors import (
    BusyError,
    ConfigError,
    HostError,
    MissingError,
    PassphraseNeededError,
    TdxdError,
    UsageError,
    WrongPassphraseError,
)
from tdxd.guest.attest import Bundles
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.daemon import Daemon
from tdxd.guest.leased import Leased
from tests.daemon.test_daemon import World, state
from tests.daemon.test_reexec import first, run_next, until_mounted
from tests.fakes import PAYLOAD_BYTES, FakeMapper, make_bundle, make_passphrase_bundle

WORD = b"correct horse battery staple"


class ForeignWorld(World):
    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.configure()

    def configure(
        self,
        *,
        passphrase: Literal["key-server", "operator"] = "operator",
        writable: bool = False,
    ) -> None:
        volume = VolumeConfig(
            id="model",
            image=str(self.directory / "*.img"),
            kind="luks2",
            passphrase=passphrase,
            writable=writable,
        )
        self.config = dataclasses.replace(self.config, volume=(volume,))

    def luks2(self, name: str = "model", passphrase: bytes = WORD) -> Path:
        path = self.directory / f"{name}.img"
        path.write_bytes(b"luks2:" + passphrase)
        return path

    def use(self, mapper: FakeMapper) -> None:
        self.mapper = mapper
        self.host = dataclasses.replace(self.host, mapper=mapper)  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path) -> ForeignWorld:
    return ForeignWorld(tmp_path)


def volume(daemon: Daemon) -> dict[str, Any]:
    (shown,) = daemon.status()["volumes"]
    assert isinstance(shown, dict)
    return shown


async def until_asked(daemon: Daemon) -> None:
    """Wait until it rests for want of an operator."""
    await daemon.until(lambda: daemon.volumes.named("model").failure is not None)
    assert volume(daemon)["error"]["code"] == "passphrase-needed"


# --- an operator's passphrase -----------------------------------------------------


async def test_it_rests_until_an_operator_comes(world: ForeignWorld) -> None:
    world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        shown = volume(daemon)
        assert (shown["state"], shown["kind"]) == ("failed", "luks2")
        assert "tdxctl mount model" in shown["error"]["hint"]
        assert shown["error"]["retry_in_s"] is None
        assert daemon.readiness()[2] == 77
        await daemon.until(daemon.settled)
        secret = Secret(WORD)
        await daemon.mount("model", secret)
        assert secret.wiped
        assert daemon.readiness() == (True, [], 0)
    assert world.server.asked == []


async def test_what_status_tells_of_it(world: ForeignWorld) -> None:
    path = world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        await daemon.mount("model", Secret(WORD))
        shown = volume(daemon)
        assert shown["integrity"] == "none"
        assert shown["generation"] == 1
        assert shown["size_bytes"] == PAYLOAD_BYTES
        assert (shown["mapper"], shown["writable"]) == ("memory", False)
        assert shown["image"] == str(path)
        assert shown["error"] is None
        assert shown["last_error"]["code"] == "passphrase-needed"
        assert shown["last_error"]["time"] <= shown["since"]
        assert shown["last_error"]["hint"]


async def test_a_wrong_passphrase_is_told_and_forgotten(world: ForeignWorld) -> None:
    world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        wrong = Secret(b"sesame")
        with pytest.raises(WrongPassphraseError):
            await daemon.mount("model", wrong)
        assert wrong.wiped
        assert volume(daemon)["state"] == "failed"
        assert daemon.readiness()[2] == 65
        with pytest.raises(PassphraseNeededError):
            await daemon.mount("model")
        await daemon.mount("model", Secret(WORD))


async def test_of_several_files_the_one_that_it_opens_is_taken(
    world: ForeignWorld,
) -> None:
    (world.directory / "a.img").write_text("no volume at all")
    world.luks2("b", b"another")
    right = world.luks2("c")
    async with world.daemon() as daemon:
        await until_asked(daemon)
        await daemon.mount("model", Secret(WORD))
        assert volume(daemon)["image"] == str(right)


async def test_a_file_that_comes_later_is_waited_for(world: ForeignWorld) -> None:
    async with world.daemon() as daemon:
        early = Secret(WORD)
        with pytest.raises(MissingError, match="no file matches"):
            await daemon.mount("model", early)
        assert early.wiped
        world.luks2()
        daemon.changes.ring()
        await daemon.until(lambda: volume(daemon)["state"] == "failed")
        await daemon.mount("model", Secret(WORD))


async def test_closed_by_hand_it_needs_the_passphrase_again(
    world: ForeignWorld,
) -> None:
    world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        await daemon.mount("model", Secret(WORD))
        await daemon.mount("model")  # as it is
        unused = Secret(b"not looked at")
        await daemon.mount("model", unused)
        assert unused.wiped
        await daemon.unmount("model")
        with pytest.raises(PassphraseNeededError):
            await daemon.mount("model")
        await daemon.retry("model")
        await until_asked(daemon)


async def test_one_passphrase_is_tried_at_a_time(world: ForeignWorld) -> None:
    world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        second = Secret(WORD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(daemon.mount, "model", Secret(WORD))
            await daemon.until(
                lambda: bool(daemon.volumes.named("model").device.bundles)
            )
            with pytest.raises(BusyError, match="another passphrase is being tried"):
                await daemon.mount("model", second)
        assert second.wiped
        assert daemon.volumes.named("model").mounted


async def test_a_passphrase_for_a_volume_that_needs_none(world: ForeignWorld) -> None:
    world.configure(passphrase="key-server")
    async with world.daemon() as daemon:
        unused = Secret(WORD)
        with pytest.raises(UsageError, match="not opened by an operator") as caught:
            await daemon.mount("model", unused)
        assert unused.wiped
        assert caught.value.hint


async def test_nobody_is_asked_while_rtmr3_cannot_be_extended(
    world: ForeignWorld,
) -> None:
    world.luks2()
    world.rtmr.broken = HostError("open", "rtmr3", errno.ENOENT)
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("model").failure is not None)
        assert volume(daemon)["error"]["code"] == "host"
        world.rtmr.broken = None
        await daemon.until(
            lambda: (volume(daemon)["error"] or {}).get("code") == "passphrase-needed"
        )


async def test_reexec_keeps_it_open_and_a_restart_does_not(world: ForeignWorld) -> None:
    world.luks2()

    async def opened(daemon: Daemon) -> None:
        await until_asked(daemon)
        await daemon.mount("model", Secret(WORD))

    handed = await first(world, opened)
    (one,) = handed.volumes
    assert one.mapped is not None
    assert WORD not in msgpack.packb(repr(handed))
    told = one.last_error

    async def use(daemon: Daemon) -> None:
        assert daemon.readiness() == (True, [], 0)
        shown = volume(daemon)
        assert (shown["state"], shown["integrity"]) == ("mounted", "none")
        assert shown["header"] == "any"
        assert told is not None
        assert shown["last_error"]["time"] == told.time

    await run_next(world, handed, use)
    async with world.daemon() as daemon:
        await until_asked(daemon)


async def test_a_pending_passphrase_does_not_go_over(world: ForeignWorld) -> None:
    """The command is given again to the next program: tdxctl still has it."""
    world.luks2()
    secret = Secret(WORD)

    async def offered(daemon: Daemon) -> None:
        await until_asked(daemon)
        daemon.volumes.named("model").offer(secret)

    handed = await first(world, offered)
    assert secret.wiped
    assert handed.volumes[0].mapped is None


# --- from the key server ----------------------------------------------------------


def release(world: World, bundle: KeyBundle | PassphraseBundle) -> None:
    async def fetch(_loaded: LoadedConfig, ids: tuple[str, ...]) -> Bundles:
        await trio.lowlevel.checkpoint()
        world.server.asked.append(ids)
        return {"model": Leased(bundle=bundle)}

    world.server.fetch = fetch  # type: ignore[method-assign]


async def test_the_key_server_brings_the_passphrase(world: ForeignWorld) -> None:
    world.configure(passphrase="key-server")
    world.luks2()
    bundle = make_passphrase_bundle(generation=4, passphrase=WORD)
    release(world, bundle)
    async with world.daemon() as daemon:
        await until_mounted(daemon)
        assert bundle.secret.wiped
        shown = volume(daemon)
        assert (shown["generation"], shown["integrity"]) == (4, "none")
    assert len(world.rtmr.extended) == 1


@pytest.mark.parametrize("configured", ["luks2", "sealed"])
async def test_a_bundle_of_the_other_kind_is_refused(
    world: ForeignWorld, configured: str
) -> None:
    """Else a key server could have a volume without integrity mounted as a sealed one."""
    bundle: KeyBundle | PassphraseBundle
    if configured == "luks2":
        world.configure(passphrase="key-server")
        bundle = make_bundle()
        world.image()
    else:
        world.config = world.make_config("model")
        bundle = make_passphrase_bundle(passphrase=WORD)
        world.luks2()
    release(world, bundle)
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("model").failure is not None)
        assert bundle.secret.wiped
        error = volume(daemon)["error"]
        assert error["code"] == "key-bad-bundle"
        for kind in ("kind luks2", "sealed"):
            assert kind in error["message"] or kind.removeprefix("kind ") in str(error)
        assert world.mapper.open == {}


async def test_its_device_is_gone(world: ForeignWorld) -> None:
    world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        await daemon.mount("model", Secret(WORD))
        world.mapper.broken.update(world.mapper.open)
        daemon.changes.ring()
        await daemon.until(state(daemon, VolumeState.FAILED))
        assert "its device is gone" in volume(daemon)["error"]["message"]


# --- writing ----------------------------------------------------------------------


async def test_writable_is_for_dm_alone(world: ForeignWorld) -> None:
    """`auto` found no device mapper: nothing is asked for in vain."""
    world.configure(writable=True, passphrase="key-server")
    world.luks2()
    async with world.daemon() as daemon:
        await daemon.until(lambda: daemon.volumes.named("model").failure is not None)
        shown = volume(daemon)
        assert shown["state"] == "failed"
        assert "writable needs the mapper dm" in shown["error"]["message"]
        assert daemon.readiness()[2] == 78
    assert world.server.asked == []


async def test_writable_with_dm(world: ForeignWorld) -> None:
    world.use(FakeMapper(name="dm"))
    world.configure(writable=True)
    world.luks2()
    async with world.daemon() as daemon:
        await until_asked(daemon)
        await daemon.mount("model", Secret(WORD))
        (mapped,) = world.mapper.open.values()
        assert mapped.writable
        assert volume(daemon)["writable"]


HEAD = f'[key_release]\nservers = ["a:1"]\nca = "/ca"\nsigning_key = "ed25519:{"A" * 43}="\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("writable = true", "writable is for kind 'luks2'"),
        ('passphrase = "operator"', "is for kind 'luks2', v is sealed"),
        ('kind = "luks1"', "expected one of 'sealed', 'luks2'"),
        ('kind = "luks2"\npassphrase = "sesame"', "expected one of 'key-server'"),
        (
            'kind = "luks2"\nwritable = true\n[mapping]\nmapper = "memory"',
            "writable volume 'v' needs mapping.mapper 'dm'",
        ),
    ],
)
def test_a_volume_that_cannot_be_is_refused(text: str, message: str) -> None:
    config = f'{HEAD}[[volume]]\nid = "v"\nimage = "/v.img"\n{text}\n'
    with pytest.raises(ConfigError) as caught:
        parse_config([("x.toml", config)])
    assert message in caught.value.message


# --- the passphrase is nowhere ----------------------------------------------------


@pytest.mark.parametrize("word", [WORD, b"wrong but as secret"])
async def test_the_passphrase_stands_in_no_event_and_no_status(
    world: ForeignWorld, word: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    world.luks2()
    said: list[TdxdError] = []
    async with world.daemon() as daemon:
        await until_asked(daemon)
        try:
            await daemon.mount("model", Secret(word))
        except WrongPassphraseError as exc:
            said.append(exc)
        events = list(daemon.events.after(0))
        shown = [events, daemon.status(), [vars(one) for one in said]]
        logged = capfd.readouterr()
        for text in (repr(shown), logged.out, logged.err):
            for form in (word.decode(), word.hex()):
                assert form not in text
        assert "volume.failed" in logged.out + logged.err  # it was there to be searched
