"""The daemon's state and what may be asked of it: the verbs behind `tdxctl`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol

import trio

from tdxd import __version__
from tdxd.core.config import Config, VolumeConfig
from tdxd.core.plan import VolumeState
from tdxd.core.secret import Secret
from tdxd.errors import MissingError, NotReadyError, ReexecError, UsageError
from tdxd.guest import report
from tdxd.guest.attest import Attester, Bundles
from tdxd.guest.changes import Changes
from tdxd.guest.config_files import LoadedConfig, check_reload
from tdxd.guest.events import Events
from tdxd.guest.handover import HandedDaemon, ServedVolume
from tdxd.guest.reconciler import VolumeReconciler
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.serving import ServingReconciler
from tdxd.guest.standstill import Standstill
from tdxd.guest.surroundings import Surroundings
from tdxd.host import clock
from tdxd.host.ports import Host

__all__ = ["Daemon", "Successor"]

_STOP_DEADLINE_S = 50.0
"""Within systemd's TimeoutStopSec of the unit, which is 60 s."""
_STANDSTILL_S = 20.0
"""Less than a reconciler may stand still before the watchdog is no longer fed."""
_LAST_LOOK_S = 5.0
_SIGNAL_S = 0.01
"""Long enough for a signal that has been received to be acted on."""


class Successor(Protocol):
    """The program that can take this one's place."""

    async def check(self) -> None:
        """Try it out.

        Raises: ConfigError, ReexecError, HostError.
        """
        ...

    def prepared(self) -> AbstractContextManager[Callable[[HandedDaemon], NoReturn]]:
        """Hold signals back; gives what executes it, which raises HostError if that fails."""
        ...


