"""All volumes of the daemon: each generation has a reconciler, a newer one takes over.

While a generation is open and there are other image files, the key server is asked once in a
while whether it releases a newer one. That is opened beside the old one, serving moves over, and
the old one leaves. Nothing of this ends a generation that is served before the next one is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import trio

from tdxd.core.config import Config, VolumeConfig
from tdxd.errors import Retry, TdxdError, UsageError
from tdxd.guest.handover import HandedVolume, ServedVolume
from tdxd.guest.reconciler import VolumeReconciler
from tdxd.guest.surroundings import Surroundings
from tdxd.host import clock

__all__ = ["Volumes"]

_NEWS_S = 300.0
"""How often the key server is asked for a newer generation while other image files are there."""
_NEWS_SOONEST_S = 30.0
"""Image files are the host's, which could change them all the time to use up quotas."""
_POLL_S = 2.0


class _Serving(Protocol):
    """What the volumes ask of serving."""

    def uses(self, volume_id: str, generation: int | None) -> bool:
        """Say whether a model server was started on it and has not ended."""
        ...

    def serves(self, volume_id: str, generation: int | None) -> bool:
        """Say whether clients are answered from it."""
        ...


@dataclasses.dataclass(slots=True)
class _Look:
    """The last time that a newer generation was asked for, and the image files of then."""

    image_tag: tuple[int, ...] | None = None
    at_s: float = -math.inf
    next_s: float = -math.inf
    at_once: bool = False
    """Whether somebody wants to know now."""

    @classmethod
    def at(cls, now_s: float, one: VolumeReconciler) -> _Look:
        """Make one of the files of now, after which there is time until the next."""
        pause_s = _NEWS_S * (0.8 + 0.4 * clock.jitter())
        return cls(image_tag=one.device.image_tag, next_s=now_s + pause_s)


