"""The image, the keys, the device and the mount of one volume; all waiting is in its own thread."""

from __future__ import annotations

import contextlib
import os
import threading

import trio

from tdxd.core.config import VolumeConfig
from tdxd.core.foreign import AnyBundle, AnyManifest
from tdxd.core.plan import Failure
from tdxd.core.secret import Secret
from tdxd.errors import BusyError, TdxdError, UsageError
from tdxd.guest import opening
from tdxd.guest.handover import HandedVolume
from tdxd.guest.own_thread import OwnThread
from tdxd.guest.surroundings import Surroundings
from tdxd.host import block_stat, images
from tdxd.host.images import ImageFile
from tdxd.host.ports import MappedVolume

__all__ = ["VolumeDevice"]

_STEP_S = 10.0
"""A disk that lets a short step wait longer than this counts as hanging."""
_GLANCE_S = 1.0
_LAST_S = 5.0
"""How long the last clean-up may take."""


class VolumeDevice:
    """What is there of one volume, and the steps from nothing to mounted and back."""

    def __init__(self, spec: VolumeConfig, around: Surroundings) -> None:
        self.spec = spec
        self.files: tuple[ImageFile, ...] = ()
        """The candidates, as of the last look."""
        self.bundles: tuple[AnyBundle, ...] = ()
        """The keys, from when they come until they are tried."""
        self.fits = False
        """Whether a candidate was seen to be the one of the keys."""
        self.mapped: MappedVolume | None = None
        self.opened: ImageFile | None = None
        """The file that was opened last, as it was then."""
        self.intact = True
        """Whether the last look found what is open as it was opened."""
        self.doubted = False
        """Whether what was handed over is not what was mapped: it is closed, then opened anew."""
        self.read_before = 0
        """What the kernel had counted of the device when it was opened."""
        self.looked = 0
        """What `asked` was when the last look that is done began."""
        self._looking: trio.Event | None = None
        self._checking: trio.Event | None = None
        self._closing = False
        """Whether the device is being closed: a look may find no device any more."""
        self._eyes, self._touch, self._hands = (
            OwnThread(
                spec.id,
                changes=around.changes,
                events=around.events,
                nursery=around.nursery,
                only_looks=only_looks,
            )
            for only_looks in (True, True, False)
        )
        self._changes, self._nursery = around.changes, around.nursery
        self._standstill = around.standstill
        self._mapper, self._mounts = around.host.mapper, around.host.mounts
        self._directory = around.directory
        self._stop_work = threading.Event()

    # --- what is there ---

    @property
    def generation(self) -> int | None:
        """The generation that is open, or `None` while no key has told it."""
        opened = self.bundles[0] if self.bundles else self.mapped
        return opened.manifest.generation if opened else None

    @property
    def manifest(self) -> AnyManifest:
        """Of what is mapped."""
        return self._device().manifest

    @property
    def mount_point(self) -> str:
        """Where this generation is, or would be, mounted."""
        return os.path.join(self._directory, f"{self.spec.id}@{self.generation or 0}")

    @property
    def mounted(self) -> bool:
        """Whether it is mounted there; before it is mapped, what is there is of one that leaves."""
        if self.mapped is None:
            return False
        return self.mount_point in self._mounts.under(self._directory)

    @property
    def stalled(self) -> Failure | None:
        """What takes longer than it may just now."""
        return self._hands.stalled or self._eyes.stalled or self._touch.stalled

    @property
    def image_tag(self) -> tuple[int, ...] | None:
        """What changes with the candidates."""
        return images.tag_of(self.files)

    @property
    def image(self) -> str | None:
        """The path of the file that was opened last."""
        return self.opened.path if self.opened else None

    @property
    def others(self) -> tuple[ImageFile, ...]:
        """The candidates that are not the file that was opened: a newer image may be among them."""
        return tuple(one for one in self.files if one != self.opened)

    @property
    def bytes_read(self) -> int | None:
        """How much was read from the device since it was opened."""
        read = block_stat.bytes_read(self.mapped.device) if self.mapped else None
        return None if read is None else max(0, read - self.read_before)

    async def look(self, asked: int) -> None:
        """See which files there are, and whether what is open is still what was opened.

        A look that takes longer than a second goes on by itself, and what was seen last counts:
        else a disk could keep a lease from being renewed, or a volume from being closed. The device
        has a thread of its own: a directory that does not answer hides no wrong block.
        """
        if self._checking is None:
            self._checking = trio.Event()
            self._nursery.start_soon(self._check, self._checking)
        if self._looking is None:
            self._looking = trio.Event()
            self._nursery.start_soon(self._look, self._looking, self._checking, asked)
        with trio.move_on_after(_GLANCE_S):
            await self._looking.wait()

    async def _look(self, done: trio.Event, checked: trio.Event, asked: int) -> None:
        with self._standstill.running(f"volume {self.spec.id}"):
            files = await self._eyes.run(
                f"looking for {self.spec.image}",
                lambda: images.candidates(self.spec.image),
                allowance_s=_STEP_S,
            )
            await checked.wait()
        before = (self.files, self.looked)
        self.files, self.looked = files, asked
        self._looking = None
        done.set()
        if before != (self.files, self.looked):
            self._changes.ring()

    async def _check(self, done: trio.Event) -> None:
        mapped = self.mapped
        if mapped is not None:
            with self._standstill.running(f"volume {self.spec.id}"):
                intact = await self._touch.run(
                    f"looking at {mapped.device}",
                    lambda: self._is_intact(mapped),
                    allowance_s=_STEP_S,
                )
            if self.mapped is mapped and not self._closing and self.intact != intact:
                self.intact = intact
                self._changes.ring()
        self._checking = None
        done.set()

    def _is_intact(self, mapped: MappedVolume) -> bool:
        try:
            return self._mapper.intact(mapped)
        except TdxdError:
            return False  # nobody can say that it is

    # --- the keys ---

    def take(self, bundles: tuple[AnyBundle, ...]) -> None:
        """Take what the key server released; it is wiped if it cannot be used.

        Raises: BadBundleError.
        """
        try:
            opening.check_kind(self.spec, bundles)
        except TdxdError:
            opening.wipe(bundles)
            raise
        self.bundles, self.fits = bundles, False

    def offer(self, passphrase: Secret) -> None:
        """Take an operator's passphrase; it is wiped if it is not used.

        Raises: UsageError for a volume that is not opened so, BusyError while another is tried or
        the device is being closed.
        """
        if not self.spec.by_operator:
            passphrase.wipe()
            raise UsageError(
                f"volume {self.spec.id} is not opened by an operator's passphrase",
                hint="its key comes from the key server: tdxctl mount without a passphrase",
            )
        if self.bundles:
            passphrase.wipe()
            text = f"volume {self.spec.id}: another passphrase is being tried"
            raise BusyError(text, hint="tdxctl status")
        if self._closing:
            passphrase.wipe()
            text = f"volume {self.spec.id}: its device is being closed"
            raise BusyError(text, hint="try again")
        if self.mapped is not None:
            passphrase.wipe()
            return
        self.bundles = (opening.passphrase_bundle(self.spec.id, passphrase),)

    def forget_keys(self) -> None:
        """Wipe them."""
        opening.wipe(self.bundles)
        self.bundles, self.fits = (), False

    @property
    def given_up(self) -> bool:
        """Whether the last mapping was called off."""
        return self._stop_work.is_set()

    def give_up(self) -> None:
        """Call a mapping under way off, as soon as it can be."""
        self._stop_work.set()

    # --- the steps ---

    async def check(self) -> None:
        """See whether a candidate is the one of the keys, which are wiped if not.

        Raises: as `opening.map_first`.
        """
        bundles = self.bundles
        try:
            await self._hands.run(
                "checking its image",
                lambda: opening.check_first(self._mapper, self.spec, bundles),
                allowance_s=_STEP_S,
            )
        except TdxdError:
            self.forget_keys()
            raise
        self.fits = self.bundles is bundles

    async def map(self) -> None:
        """Open the candidate that a manifest matches; the keys are wiped either way.

        Raises: ConfigError for what this machine cannot do: an operator may come unasked.
        """
        bundles = self.bundles
        self._stop_work.clear()

        def map_it() -> tuple[MappedVolume, ImageFile, int]:
            mapped, file = opening.map_first(
                self._mapper, self.spec, bundles, cancelled=self._stop_work.is_set
            )
            return mapped, file, block_stat.bytes_read(mapped.device) or 0

        try:
            opening.check_mapper(self.spec, self._mapper)
            self.intact = True
            self.mapped, self.opened, self.read_before = await self._hands.run(
                "opening its image",
                map_it,
                allowance_s=opening.longest_map_s(bundles, self.files),
            )
        finally:
            self.forget_keys()

    async def mount(self) -> None:
        """Mount what is mapped."""
        mapped, point = self._device(), self.mount_point
        await self._hands.run(
            f"mounting {mapped.device}",
            lambda: self._mounts.mount_volume(mapped, point),
            allowance_s=_STEP_S,
        )

    async def unmount(self) -> None:
        """Unmount it."""
        point = self.mount_point
        await self._hands.run(
            f"unmounting {point}",
            lambda: self._mounts.unmount(point),
            allowance_s=_STEP_S,
        )

    async def unmap(self) -> None:
        """Close the device and all below it."""
        mapped = self._device()
        self._closing = True
        try:
            await self._hands.run(
                f"closing {mapped.device}",
                lambda: self._mapper.unmap(mapped),
                allowance_s=_STEP_S,
            )
        finally:
            self._closing = False
        self.mapped, self.doubted, self.intact = None, False, True

    def adopt(self, handed: HandedVolume) -> None:
        """Go on with what the program before this one opened."""
        self.mapped, self.opened = handed.mapped, handed.file
        self.read_before = handed.read_before
        self.doubted = self.mapped is not None and not opening.is_open(self.mapped)

    def _device(self) -> MappedVolume:
        assert self.mapped is not None
        return self.mapped

    async def close(self) -> None:
        """Close everything, whatever the state, within a time; for the last clean-up."""
        self.give_up()
        for thread in (self._eyes, self._touch, self._hands):
            thread.abandon()
        point, mapped = self.mount_point, self.mapped
        self.forget_keys()

        def close() -> None:
            with contextlib.suppress(TdxdError):
                self._mounts.unmount(point)
            if mapped is not None:
                with contextlib.suppress(TdxdError):
                    self._mapper.unmap(mapped)

        with trio.move_on_after(_LAST_S):
            await trio.to_thread.run_sync(close, abandon_on_cancel=True)
        self.mapped = None
