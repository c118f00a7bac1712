"""An in-memory kernel: the daemon's ports without root, loop devices or namespaces."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import trio
import trio.lowlevel

from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.foreign import AnyBundle, ForeignManifest, PassphraseBundle
from tdxd.core.secret import Secret
from tdxd.errors import (
    BadHeaderError,
    BusyError,
    HostError,
    IntegrityError,
    MissingError,
    TdxdError,
    WrongPassphraseError,
)
from tdxd.guest.handover import HandedDaemon, ServedVolume
from tdxd.host import clock
from tdxd.host.ports import (
    Cell,
    Child,
    ChildSpec,
    HandedChild,
    Host,
    MappedVolume,
    PrivateTmp,
)

__all__ = [
    "ExecutedError",
    "FakeBoottime",
    "FakeChildren",
    "FakeMapper",
    "FakeMounts",
    "FakeRtmr",
    "FakeSuccessor",
    "FakeTsm",
    "FakeVolumes",
    "fake_host",
    "make_bundle",
    "make_passphrase_bundle",
]


PAYLOAD_BYTES = 5 * 4096
"""Of every volume that `FakeMapper` opens."""


def make_bundle(
    volume_id: str = "model", generation: int = 1, *, blocks: int = 4
) -> KeyBundle:
    manifest = Manifest(
        volume_id=volume_id,
        generation=generation,
        payload_offset_bytes=16 * 2**20,
        data_blocks=blocks,
        hash_blocks=1,
        root_hash=b"r" * 32,
        salt=b"s" * 32,
    )
    return KeyBundle(manifest=manifest, secret=Secret(b"k" * 64))


def make_passphrase_bundle(
    volume_id: str = "model", generation: int = 1, *, passphrase: bytes = b"sesame"
) -> PassphraseBundle:
    manifest = ForeignManifest(volume_id=volume_id, generation=generation)
    return PassphraseBundle(manifest=manifest, secret=Secret(passphrase))


@dataclasses.dataclass
class FakeMapper:
    """Opens any file whose content is `VOLUME@GENERATION`, or `luks2:PASSPHRASE`."""

    name: str = "memory"
    open: dict[str, MappedVolume] = dataclasses.field(default_factory=dict)
    broken: set[str] = dataclasses.field(default_factory=set)
    next_error: TdxdError | None = None
    _count: int = 0

    def check(self, image: str, bundle: AnyBundle) -> None:
        assert not bundle.secret.wiped
        with open(image, encoding="utf-8") as file:
            _check_content(image, file.read(), bundle)

    def map_volume(
        self,
        image: str,
        bundle: AnyBundle,
        *,
        cancelled: Callable[[], bool],
        writable: bool = False,
    ) -> MappedVolume:
        del cancelled
        assert not bundle.secret.wiped
        if self.next_error is not None:
            error, self.next_error = self.next_error, None
            raise error
        if writable and self.name != "dm":
            raise HostError("map for writing", image, errno.EROFS)
        try:
            with open(image, encoding="utf-8") as file:
                content = file.read()
        except FileNotFoundError as exc:
            raise MissingError(f"{image}: not there") from exc
        _check_content(image, content, bundle)
        self._count += 1
        device = f"/dev/fake{self._count}"
        self.open[device] = MappedVolume(
            manifest=bundle.manifest,
            device=device,
            mapper="dm" if self.name == "dm" else "memory",
            writable=writable,
            payload_bytes=PAYLOAD_BYTES,
        )
        return self.open[device]

    def unmap(self, mapped: MappedVolume) -> None:
        self.open.pop(mapped.device, None)
        self.broken.discard(mapped.device)

    def intact(self, mapped: MappedVolume) -> bool:
        return mapped.device not in self.broken

    def sweep(self) -> Sequence[str]:
        return ()


def _check_content(image: str, content: str, bundle: AnyBundle) -> None:
    manifest = bundle.manifest
    if isinstance(bundle, PassphraseBundle):
        if not content.startswith("luks2:"):
            raise BadHeaderError(f"{image}: not a LUKS2 image")
        if content.encode() != b"luks2:" + bundle.secret.reveal():
            raise WrongPassphraseError(f"{image}: no keyslot opens with the passphrase")
    elif content != f"{manifest.volume_id}@{manifest.generation}":
        raise IntegrityError(f"{image}: not of this volume and generation")


@dataclasses.dataclass
class FakeMounts:
    table: dict[str, str] = dataclasses.field(default_factory=dict)
    busy: set[str] = dataclasses.field(default_factory=set)

    def mount_volume(self, mapped: MappedVolume, target: str) -> None:
        self.table[target] = mapped.device

    def unmount(self, target: str) -> None:
        if target in self.busy:
            raise BusyError(f"unmount {target}: in use")
        self.table.pop(target, None)

    def under(self, directory: str) -> tuple[str, ...]:
        return tuple(point for point in self.table if point.startswith(directory + "/"))


class FakeTsm:
    def quote(self, report_data: bytes) -> bytes:
        assert len(report_data) == 64
        return b"quote" + report_data

    def event_log(self) -> bytes:
        return b""


class FakeRtmr:
    """A register in memory; `broken` is what every use of it raises."""

    def __init__(self) -> None:
        self.register = bytes(48)
        self.extended: list[bytes] = []
        self.broken: TdxdError | None = None
        self.lost: TdxdError | None = None
        """Raised by extensions alone, which do not happen then."""

    def value(self) -> bytes:
        if self.broken is not None:
            raise self.broken
        return self.register

    def check(self) -> None:
        self.value()

    def extend(self, digest: bytes) -> None:
        if len(digest) != 48:
            raise ValueError(f"digest is {len(digest)} bytes long, not 48")
        self.value()
        if self.lost is not None:
            raise self.lost
        self.register = hashlib.sha384(self.register + digest).digest()
        self.extended.append(digest)


class FakeBoottime:
    """CLOCK_BOOTTIME, which a test may let jump ahead by `offset_s`."""

    def __init__(self) -> None:
        self.offset_s = 0.0

    def __call__(self) -> float:
        return clock.boottime_s() + self.offset_s


class FakeChildren:
    """No child can be started: serving is tried with real ones."""

    limits_problem = ""

    def make_cell(
        self,
        *,
        hide: str,
        binds: Sequence[tuple[str, str]],
        tmp: PrivateTmp | None = None,
    ) -> Cell:
        raise HostError("make cell", hide, errno.ENOSYS)

    def spawn(self, spec: ChildSpec) -> Child:
        raise NotImplementedError

    def hand_over(self, child: Child, cell: Cell) -> HandedChild:
        raise NotImplementedError

    def adopt(self, handed: HandedChild) -> tuple[Child, Cell]:
        raise NotImplementedError


def _nobody(_served: tuple[ServedVolume, ...], _error: TdxdError) -> bool:
    return False


@dataclasses.dataclass
class FakeVolumes:
    """The volumes that serving sees: what a test says."""

    says: Callable[[], tuple[ServedVolume, ...] | None]
    gone: Callable[[], frozenset[tuple[str, int | None]]] = frozenset
    replacing: bool = False
    refuse: Callable[[tuple[ServedVolume, ...], TdxdError], bool] = _nobody

    def served(self) -> tuple[ServedVolume, ...] | None:
        return self.says()

    def revoked(self) -> frozenset[tuple[str, int | None]]:
        return self.gone()


class ExecutedError(Exception):
    """Stands for the exec: the program that hands over runs no further."""


@dataclasses.dataclass
class FakeSuccessor:
    """The program that takes the place: keeps the state, or refuses."""

    refusal: TdxdError | None = None
    """Of `check`."""
    failure: TdxdError | None = None
    """Of the exec."""
    handed: HandedDaemon | None = None

    async def check(self) -> None:
        await trio.lowlevel.checkpoint()
        if self.refusal is not None:
            raise self.refusal

    @contextlib.contextmanager
    def prepared(self) -> Iterator[Callable[[HandedDaemon], NoReturn]]:
        yield self._execute

    def _execute(self, handed: HandedDaemon) -> NoReturn:
        if self.failure is not None:
            raise self.failure
        self.handed = handed
        raise ExecutedError


def fake_host() -> Host:
    return Host(
        tsm=FakeTsm(),
        rtmr=FakeRtmr(),
        boottime_s=FakeBoottime(),
        mapper=FakeMapper(),  # type: ignore[arg-type]  # name is a plain str here
        mounts=FakeMounts(),
        children=FakeChildren(),
        random_bytes=os.urandom,
    )
