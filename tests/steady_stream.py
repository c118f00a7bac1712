"""A steady stream of requests for tests: at a fixed rate, whatever became of those before.

Requests take turns on `kept` connections, and every further one opens a connection of its own, as
a new user does. Each is recorded from its start to its end. The stream ends by itself after
`most_s`, so that a test that hangs does not leave it running.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import grpc
import numpy as np

from tdxd.host import tf_messages
from tdxd.user.endpoint import Endpoint
from tdxd.user.infer import Model, decode_answer, encode_request

__all__ = ["CLOCK", "INPUT", "Answer", "SteadyStream", "gap_s", "stream_channel"]

CLOCK = time.monotonic
INPUT = np.array([[1, 2, 3, 4]], dtype=np.float32)
_CONNECT_AGAIN_MS = 100
"""gRPC itself waits a second and more before it connects again: that is no figure of the server."""
_END_S = 30.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request: when it was sent and had ended, its gRPC code and text, and who answered."""

    number: int
    connection: str
    """`kept 0` and so on, or `fresh`."""
    sent_s: float
    ended_s: float
    code: str
    details: str
    version: int | None = None
    """Of the model that answered."""
    output: tuple[float, ...] = ()
    """The first row of `y`."""

    @property
    def seen(self) -> tuple[int | None, tuple[float, ...]]:
        """Which version answered what."""
        return self.version, self.output

    @property
    def ok(self) -> bool:
        """Whether it was answered."""
        return self.code == "OK"


def stream_channel(endpoint: Endpoint) -> grpc.Channel:
    """Open a channel that soon connects again, with a connection of its own."""
    assert endpoint.ca_pem is not None
    options: list[tuple[str, Any]] = [
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
        ("grpc.enable_retries", 0),
        ("grpc.max_reconnect_backoff_ms", _CONNECT_AGAIN_MS),
        ("grpc.initial_reconnect_backoff_ms", _CONNECT_AGAIN_MS),
    ]
    if endpoint.server_name is not None:
        options.append(("grpc.ssl_target_name_override", endpoint.server_name))
    credentials = grpc.ssl_channel_credentials(root_certificates=endpoint.ca_pem)
    return grpc.secure_channel(endpoint.address, credentials, options=options)


class SteadyStream:
    """Sends while its block runs; a request that takes longer than the endpoint's time fails.

    Without `request` the model `line` is asked. The answer to any request has a row of `y`.
    While `in_flight` requests have no answer, the next one waits.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        request: bytes | None = None,
        kept: int = 3,
        rate_per_s: float = 50.0,
        most_s: float = 120.0,
        in_flight: int = 2000,
    ) -> None:
        self._endpoint, self._most_s = endpoint, most_s
        self._in_flight = in_flight
        self._pause_s = 1 / rate_per_s
        self._request = request or encode_request(Model(name="line"), {"x": INPUT})
        self._kept = kept
        self._answers: list[Answer] = []
        self._changed = threading.Condition()
        self._sent = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._end.set()
        self._thread.join(self._endpoint.timeout_s + _END_S)
        assert not self._thread.is_alive()

    @property
    def answers(self) -> list[Answer]:
        """All that ended so far, in the order in which they were sent."""
        with self._changed:
            return sorted(self._answers, key=lambda one: one.sent_s)

    @property
    def failures(self) -> list[Answer]:
        """Those of them that failed."""
        return [one for one in self.answers if not one.ok]

    def by_connection(self) -> dict[str, list[Answer]]:
        """Return the answers of each kept connection, and those of all fresh ones together."""
        found: dict[str, list[Answer]] = {}
        for one in self.answers:
            found.setdefault(one.connection, []).append(one)
        return found

    def until(
        self, wanted: Callable[[Answer], bool], what: str, timeout_s: float = 60.0
    ) -> Answer:
        """Wait for an answer; return the first one."""
        seen = 0
        deadline_s = CLOCK() + timeout_s
        with self._changed:
            while True:
                for one in self._answers[seen:]:
                    if wanted(one):
                        return one
                seen = len(self._answers)
                left_s = deadline_s - CLOCK()
                assert left_s > 0, f"timed out: {what}: {self._answers[-1:]}"
                self._changed.wait(left_s)

    def more(self, timeout_s: float = 60.0) -> None:
        """Wait until every connection, and one opened from now on, has answered again."""
        now_s = CLOCK()
        for name in (*(f"kept {number}" for number in range(self._kept)), "fresh"):

            def wanted(one: Answer, name: str = name) -> bool:
                return one.ok and one.connection == name and one.sent_s >= now_s

            self.until(wanted, f"an answer: {name}", timeout_s)

    # --- sending ---

    def _run(self) -> None:
        start_s = CLOCK()
        with contextlib.ExitStack() as stack:
            kept = [
                stack.enter_context(stream_channel(self._endpoint))
                for _ in range(self._kept)
            ]
            while not self._end.wait(self._due_s(start_s)):
                if CLOCK() - start_s > self._most_s:
                    break
                self._wait_for_room(self._in_flight - 1)
                turn = self._sent % (self._kept + 1)
                if turn < self._kept:
                    self._send(f"kept {turn}", kept[turn], lambda: None)
                else:
                    channel = stream_channel(self._endpoint)
                    self._send("fresh", channel, channel.close)
            self._wait_for_room(0)

    def _wait_for_room(self, in_flight: int) -> None:
        """Wait until no more than so many have no answer; each has one in its time."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._sent - len(self._answers) <= in_flight,
                self._endpoint.timeout_s + 1,
            )

    def _due_s(self, start_s: float) -> float:
        return max(0.0, start_s + self._sent * self._pause_s - CLOCK())

    def _send(
        self, connection: str, channel: grpc.Channel, after: Callable[[], None]
    ) -> None:
        call: Any = channel.unary_unary(tf_messages.PREDICT_METHOD)
        number, sent_s = self._sent, CLOCK()
        self._sent += 1
        future = call.future(self._request, timeout=self._endpoint.timeout_s)
        about = functools.partial(
            Answer, number=number, connection=connection, sent_s=sent_s
        )
        future.add_done_callback(lambda one: self._done(about, one, after))

    def _done(
        self, about: Callable[..., Answer], future: Any, after: Callable[[], None]
    ) -> None:
        made = about(
            ended_s=CLOCK(),
            code=future.code().name,
            details=future.details() or "",
            **_who(future),
        )
        with self._changed:
            self._answers.append(made)
            self._changed.notify_all()
        after()


def _who(future: Any) -> dict[str, Any]:
    """Return which version answered, and what."""
    if future.code() is not grpc.StatusCode.OK:
        return {}
    answer = decode_answer(future.result())
    return {
        "version": answer.version,
        "output": tuple(answer.outputs["y"][0].tolist()),
    }


def gap_s(answers: Iterable[Answer]) -> float:
    """Return the longest time in which no request was answered."""
    ends_s = sorted(one.ended_s for one in answers if one.ok)
    pairs = itertools.pairwise(ends_s)
    return max((after - before for before, after in pairs), default=0.0)
