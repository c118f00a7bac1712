"""Makes the evidence that clients of the front ask for: one quote at a time, and not without end.

Whoever reaches the front may ask, and a quote takes the host a while. So few wait, none for long;
after each quote comes a rest as long as it took, so that clients get half of the time at most; and
after one that failed there is none for a while. Quotes go through the lock of the runtime record as
those of key releases do, in order: a key release waits for one quote at most.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from tdxd.core.endpoint_proof import EndpointEvidence, endpoint_report_data
from tdxd.errors import CrowdedError, EvidenceError, HostError, NotReadyError, TdxdError
from tdxd.guest.events import Events
from tdxd.guest.failures import error_fields
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.standstill import Standstill
from tdxd.host.ports import Tsm

__all__ = ["Prover"]

_WAITING_MAX = 8
_REST_MAX_S = 5.0
_REST_AFTER_FAILURE_S = 30.0
_CROWDED = "too many clients ask for evidence now"
_NO_KEY = "the front serves no certificate now"


class Prover:
    """Proves this guest to clients of the front.

    `served_key` gives the SHA-256 of the public key of the certificate that the front serves now.
    Who has no turn within `patience_s` is sent away. `counts` gets the number of answers that are
    "given", "busy" and "failed".
    """

    def __init__(
        self,
        *,
        tsm: Tsm,
        record: RuntimeRecord,
        served_key: Callable[[], bytes | None],
        standstill: Standstill,
        events: Events,
        counts: dict[str, int],
        patience_s: float = 10.0,
    ) -> None:
        self._tsm, self._record = tsm, record
        self._served_key = served_key
        self._standstill, self._events = standstill, events
        self._patience_s = patience_s
        self._turn = trio.Lock()
        self._asking = 0
        self._rested_s = 0.0
        self._failed = False
        self._counts = counts

    async def evidence(self, nonce: bytes) -> EndpointEvidence:
        """Return evidence for one client.

        Raises: CrowdedError, NotReadyError, EvidenceError, HostError: the client may try again.
        """
        try:
            made = await self._in_turn(nonce)
        except CrowdedError:
            self._counts["busy"] += 1
            raise
        except (NotReadyError, EvidenceError, HostError) as exc:
            self._counts["failed"] += 1
            if not self._failed:  # told once, until it works again
                self._events.emit(
                    "evidence.failed", level="warning", **error_fields(exc)
                )
            self._failed = True
            raise
        self._counts["given"] += 1
        self._failed = False
        return made

    async def _in_turn(self, nonce: bytes) -> EndpointEvidence:
        """Wait in a short queue, for a limited time, and not over an exec."""
        if self._served_key() is None:
            raise NotReadyError(_NO_KEY)
        if self._asking > _WAITING_MAX or self._rest_s() > self._patience_s:
            raise CrowdedError(_CROWDED)
        self._asking += 1
        made: EndpointEvidence | TdxdError = CrowdedError(_CROWDED)
        try:
            with trio.move_on_after(self._patience_s) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._give_up_when_frozen, scope)
                    async with self._turn:
                        await trio.sleep(self._rest_s())
                        made = await self._made_or_not(nonce)
                    nursery.cancel_scope.cancel()
        finally:
            self._asking -= 1
        if isinstance(made, TdxdError):
            raise made
        return made

    async def _give_up_when_frozen(self, scope: trio.CancelScope) -> None:
        await self._standstill.until_frozen()
        scope.cancel()

    def _rest_s(self) -> float:
        return max(0.0, self._rested_s - trio.current_time())

    async def _made_or_not(self, nonce: bytes) -> EndpointEvidence | TdxdError:
        made: EndpointEvidence | TdxdError
        async with self._record.held() as runtime_log:
            began_s = trio.current_time()
            try:
                with trio.CancelScope(shield=True):  # a quote cannot be called off
                    made = await self._quoted(nonce, runtime_log)
                rest_s = min(trio.current_time() - began_s, _REST_MAX_S)
            except TdxdError as exc:
                made, rest_s = exc, _REST_AFTER_FAILURE_S
            self._rested_s = trio.current_time() + rest_s
        return made

    async def _quoted(self, nonce: bytes, runtime_log: bytes) -> EndpointEvidence:
        event_log = await trio.to_thread.run_sync(self._tsm.event_log)
        key_sha256 = self._served_key()
        if key_sha256 is None:
            raise NotReadyError(_NO_KEY)
        wanted = endpoint_report_data(
            nonce=nonce,
            key_sha256=key_sha256,
            event_log=event_log,
            runtime_log=runtime_log,
        )
        quote = await trio.to_thread.run_sync(self._tsm.quote, wanted)
        return EndpointEvidence(
            key_sha256=key_sha256,
            quote=quote,
            event_log=event_log,
            runtime_log=runtime_log,
        )
