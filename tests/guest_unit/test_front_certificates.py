"""Which certificates a front starts with, if those of now cannot be used; which are forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio.lowlevel

from tdxd.core.config import Config, KeyReleaseConfig, ServingConfig, VolumeConfig
from tdxd.errors import (
    DataError,
    HostError,
    MissingError,
    NotReadyError,
    ServerExitedError,
    TdxdError,
)
from tdxd.guest.certificates import Certificates
from tdxd.guest.events import Events
from tdxd.guest.front_certificates import FrontCertificates
from tdxd.guest.handover import ServedVolume

KEY = "ed25519:" + "A" * 43 + "="
CONFIG = Config(
    key_release=KeyReleaseConfig(servers=("localhost:1",), ca="/ca", signing_key=KEY),
    volume=(VolumeConfig(id="m", image="/none"),),
    serving=ServingConfig(tls_volume="m"),
)


class World:
    """A volume whose generations each have a certificate, and a front that may refuse one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.served: tuple[ServedVolume, ...] = ()
        self.gone: frozenset[tuple[str, int | None]] = frozenset()
        self.refused: set[bytes] = set()
        self.started: list[bytes] = []
        self.one = FrontCertificates(
            None,
            Events(),
            lambda: (CONFIG, self.served),
            lambda: self.gone,
        )

    def open(self, generation: int, pem: bytes | None) -> None:
        point = self.directory / f"m@{generation}"
        (point / "tls").mkdir(parents=True)
        if pem is not None:
            (point / "tls" / "server.pem").write_bytes(pem)
        self.served = (
            ServedVolume(volume_id="m", generation=generation, mount_point=str(point)),
        )

    async def start(self, certificates: Certificates) -> None:
        await trio.lowlevel.checkpoint()
        self.started.append(certificates.server)
        if certificates.server in self.refused:
            raise ServerExitedError("haproxy refuses the configuration")


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A front has had that of generation 1."""

    def check(self: Certificates) -> None:
        if self.server == b"no pem":
            raise DataError("no PEM")

    monkeypatch.setattr(Certificates, "check", check)
    made = World(tmp_path)
    made.open(1, b"first")
    await made.one.start(made.start)
    assert made.one.proven is not None
    made.started.clear()
    return made


@pytest.mark.parametrize(
    ("pem", "kind", "tried"),
    [
        (None, MissingError, [b"first"]),
        (b"no pem", DataError, [b"first"]),
        (b"weak", ServerExitedError, [b"weak", b"first"]),
    ],
)
async def test_a_front_starts_with_the_last_good_ones(
    world: World, pem: bytes | None, kind: type[TdxdError], tried: list[bytes]
) -> None:
    """Whatever is wrong with those of the new generation, a front that ended comes back."""
    world.open(2, pem)
    world.refused.add(b"weak")
    await world.one.start(world.start)
    assert world.started == tried
    assert world.one.proven is not None
    assert world.one.proven.server == b"first"
    failure = world.one.failure
    assert failure is not None
    assert isinstance(failure.error, kind)


async def test_so_it_does_when_they_cannot_be_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_mount_point: str) -> bytes:
        raise HostError("read", "tls/server.pem", 5)

    world.open(2, b"second")
    monkeypatch.setattr("tdxd.host.content.read_certificate", broken)
    await world.one.start(world.start)
    assert world.started == [b"first"]


async def test_none_of_a_revoked_volume_is_shown_again(world: World) -> None:
    world.open(2, b"no pem")
    world.gone = frozenset({("m", 1)})
    with pytest.raises(DataError):
        await world.one.start(world.start)
    assert world.started == []


async def test_none_is_shown_once_its_volume_is_closed(world: World) -> None:
    world.served = ()
    with pytest.raises(NotReadyError):
        await world.one.start(world.start)
    assert world.started == []


async def test_what_the_front_refuses_twice_is_its_own_error(world: World) -> None:
    world.refused = {b"first"}
    with pytest.raises(ServerExitedError):
        await world.one.start(world.start)
    assert world.started == [b"first"]
    assert world.one.failure is None


async def test_a_start_with_those_of_now_ends_their_failure(world: World) -> None:
    world.open(2, b"second")
    world.one.failed(NotReadyError("the front does not answer"))
    assert world.one.failure is not None
    await world.one.start(world.start)
    assert world.started == [b"second"]
    assert world.one.failure is None


async def test_no_private_key_is_kept_of_what_is_closed_or_must_be(
    world: World,
) -> None:
    proven = world.one.proven
    world.one.forget_proven(ends=False)
    assert world.one.proven is proven
    for gone, served, ends in (
        (frozenset({("m", 1)}), world.served, False),
        (frozenset(), (), False),
        (frozenset(), world.served, True),
    ):
        world.one.proven = proven
        world.gone, world.served = gone, served
        world.one.forget_proven(ends=ends)
        assert world.one.proven is None
