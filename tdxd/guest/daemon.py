"""The daemon's state and what may be asked of it: the verbs behind `tdxctl`."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn, Protocol

import trio

from tdxd import __version__
from tdxd.core.config import Config
from tdxd.core.plan import VolumeState
from tdxd.core.secret import Secret
from tdxd.errors import MissingError, NotReadyError, ReexecError
from tdxd.guest import report
from tdxd.guest.attest import Attester, Bundles
from tdxd.guest.changes import Changes
from tdxd.guest.config_files import LoadedConfig, check_reload
from tdxd.guest.events import Events
from tdxd.guest.handover import HandedDaemon
from tdxd.guest.named_secrets import NamedSecrets
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.serving import ServingReconciler
from tdxd.guest.standstill import Standstill
from tdxd.guest.surroundings import Surroundings
from tdxd.guest.volumes import Volumes
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
    """All reconcilers of one daemon."""

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
        self.secrets = self._named_secrets()
        self.volumes = Volumes(
            config=lambda: self.loaded.config,
            surroundings=self._surroundings,
            serving=lambda: self.serving,
        )
        self.serving = self._serving()
        self._serving_done = trio.Event()

    def _named_secrets(self) -> NamedSecrets:
        return NamedSecrets(
            config=lambda: self.loaded.config,
            attester=self.attester,
            changes=self.changes,
            events=self.events,
            standstill=self.standstill,
            nursery=self._nursery,
            boottime_s=self._host.boottime_s,
        )

    def _serving(self) -> ServingReconciler:
        return ServingReconciler(
            host=self._host,
            config=self.config,
            standstill=self.standstill,
            changes=self.changes,
            events=self.events,
            volumes=self.volumes,
            secrets=self.secrets,
            nursery=self._nursery,
        )

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
        self._nursery.start_soon(self.secrets.run)
        self._nursery.start_soon(self._run_serving)
        self._nursery.start_soon(self.volumes.watch)
        self.volumes.add_new()

    async def _fetch_bundles(self, ids: tuple[str, ...]) -> Bundles:
        """Ask under the config of now: a reload may have changed the servers."""
        return await self._fetch(self.loaded, ids)

    async def _run_serving(self) -> None:
        await self.serving.run()
        self._serving_done.set()

    def _surroundings(self) -> Surroundings:
        return Surroundings(
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

    async def stop(self) -> None:
        """Close everything in order: front, model server, mounts, mappings, loop devices."""
        self.stopping = self.serving.stopping = self.volumes.stopping = True
        self.standstill.release()
        for volume in self.volumes.all:
            volume.want(mounted=False, leave=True)
        self.changes.ring()
        with trio.move_on_after(_STOP_DEADLINE_S):
            await self._serving_done.wait()
            while self.volumes.all:
                await self.changes.after(self.changes.count)

    async def close(self) -> None:
        """Close whatever `stop` could not; never raises for what is already gone."""
        await self.serving.close()
        self.secrets.close()
        async with trio.open_nursery() as nursery:
            for volume in self.volumes.all:
                nursery.start_soon(volume.close)

    def beats(self) -> list[float]:
        """Return when each reconciler last looked, on trio's clock."""
        volumes = [one.beat_s for one in self.volumes.all]
        return [self.serving.beat_s, *volumes, self.secrets.beat_s]

    def network_came_up(self) -> None:
        """Try again at once where a network may have been missing."""
        self.secrets.network_came_up()
        for volume in self.volumes.all:
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
            volumes=self.volumes.all,
            serving=self.serving,
            secrets=self.secrets,
        )

    def readiness(self) -> tuple[bool, list[str], int]:
        """Return (ready, reasons why not, exit code)."""
        ready, reasons = report.readiness(self.config, self.volumes.all, self.serving)
        code = report.failure_exit_code(self.config, self.volumes.all, self.serving)
        return ready, reasons, 0 if ready else code

    def settled(self) -> bool:
        """Say whether nothing is on its way."""
        return self.volumes.settled and self.secrets.settled and self.serving.settled

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition of the daemon holds."""
        while True:
            count = self.changes.count
            if condition():
                return
            await self.changes.after(count)

    # --- changing ---

    async def mount(self, volume_id: str, passphrase: Secret | None = None) -> None:
        """Want a volume mounted until the next reload; return when it is, or rests.

        The passphrase is for a foreign volume that an operator opens; it is wiped once tried, also
        if it cannot be; the caller wipes it if there is no such volume.

        Raises: what keeps it from being mounted.
        """
        one = self.volumes.named(volume_id)
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
        one = self.volumes.named(volume_id)
        self.volumes.close_all(volume_id)

        def closed() -> bool:  # an older generation may still drain
            every = [other for other in self.volumes.all if other.spec.id == volume_id]
            return all(other.state is VolumeState.ABSENT for other in (one, *every))

        await self.until(lambda: closed() or one.wanted)

    async def retry(self, volume_id: str | None) -> None:
        """Forget failures and try again now; without an id, all and serving, too."""
        if volume_id:
            self.volumes.named(volume_id)
        for one in self.volumes.all:
            if volume_id in (None, one.spec.id):
                one.retry_now()
        if volume_id is None:
            self.secrets.ask_now()
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
        for one in self.volumes.all:
            same = config.volume_named(one.spec.id) == one.spec
            one.want(mounted=same, leave=not same)
            one.retry_now()
        self.serving.retry_now()
        self.volumes.ask_for_news()
        self.secrets.ask_now()
        self.events.emit("config.reloaded", volumes=len(config.volume))
        self.volumes.add_new()
        await self._settle()

    async def _settle(self) -> None:
        """Wait until all rests, for what is mounted is served only after the next look.

        Raises: NotReadyError, naming what did not come up, and what goes on instead.
        """

        def failing() -> bool:
            return report.failing(self.config, self.volumes.all, self.serving)

        await self.until(lambda: self.settled() and (self.readiness()[0] or failing()))
        ready, reasons, _code = self.readiness()
        if not ready:
            text = "reloaded, but not ready: " + "; ".join(reasons)
            raise NotReadyError(text, hint="tdxctl status")
        kept = report.kept(self.volumes.all, self.serving, self.secrets)
        if kept:
            text = "reloaded, but what was there before still serves: "
            raise NotReadyError(text + "; ".join(kept), hint="tdxctl status")

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
            for one in self.volumes.all:
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
            volumes=self.volumes.hand_over(),
            serving=self.serving.hand_over(),
            secrets=self.secrets.hand_over(),
            events=self.events.hand_over(),
        )

    def _adopt(self, handed: HandedDaemon) -> None:
        """Go on where the program before this one stood still.

        A configuration that has changed since then is carried out as by a reload.
        """
        self.started, self.reexecs = handed.started, handed.reexecs + 1
        self.events.adopt(handed.events)
        self.secrets.adopt(handed.secrets)
        self.volumes.adopt(handed.volumes)
        self.serving.adopt(handed.serving)
        fields = {"from_version": handed.version, "version": __version__}
        self.events.emit("daemon.reexecuted", **fields, pid=os.getpid())