class Daemon:
    """All reconcilers of one daemon. Volumes are keyed by id; each opens one generation."""

    def __init__(
        self,
        *,
        host: Host,
        record: RuntimeRecord,
        loaded: LoadedConfig,
        load_config: Callable[[], LoadedConfig],
        fetch: Callable[[LoadedConfig, tuple[str, ...]], Awaitable[Bundles]],
        successor: Successor,
        events: Events,
        nursery: trio.Nursery,
    ) -> None:
        self.loaded = loaded
        self.events = events
        self.changes = Changes()
        self.standstill = Standstill()
        self.reexecs = 0
        self.evidence = {"given": 0, "busy": 0, "failed": 0}  # answers to clients
        self._reexecuting = False
        self.started = clock.wall_clock()
        self.stopping = False
        self._host, self._record = host, record
        self._load_config = load_config
        self._nursery = nursery
        self._fetch = fetch
        self._successor = successor
        self.attester = Attester(self._fetch_bundles, self.standstill)
        self._volumes: list[VolumeReconciler] = []
        self.serving = ServingReconciler(
            host=host,
            config=loaded.config,
            standstill=self.standstill,
            changes=self.changes,
            events=events,
            volumes=self._served,
            revoked=self._revoked,
            nursery=nursery,
        )
        self._serving_done = trio.Event()

    @property
    def config(self) -> Config:
        """The configuration of now."""
        return self.loaded.config

    # --- life ---

    def start(self, handed: HandedDaemon | None = None) -> None:
        """Start the attester and every reconciler in the nursery.

        With the state of the program before this one they go on where it stood still.
        """
        if handed is not None:
            self._adopt(handed)
        self._nursery.start_soon(self.attester.run)
        self._nursery.start_soon(self._run_serving)
        self._add_new()

    async def _fetch_bundles(self, ids: tuple[str, ...]) -> Bundles:
        """Ask under the config of now: a reload may have changed the servers."""
        return await self._fetch(self.loaded, ids)

    async def _run_serving(self) -> None:
        await self.serving.run()
        self._serving_done.set()

    def _add_new(self) -> None:
        """Add each configured volume that has no reconciler; none any more when stopping.

        One that must go first, to come back configured otherwise, is added once it is gone.
        """
        if self.stopping:
            return
        have = {one.spec.id for one in self._volumes}
        for spec in self.config.volume:
            if spec.id not in have:
                self._run(self._reconciler(spec))

    def _reconciler(self, spec: VolumeConfig) -> VolumeReconciler:
        around = Surroundings(
            host=self._host,
            release=self.config.key_release,
            attester=self.attester,
            record=self._record,
            standstill=self.standstill,
            changes=self.changes,
            events=self.events,
            nursery=self._nursery,
            directory=os.path.join(self.config.control.runtime_dir, "volumes"),
        )
        return VolumeReconciler(
            spec,
            around,
            in_use=lambda one: self.serving.uses(one.spec.id, one.generation),
        )

    def _run(self, volume: VolumeReconciler) -> None:
        self._volumes.append(volume)
        self._nursery.start_soon(self._run_volume, volume)

    async def _run_volume(self, volume: VolumeReconciler) -> None:
        await volume.run()
        self._volumes.remove(volume)
        self._add_new()
        self.changes.ring()

    def _served(self) -> tuple[ServedVolume, ...] | None:
        """Return the volumes to serve; `None` while one is on its way and none must go."""
        open_ = [one for one in self._volumes if one.wanted and one.mounted]
        going = any(
            one.closing and self.serving.uses(one.spec.id, one.generation)
            for one in self._volumes
        )
        coming = any(one.awaited for one in self._volumes)
        if coming and not going:
            return None
        return tuple(
            ServedVolume(
                volume_id=one.spec.id,
                generation=one.generation or 0,
                mount_point=one.mount_point,
            )
            for one in sorted(open_, key=lambda item: item.spec.id)
        )

    def _revoked(self) -> frozenset[tuple[str, int | None]]:
        """Return (id, generation) of each volume that no model server may see any longer."""
        return frozenset(
            (one.spec.id, one.generation) for one in self._volumes if one.forfeited
        )

    async def stop(self) -> None:
        """Close everything in order: front, model server, mounts, mappings, loop devices."""
        self.stopping = self.serving.stopping = True
        self.standstill.release()
        for volume in self._volumes:
            volume.want(mounted=False, leave=True)
        self.changes.ring()
        with trio.move_on_after(_STOP_DEADLINE_S):
            await self._serving_done.wait()
            while self._volumes:
                await self.changes.after(self.changes.count)

    async def close(self) -> None:
        """Close whatever `stop` could not; never raises for what is already gone."""
        await self.serving.close()
        async with trio.open_nursery() as nursery:
            for volume in self._volumes:
                nursery.start_soon(volume.close)

    def beats(self) -> list[float]:
        """Return when each reconciler last looked, on trio's clock."""
        return [self.serving.beat_s, *(one.beat_s for one in self._volumes)]

    def network_came_up(self) -> None:
        """Try again at once where a network may have been missing."""
        for volume in self._volumes:
            volume.network_came_up()

    # --- looking ---

    def status(self) -> dict[str, Any]:
        """Return the whole status."""
        return report.status(
            loaded=self.loaded,
            record=self._record,
            started=self.started,
            reexecs=self.reexecs,
            pid=os.getpid(),
            mapper=self._host.mapper.name,
            volumes=self._volumes,
            serving=self.serving,
        )

    def readiness(self) -> tuple[bool, list[str], int]:
        """Return (ready, reasons why not, exit code)."""
        ready, reasons = report.readiness(self.config, self._volumes, self.serving)
        code = report.failure_exit_code(self.config, self._volumes, self.serving)
        return ready, reasons, 0 if ready else code

    def settled(self) -> bool:
        """Say whether nothing is on its way."""
        volumes = all(
            one.stalled or (one.settled and not one.leaving) for one in self._volumes
        )
        return volumes and self.serving.settled

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition of the daemon holds."""
        while True:
            count = self.changes.count
            if condition():
                return
            await self.changes.after(count)

    # --- changing ---

    def volume(self, volume_id: str) -> VolumeReconciler:
        """Return the reconciler of a volume.

        Raises: UsageError, with the known ids.
        """
        for one in self._volumes:
            if one.spec.id == volume_id and not one.leaving:
                return one
        known = " ".join(one.spec.id for one in self._volumes) or "none"
        raise UsageError(
            f"no volume {volume_id!r}", hint=f"configured volumes: {known}"
        )

    async def mount(self, volume_id: str, passphrase: Secret | None = None) -> None:
        """Want a volume mounted until the next reload; return when it is, or rests.

        The passphrase is for a foreign volume that an operator opens; it is wiped once tried, also
        if it cannot be; the caller wipes it if there is no such volume.

        Raises: what keeps it from being mounted.
        """
        one = self.volume(volume_id)
        if passphrase is not None:
            one.offer(passphrase)
        one.want(mounted=True)
        one.retry_now()

        def at_rest() -> bool:
            return one.mounted or one.failure is not None or not one.wanted

        await self.until(lambda: at_rest() or one.absent)
        if one.failure is not None and not one.mounted:
            raise one.failure.error
        if one.wanted and not one.mounted:
            text = f"volume {volume_id}: no file matches {one.spec.image}"
            raise MissingError(text, hint="copy the image there")

    async def unmount(self, volume_id: str) -> None:
        """Want a volume closed until the next reload; return when it is."""
        one = self.volume(volume_id)
        one.want(mounted=False)
        await self.until(lambda: one.state is VolumeState.ABSENT or one.wanted)

    async def retry(self, volume_id: str | None) -> None:
        """Forget failures and try again now; without an id, all and serving, too."""
        chosen = [self.volume(volume_id)] if volume_id else list(self._volumes)
        for one in chosen:
            one.retry_now()
        self.serving.retry_now()

    async def reload(self) -> None:
        """Read the config anew and return when it is carried out.

        Raises: ConfigError, and nothing has changed; NotReadyError if something required did
        not come up.
        """
        loaded = self._load_config()
        config = loaded.config
        check_reload(self.config, config)
        self.loaded, self.serving.config = loaded, config
        for one in self._volumes:
            same = config.volume_named(one.spec.id) == one.spec
            one.want(mounted=same, leave=not same)
            one.retry_now()
        self.serving.retry_now()
        self.events.emit("config.reloaded", volumes=len(config.volume))
        self._add_new()
        await self._settle()

    async def _settle(self) -> None:
        """Wait until all rests, for what is mounted is served only after the next look.

        Raises: NotReadyError, naming what did not come up.
        """

        def failing() -> bool:
            return report.failing(self.config, self._volumes, self.serving)

        await self.until(lambda: self.settled() and (self.readiness()[0] or failing()))
        ready, reasons, _code = self.readiness()
        if not ready:
            raise NotReadyError(
                "reloaded, but not ready: " + "; ".join(reasons), hint="tdxctl status"
            )

    # --- giving way to a new program ---

    async def reexec(self, accepted: Callable[[], Awaitable[None]]) -> None:
        """Replace this program by the one now on disk; returns only by an error.

        `accepted` is called when nothing but the exec itself can fail any more.

        Raises: ConfigError, ReexecError, HostError; then all goes on as before.
        """
        if self._reexecuting:
            raise ReexecError("tdxd is already being re-executed")
        self._reexecuting = True
        try:
            await self._successor.check()
            if self.stopping:
                raise ReexecError("tdxd is stopping")
            self.standstill.freeze()
            self.attester.give_up()
            for one in self._volumes:
                one.give_up()
            await self.standstill.reached(_STANDSTILL_S)
            with self._successor.prepared() as execute:
                await accepted()
                await trio.sleep(_SIGNAL_S)
                await self.standstill.reached(_LAST_LOOK_S)
                self.events.emit("daemon.reexecuting", version=__version__)
                execute(self._hand_over())  # nothing else ran since the last look
        finally:
            self._reexecuting = False
            self.standstill.release()
            self.changes.ring()

    def _hand_over(self) -> HandedDaemon:
        return HandedDaemon(
            version=__version__,
            reexecs=self.reexecs,
            started=self.started,
            volumes=tuple(one.hand_over() for one in self._volumes),
            serving=self.serving.hand_over(),
            events=self.events.hand_over(),
        )

    def _adopt(self, handed: HandedDaemon) -> None:
        """Go on where the program before this one stood still.

        A configuration that has changed since then is carried out as by a reload.
        """
        self.started, self.reexecs = handed.started, handed.reexecs + 1
        self.events.adopt(handed.events)
        for one in handed.volumes:
            volume = self._reconciler(one.spec)
            volume.adopt(one)
            if self.config.volume_named(one.spec.id) != one.spec:
                volume.want(mounted=False, leave=True)
            self._run(volume)
        self.serving.adopt(handed.serving)
        fields = {"from_version": handed.version, "version": __version__}
        self.events.emit("daemon.reexecuted", **fields, pid=os.getpid())
