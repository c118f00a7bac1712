"""What this guest adds to RTMR3, so that later quotes show which volumes it serves.

An event is kept in a file, then RTMR3 is extended with its digest: whatever happens in between
is repaired by the next use. All of it, and the making of quotes, goes through one lock: a
request carries exactly the events that its quote shows. The file outlives the daemon, since RTMR3
does; RTMR3 attests history, and does not stop code that was taken over from asking again.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import trio

from tdxd.core.config import PlatformConfig
from tdxd.core.foreign import AnyManifest
from tdxd.core.runtime_log import RuntimeEvent, volume_event
from tdxd.core.runtime_record import RuntimeHistory, parse_history
from tdxd.errors import HostError, RecordError, TdxdError
from tdxd.guest.events import Events
from tdxd.guest.failures import error_fields
from tdxd.host import durable, machine
from tdxd.host.ports import Rtmr

__all__ = ["RuntimeRecord"]


@functools.lru_cache(maxsize=64)
def _event(manifest: AnyManifest) -> RuntimeEvent:
    return volume_event(manifest)


class RuntimeRecord:
    """The events of this boot, and RTMR3. Only one task at a time is inside.

    The constructor compares the two, and repairs what a crash left, so that volumes handed
    over by the program before this one are known at once.
    """

    def __init__(
        self,
        rtmr: Rtmr,
        config: PlatformConfig,
        *,
        events: Events,
        boot_id: str | None = None,
    ) -> None:
        self.problem: TdxdError | None = None
        """Why RTMR3 and the log differ, or could not be compared; for people."""
        self._rtmr, self._extend, self._path = rtmr, config.extend, config.runtime_log
        self._events = events
        self._boot_id = machine.boot_id() if boot_id is None else boot_id
        self._lock = trio.Lock()
        self._history: RuntimeHistory | None = None
        self._shown: set[RuntimeEvent] = set()
        """What RTMR3 has once been seen to be extended with."""
        self._given_up: dict[RuntimeEvent, TdxdError] = {}
        """What could not be recorded where that is allowed to fail."""
        with self._noted():
            self._history = self._read()
            self._compare()

    # --- what others see and ask ---

    def shows(self, manifest: AnyManifest) -> bool:
        """Say whether RTMR3 shows that this volume is served, or need not."""
        event = _event(manifest)
        return (
            self._extend == "never" or event in self._shown or event in self._given_up
        )

    async def check(self) -> None:
        """Check that RTMR3 could be extended, before a key is asked for that needs it.

        Raises: HostError.
        """
        if self._extend == "required":
            async with self._lock:
                await trio.to_thread.run_sync(self._rtmr.check)

    async def add(self, manifest: AnyManifest) -> None:
        """Extend RTMR3 with a volume, once in each boot; harmless when repeated.

        Raises: HostError, RecordError, if the configuration requires it.
        """
        event = _event(manifest)
        try:
            async with self._lock:
                with self._noted(again=True):
                    added = await trio.to_thread.run_sync(self._add, event)
        except TdxdError as exc:
            if self._extend == "required":
                raise
            self._given_up[event] = exc
        else:
            if added:
                self._events.emit(
                    "runtime.extended",
                    volume=manifest.volume_id,
                    generation=manifest.generation,
                )

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[bytes]:
        """Let nothing extend RTMR3 while a quote is made; yields the log that goes with it.

        The log is given as it is, also where RTMR3 does not fit it: the key server judges that.
        """
        async with self._lock:
            with self._noted():
                await trio.to_thread.run_sync(self._compare)
            yield self._history.log if self._history is not None else b""

    def status(self) -> dict[str, Any]:
        """Return what `status` shows."""
        history, shown = self._history, None
        problem = self.problem or next(iter(self._given_up.values()), None)
        if problem is not None:
            text, hint = problem.message, problem.hint
            shown = {"code": problem.code, "message": text, "hint": hint}
        return {
            "extend": self._extend,
            "events": len(history.events) if history is not None else 0,
            "error": shown,
        }

    # --- in a worker thread, under the lock ---

    def _add(self, event: RuntimeEvent) -> bool:
        """Keep the event, then extend; return whether that was news."""
        self._history = self._read()
        self._compare()
        if event in self._shown:
            return False
        history = self._history
        if history is None:
            base = self._rtmr.value()
            history = RuntimeHistory(boot_id=self._boot_id, base=base)
        self._keep(history.with_event(event))
        self._compare()  # which finds that RTMR3 lacks it
        return True

    def _compare(self) -> None:
        """Extend RTMR3 with the last event if it was kept and no more.

        If that cannot be done the event is kept no longer.

        Raises: HostError; RecordError if something else made RTMR3 what it is.
        """
        history = self._history
        if history is None or self._extend == "never":
            return
        missing = history.missing(self._rtmr.value())
        if missing is not None:
            try:
                self._rtmr.extend(missing.digest())
            except HostError:
                shorter = history.without_last()
                if self._rtmr.value() == shorter.value:
                    self._keep(shorter)
                raise
            if history.missing(self._rtmr.value()) is not None:
                raise RecordError("RTMR3 did not change when it was extended")
        self._shown.update(history.events)

    def _keep(self, history: RuntimeHistory) -> None:
        durable.replace_file(self._path, history.encode())
        self._history = history

    def _read(self) -> RuntimeHistory | None:
        """Return what this boot kept, `None` if that is nothing yet.

        Raises: HostError, RecordError.
        """
        try:
            with open(self._path, "rb") as file:
                history = parse_history(file.read())
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise HostError.of("read", self._path, exc) from exc
        return history if history.boot_id == self._boot_id else None

    @contextlib.contextmanager
    def _noted(self, *, again: bool = False) -> Iterator[None]:
        """Keep a problem for `status` and tell it once; raise it only if `again`."""
        try:
            yield
        except TdxdError as exc:
            known, self.problem = self.problem, exc
            if known is None or known.message != exc.message:
                self._events.emit(
                    "runtime.not_recorded", level="warning", **error_fields(exc)
                )
            if again:
                raise
        else:
            self.problem = None