class Volumes:
    """Adds and removes reconcilers as the configuration and the image files want it."""

    def __init__(
        self,
        *,
        config: Callable[[], Config],
        surroundings: Callable[[], Surroundings],
        serving: Callable[[], _Serving],
    ) -> None:
        self.all: list[VolumeReconciler] = []
        self.stopping = False
        self._config, self._surroundings, self._serving = config, surroundings, serving
        around = surroundings()
        self._nursery, self._changes = around.nursery, around.changes
        self._standstill, self._mapper = around.standstill, around.host.mapper
        self._looks: dict[str, _Look] = {}
        self._replacing: set[VolumeReconciler] = set()
        """Those that an older generation has left for, until they are open or have failed."""

    # --- life ---

    def add_new(self) -> None:
        """Add each configured volume that has no reconciler; none any more when stopping.

        One that must go first, to come back configured otherwise, is added once it is gone.
        """
        if self.stopping:
            return
        have = {one.spec.id for one in self.all}
        for spec in self._config().volume:
            if spec.id not in have:
                self._run(self._reconciler(spec))

    def _reconciler(
        self, spec: VolumeConfig, newer_than: int | None = None
    ) -> VolumeReconciler:
        return VolumeReconciler(
            spec,
            self._surroundings(),
            in_use=lambda one: self._serving().uses(one.spec.id, one.generation),
            held=lambda one: self._held(one) or self._has_twin(one),
            newer_than=newer_than,
        )

    def _run(self, volume: VolumeReconciler) -> None:
        self.all.append(volume)
        self._nursery.start_soon(self._run_one, volume)

    async def _run_one(self, volume: VolumeReconciler) -> None:
        await volume.run()
        self.all.remove(volume)
        self._replacing.discard(volume)
        self.add_new()
        self._changes.ring()

    async def watch(self) -> None:
        """Let newer generations come and older ones go, until cancelled."""
        while True:
            await self._standstill.passage()
            count, now_s = self._changes.count, trio.current_time()
            if not self.stopping:
                for volume_id in {one.spec.id for one in self.all}:
                    self._consider(volume_id, now_s)
            await self._changes.after(count, now_s + _POLL_S)

    def _consider(self, volume_id: str, now_s: float) -> None:
        one = self._open_alone(volume_id)
        if one is not None and one.looked and volume_id not in self._looks:
            # It has just been opened: of the files of now nothing newer was released.
            self._looks[volume_id] = _Look.at(now_s, one)
        if self._due(volume_id, now_s):
            self._look_for_newer(self.named(volume_id), now_s)
        elif volume_id in self._looks and not self._asked_for_news(volume_id):
            self._looks[volume_id].at_once = False
        self._replacing -= {one for one in self._replacing if one.mounted}
        for older, newer in itertools.pairwise(list(self._of(volume_id))):
            if self._gives_way(older, newer):
                if not newer.mounted:
                    self._replacing.add(newer)
                newer.newer_than = None
                older.want(mounted=False, leave=True)
            elif not older.mounted:  # two must not open the same generation
                newer.want(mounted=False, leave=True)

    def _of(self, volume_id: str) -> Iterator[VolumeReconciler]:
        """Yield those that stay, the one that was there first first."""
        return (one for one in self.all if one.spec.id == volume_id and not one.leaving)

    # --- news ---

    def ask_for_news(self) -> None:
        """Look for newer generations of all that is open, once its image files are seen."""
        for one in self.all:
            self._looks.setdefault(one.spec.id, _Look()).at_once = True

    def _open_alone(self, volume_id: str) -> VolumeReconciler | None:
        """Return what is open of a volume, unless a newer generation is on its way already."""
        staying = list(self._of(volume_id))
        one = staying[0] if len(staying) == 1 else None
        if one is None or one.stalled or one.spec.by_operator:
            return None
        return one if one.wanted and one.mounted else None

    def _asked_for_news(self, volume_id: str) -> bool:
        """Say whether somebody waits to know whether there is a newer generation."""
        one, look = self._open_alone(volume_id), self._looks.get(volume_id)
        if one is None or look is None or not look.at_once:
            return False
        return not one.looked or bool(one.device.others)

    def _due(self, volume_id: str, now_s: float) -> bool:
        """Say whether to ask for a newer generation now."""
        one, look = self._open_alone(volume_id), self._looks.get(volume_id)
        if one is None or look is None or not one.device.others:
            return False
        if look.at_once:
            return one.looked
        changed = look.image_tag != one.device.image_tag or one.lease.superseded
        return now_s >= (look.at_s + _NEWS_SOONEST_S if changed else look.next_s)

    def _look_for_newer(self, one: VolumeReconciler, now_s: float) -> None:
        look = _Look.at(now_s, one)
        look.at_s = now_s
        self._looks[one.spec.id] = look
        self._run(self._reconciler(one.spec, newer_than=one.generation))
        self._changes.ring()

    # --- from one generation to the next ---

    def _gives_way(self, older: VolumeReconciler, newer: VolumeReconciler) -> bool:
        """Say whether the newer one does the work now, or needs the older one's room."""
        if not older.mounted:
            return older.wanted and self._is_hope(newer, instead_of=older)
        if newer.mounted:
            return self._is_served(newer)
        return self._held(newer) and newer.device.fits

    def _is_hope(
        self, newer: VolumeReconciler, *, instead_of: VolumeReconciler
    ) -> bool:
        """Say whether rather the newer one gets the volume open, of two that are not."""
        if newer.device.mapped is not None or newer.failure is None:
            return newer.wanted
        return _failed_for_good(instead_of) and not _failed_for_good(newer)

    def _has_twin(self, one: VolumeReconciler) -> bool:
        """Say whether one that leaves has not closed yet what this one may open."""
        mine = {bundle.manifest.generation for bundle in one.device.bundles}
        return any(
            other.leaving and other.spec.id == one.spec.id and other.generation in mine
            for other in self.all
            if other is not one
        )

    def _is_served(self, one: VolumeReconciler) -> bool:
        if self._config().serving is None:
            return True
        return self._serving().serves(one.spec.id, one.generation)

    def _held(self, one: VolumeReconciler) -> bool:
        """Say whether this machine cannot hold both: then the older one must be gone first."""
        serving = self._config().serving
        in_place = serving is not None and serving.strategy == "replace-in-place"
        return (
            in_place
            and self._mapper.name == "memory"
            and any(
                other is not one
                and other.spec.id == one.spec.id
                and other.device.mapped is not None
                for other in self.all
            )
        )

    def refuse(self, served: tuple[ServedVolume, ...], error: TdxdError) -> bool:
        """Close the newest generations among these that have an older one still open.

        Returns whether there is one: it is to blame for the error, and the older one goes on.
        """
        seen = {(one.volume_id, one.generation) for one in served}
        refused = [
            newer
            for volume_id, _generation in seen
            for older, newer in itertools.pairwise(self._of(volume_id))
            if older.mounted and (volume_id, newer.generation) in seen
        ]
        for newer in refused:
            newer.refuse(error)
        return bool(refused)

    # --- what serving asks ---

    def served(self) -> tuple[ServedVolume, ...] | None:
        """Return the volumes to serve; `None` while one is on its way and none must go."""
        going = any(
            one.closing and self._serving().uses(one.spec.id, one.generation)
            for one in self.all
            if not self._replaced(one)
        )
        coming = any(one.awaited for one in self.all)
        if coming and not going:
            return None
        newest = {
            one.spec.id: one  # a newer one was added later
            for one in self.all
            if one.wanted and one.mounted
        }
        return tuple(
            ServedVolume(
                volume_id=volume_id,
                generation=one.generation or 0,
                mount_point=one.device.mount_point,
            )
            for volume_id, one in sorted(newest.items())
        )

    @property
    def replacing(self) -> bool:
        """Whether a generation has gone first to make room for the next, which is on its way."""
        return any(
            one.wanted and not one.mounted and one.failure is None
            for one in self._replacing
        )

    def _replaced(self, one: VolumeReconciler) -> bool:
        """Say whether a newer generation is open in its place: it goes when that serves."""
        return one.leaving and any(
            other.mounted for other in self._of(one.spec.id) if other is not one
        )

    def revoked(self) -> frozenset[tuple[str, int | None]]:
        """Return (id, generation) of each volume that no model server may see any longer."""
        return frozenset(
            (one.spec.id, one.generation) for one in self.all if one.forfeited
        )

    # --- what the daemon asks ---

    @property
    def settled(self) -> bool:
        """Whether nothing is on its way."""
        if any(one.leaving or not one.settled for one in self.all if not one.stalled):
            return False
        ids, now_s = {one.spec.id for one in self.all}, trio.current_time()
        return not any(
            self._asked_for_news(volume_id)
            or self._due(volume_id, now_s)
            or any(
                itertools.starmap(
                    self._gives_way, itertools.pairwise(self._of(volume_id))
                )
            )
            for volume_id in ids
        )

    def named(self, volume_id: str) -> VolumeReconciler:
        """Return the reconciler of a volume; of several that of the generation that was first.

        Raises: UsageError, with the known ids.
        """
        for one in self._of(volume_id):
            return one
        known = " ".join(sorted({one.spec.id for one in self.all})) or "none"
        raise UsageError(
            f"no volume {volume_id!r}", hint=f"configured volumes: {known}"
        )

    def close_all(self, volume_id: str) -> None:
        """Want every generation of a volume closed.

        Raises: UsageError for no volume.
        """
        first = self.named(volume_id)
        for one in list(self._of(volume_id)):
            one.want(mounted=False, leave=one is not first)

    # --- over an exec ---

    def hand_over(self) -> tuple[HandedVolume, ...]:
        """Return what the program after this one needs."""
        return tuple(one.hand_over() for one in self.all)

    def adopt(self, handed: tuple[HandedVolume, ...]) -> None:
        """Go on with what the program before this one opened; one configured otherwise leaves."""
        for one in handed:
            volume = self._reconciler(one.spec)
            volume.adopt(one)
            if self._config().volume_named(one.spec.id) != one.spec:
                volume.want(mounted=False, leave=True)
            self._run(volume)


def _failed_for_good(one: VolumeReconciler) -> bool:
    """Say whether it is not tried again by itself."""
    finals = (Retry.NEVER, Retry.OPERATOR)
    return one.failure is not None and one.failure.error.retry in finals
