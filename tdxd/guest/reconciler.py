"""One volume, in one generation: from nothing to mounted, and back.

The loop observes, asks `core.plan.plan_volume`, does the one action it names, and starts over.
Whatever an action raises becomes the volume's failure, which the plan reads next.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

import trio

from tdxd.core import plan
from tdxd.core.bundle import KeyBundle
from tdxd.core.config import VolumeConfig
from tdxd.core.plan import Failure, VolumePlan, VolumeSeen, VolumeState
from tdxd.errors import IntegrityError, Retry, TdxdError
from tdxd.guest.failures import error_fields
from tdxd.guest.handover import HandedFailure, HandedVolume
from tdxd.guest.lease import VolumeLease
from tdxd.guest.opening import is_open, map_first
from tdxd.guest.surroundings import Surroundings
from tdxd.host import clock, images
from tdxd.host.attempts import LONGEST_QUOTE_S
from tdxd.host.ports import MappedVolume

__all__ = ["VolumeReconciler"]

T = TypeVar("T")

_POLL_S = 2.0
"""How often the world is looked at without being told of a change."""
_CLOSE_RETRY_S = 1.0
_LASTING = (Retry.OPERATOR, Retry.SLOW)
"""Failures that another program of ours would meet, too."""
_SLOWEST_BYTES_PER_S = 10e6
"""A disk slower than this while mapping counts as hanging."""


class VolumeReconciler:
    """Brings one volume to what is wanted of it. `run` returns when it is wanted no more."""

    def __init__(
        self,
        spec: VolumeConfig,
        around: Surroundings,
        *,
        in_use: Callable[[VolumeReconciler], bool],
    ) -> None:
        self.spec = spec
        self.wanted = True
        self.leaving = False
        """Whether `run` ends once nothing is open."""
        self.state = VolumeState.ABSENT
        self.since = clock.wall_clock()
        self.mapped: MappedVolume | None = None
        self.image: str | None = None
        self.lease = VolumeLease(spec.id, around)
        self.beat_s = trio.current_time()
        self._host, self._release = around.host, around.release
        self._attester, self._record = around.attester, around.record
        self._changes, self._events = around.changes, around.events
        self._standstill, self._nursery = around.standstill, around.nursery
        self._directory = around.directory
        self._failures = around.failures("volume.failed", spec.id)
        self._in_use = in_use
        self._bundles: tuple[KeyBundle, ...] = ()
        self._stuck_until_s: float | None = None
        self._network_news = False
        """Whether a network came up since the last attempt began."""
        self._stop_work = threading.Event()
        self._work: trio.CancelScope | None = None
        self._doubted = False
        """Whether what was handed over is not what was mapped: it is closed, then opened anew."""

    # --- what others see and ask ---

    @property
    def failure(self) -> Failure | None:
        """The last failure, until the volume is open or it is forgotten."""
        return self._failures.last

    @property
    def generation(self) -> int | None:
        """The generation that is open, or `None` while no key has told it."""
        opened = self._bundles[0] if self._bundles else self.mapped
        return opened.manifest.generation if opened else None

    @property
    def mount_point(self) -> str:
        """Where this generation is, or would be, mounted."""
        return os.path.join(self._directory, f"{self.spec.id}@{self.generation or 0}")

    @property
    def mounted(self) -> bool:
        """Whether the volume is open for use, planned anew as `settled` is.

        The last state shown would lag behind: a reload could take a volume for settled that
        serving does not count yet.
        """
        return self._plan(trio.current_time()).state is VolumeState.MOUNTED

    @property
    def settled(self) -> bool:
        """Whether it rests: reached what is wanted, or waits for time or for somebody.

        Planned anew, so that it is true of what is wanted and seen now, not of the last look.
        """
        step = self._plan(trio.current_time())
        return isinstance(step.action, plan.Wait) and not self.closing

    @property
    def closing(self) -> bool:
        """Whether it must be closed: it is not wanted, or not intact. Planned anew, too."""
        return self._plan(trio.current_time()).state is VolumeState.CLOSING

    @property
    def forfeited(self) -> bool:
        """Whether it must be closed at once, and cut off from its users. Planned anew, too."""
        return plan.forfeited(self._observe(), trio.current_time())

    def want(self, *, mounted: bool, leave: bool = False) -> None:
        """Set what is wanted; an exchange or a mapping under way is given up if not."""
        self.wanted = mounted and not leave
        self.leaving = self.leaving or leave
        if not self.wanted:
            self.give_up()
        self._changes.ring()

    def give_up(self) -> None:
        """Call an exchange or a mapping under way off."""
        self._stop_work.set()
        self.lease.give_up()
        if self._work is not None:
            self._work.cancel()

    def retry_now(self) -> None:
        """Forget the last failure and its wait."""
        self._failures.forget()
        self.lease.retry_now()
        self._stuck_until_s = None
        self._changes.ring()

    def network_came_up(self) -> None:
        """Try again at once what a network mends: the last failure, or the attempt under way."""
        self._network_news = True
        self.lease.network_came_up()
        if self.failure is not None and self.failure.error.retry is Retry.BACKOFF:
            self._failures.forget()
        self._changes.ring()

    # --- the loop ---

    async def run(self) -> None:
        """Observe, plan, act, until `leaving` and nothing is open."""
        while True:
            await self._standstill.passage()
            count, now_s = self._changes.count, trio.current_time()
            self.beat_s = now_s
            step = self._plan(now_s)
            self._show(step.state)
            if not isinstance(step.action, plan.Wait):
                self.beat_s = now_s + self._allowance_s(step.action)
                with self._standstill.running(f"volume {self.spec.id}"):
                    await self._act(step)
                continue
            if self.leaving and step.state is VolumeState.ABSENT:
                return
            limit_s = now_s + _POLL_S
            until_s = step.action.until_s
            await self._changes.after(count, min(limit_s, until_s or limit_s))

    def _plan(self, now_s: float) -> VolumePlan:
        return plan.plan_volume(wanted=self.wanted, seen=self._observe(), now_s=now_s)

    def _allowance_s(self, action: plan.VolumeAction) -> float:
        """Return how long an action may take before the watchdog must doubt this loop."""
        match action:
            case plan.Attest():  # an exchange that others began, then its own
                one_s = self._release.timeout_s + LONGEST_QUOTE_S
                return 2 * one_s * len(self._release.servers)
            case plan.Record():  # RTMR3 rests while a quote is made
                return LONGEST_QUOTE_S
            case plan.Map():
                size_bytes = sum(one.manifest.image_bytes for one in self._bundles)
                return size_bytes / _SLOWEST_BYTES_PER_S
        return 0.0

    def _observe(self) -> VolumeSeen:
        files = images.candidates(self.spec.image)
        intact = self.mapped is None or self._host.mapper.intact(self.mapped)
        if not intact and not self._failed_integrity():
            error = IntegrityError(
                f"volume {self.spec.id}: the image changed after it was opened",
                hint="replace the image file, or: tdxctl retry " + self.spec.id,
            )
            self._failures.add(error, image_tag=images.tag_of(files))
        expired = self.lease.newly_expired()
        if expired is not None:
            self._failures.add(expired, image_tag=images.tag_of(files))
        return VolumeSeen(
            image_tag=images.tag_of(files),
            keyed=bool(self._bundles),
            mapped=self.mapped is not None,
            mounted=self.mount_point in self._host.mounts.under(self._directory),
            recorded=self.mapped is not None
            and self._record.shows(self.mapped.manifest),
            intact=intact and not self._doubted,
            in_use=self._in_use(self),
            failure=self.failure,
            stuck_until_s=self._stuck_until_s,
            lease=self.lease.seen(trio.current_time()),
        )

    def _failed_integrity(self) -> bool:
        return self.failure is not None and isinstance(
            self.failure.error, IntegrityError
        )

    def _show(self, state: VolumeState) -> None:
        if state is self.state:
            return
        self.state, self.since = state, clock.wall_clock()
        if state is VolumeState.MOUNTED:
            self._failures.forget()
        self._events.emit(
            f"volume.{state.value}", volume=self.spec.id, generation=self.generation
        )
        self._changes.ring()

    async def _act(self, step: VolumePlan) -> None:
        closing = step.state is VolumeState.CLOSING
        tag = images.tag_of(images.candidates(self.spec.image))
        try:
            await self._do(step.action)
        except TdxdError as exc:
            if closing:
                self._stuck_until_s = trio.current_time() + _CLOSE_RETRY_S
                self._events.emit(
                    "volume.close_failed",
                    level="warning",
                    volume=self.spec.id,
                    **error_fields(exc),
                )
            elif self.wanted and not self._standstill.frozen:
                news = self._network_news
                self._failures.add(exc, image_tag=tag, at_once=news)
        else:
            self._stuck_until_s = None
        if self.mapped is None and not self._bundles:
            self.lease.end()
        self._changes.ring()

    async def _do(self, action: plan.VolumeAction) -> None:
        match action:
            case plan.Attest():
                await self._attest()
            case plan.Map():
                await self._map()
            case plan.Mount():
                await self._mount()
            case plan.Record():
                assert self.mapped is not None
                await self._record.add(self.mapped.manifest)
            case plan.Renew():
                assert self.mapped is not None
                self.lease.start_renewal(self._nursery, self.mapped.manifest)
            case plan.Unmount():
                await self._blocking(
                    lambda: self._host.mounts.unmount(self.mount_point)
                )
            case plan.Unmap():
                await self._unmap()
            case plan.ForgetKey():
                self._forget_key()

    # --- the actions ---

    async def _attest(self) -> None:
        """Get the key, unless it is known beforehand that the volume could not serve then."""
        self._network_news = False
        with trio.CancelScope() as self._work:
            await self._record.check()
            leased = await self._attester.bundle(self.spec.id)
            self._bundles = leased.bundles
            self.lease.begin(leased)
        self._work = None

    async def _map(self) -> None:
        """Open the candidate that a manifest matches; the keys are wiped either way."""
        bundles = self._bundles
        self._stop_work.clear()
        try:
            self.mapped, self.image = await self._blocking(
                lambda: map_first(
                    self._host.mapper,
                    self.spec,
                    bundles,
                    cancelled=self._stop_work.is_set,
                )
            )
        finally:
            self._forget_key()

    async def _mount(self) -> None:
        mapped = self.mapped
        assert mapped is not None
        await self._blocking(
            lambda: self._host.mounts.mount_volume(mapped, self.mount_point)
        )

    async def _unmap(self) -> None:
        mapped = self.mapped
        assert mapped is not None
        await self._blocking(lambda: self._host.mapper.unmap(mapped))
        self.mapped, self._doubted = None, False

    def _forget_key(self) -> None:
        for one in self._bundles:
            one.secret.wipe()
        self._bundles = ()

    async def _blocking(self, work: Callable[[], T]) -> T:
        """Run a call that can take long in a thread; it is never abandoned."""
        return await trio.to_thread.run_sync(work)

    # --- over an exec ---

    def hand_over(self) -> HandedVolume:
        """Return what the program after this one needs; the key is wiped, not handed over."""
        self._forget_key()
        failure = self.failure
        if failure is not None and failure.error.retry not in _LASTING:
            failure = None
        now_s = trio.current_time()
        return HandedVolume(
            spec=self.spec,
            wanted=self.wanted,
            leaving=self.leaving,
            state=self.state.value,
            since=self.since,
            image=self.image,
            mapped=self.mapped,
            lease=self.lease.hand_over() if self.mapped else None,
            failure=HandedFailure.of(failure, now_s) if failure else None,
        )

    def adopt(self, handed: HandedVolume) -> None:
        """Go on with what the program before this one opened; call it before `run`."""
        self.wanted, self.leaving = handed.wanted, handed.leaving
        self.mapped, self.image = handed.mapped, handed.image
        self.lease.adopt(handed.lease)
        self._doubted = handed.mapped is not None and not is_open(handed.mapped)
        if self._doubted:
            self._events.emit(
                "volume.not_adopted", level="warning", volume=self.spec.id
            )
        else:
            self.state, self.since = VolumeState(handed.state), handed.since
        if handed.failure is not None:
            self._failures.last = handed.failure.failure(trio.current_time())

    async def close(self) -> None:
        """Close everything, whatever the state; for the daemon's last clean-up."""
        self._stop_work.set()
        self._forget_key()
        with contextlib.suppress(TdxdError):
            self._host.mounts.unmount(self.mount_point)
        if self.mapped is not None:
            with contextlib.suppress(TdxdError):
                self._host.mapper.unmap(self.mapped)
            self.mapped = None
