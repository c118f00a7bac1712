"""A daemon that serves while a steady stream of requests goes through its front."""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Iterator
from typing import Any, Self

import numpy as np

from tdxd.host import tf_messages
from tdxd.user.endpoint import Endpoint
from tdxd.user.infer import Model, encode_request
from tests.steady_stream import INPUT, Answer, SteadyStream, gap_s, stream_channel
from tests.system.world import Daemon, World, free_port, toml

__all__ = [
    "LateRequest",
    "Serving",
    "assert_clear",
    "assert_moved_once",
    "assert_one_gap",
    "certificate_at",
    "late_request",
    "told",
]

_OVERLAP_S = 0.1
"""Two commands move the front over, and between them both servers answer."""
_CONNECTED_AGAIN_S = 1.0
"""Clients that could not connect try again at most so much later."""
Seen = tuple[int, tuple[float, ...]]


class Serving:
    """One address that is served, by one daemon after another."""

    def __init__(self, world: World, **tables: Any) -> None:
        self.world = world
        self.port = free_port()
        self.tables: dict[str, Any] = {
            **tables,
            "serving": {
                "listen": f"127.0.0.1:{self.port}",
                "user": "nobody",
                "drain_timeout_s": 8,
            },
        }
        self.ca_pem = (world.directory / "ca.pem").read_bytes()
        self._stack = contextlib.ExitStack()
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        """The one that serves now; it is started if there is none."""
        if self._daemon is None:
            self.start()
        assert self._daemon is not None
        return self._daemon

    @property
    def endpoint(self) -> Endpoint:
        """Where clients call, who wait for at most 20 s."""
        return Endpoint(
            address=f"127.0.0.1:{self.port}",
            server_name="localhost",
            ca_pem=self.ca_pem,
            timeout_s=20,
        )

    def start(self, *, killed: bool = False) -> None:
        """Start a daemon, and wait until it serves; `killed`: it will not end in order."""
        context = self.world.daemon(killed=killed, **self.tables)
        self._daemon = self._stack.enter_context(context)
        waited = self._daemon.ctl("wait", "--timeout", "150")
        assert waited.returncode == 0, waited.stdout + self._daemon.log.read_text()

    def stop(self) -> None:
        """End the daemon, if there is one; in order, nothing of it may be left."""
        self._daemon = None
        self._stack.close()

    def configure(self, **changes: Any) -> None:
        """Write another configuration, for the next reload; `serving` is merged, `None` removes."""
        merged = {**self.tables["serving"], **changes.pop("serving", {})}
        self.tables |= changes
        self.tables["serving"] = {
            name: value for name, value in merged.items() if value is not None
        }
        path = self.world.directory / "tdxd.toml"
        socket_path = str(self.daemon.socket_path)
        control = {
            "socket": socket_path,
            "runtime_dir": socket_path.removesuffix(".sock"),
        }
        path.write_text(toml(self.world.config(control=control, **self.tables)))

    def server_pid(self) -> int:
        """The model server, of which there is one."""
        (server,) = self.daemon.status()["serving"]["servers"]
        return int(server["pid"])

    def front_pid(self) -> int:
        """The front."""
        return int(self.daemon.status()["serving"]["front_pid"])

    @contextlib.contextmanager
    def stream(self, **options: Any) -> Iterator[SteadyStream]:
        """Send steadily during the block, which begins when each connection has an answer."""
        assert self.daemon
        with SteadyStream(self.endpoint, **options) as stream:
            stream.more()
            yield stream


def late_request(wait_ms: int) -> bytes:
    """Return a request that the model server answers so long after it came."""
    inputs: dict[str, Any] = {"x": INPUT, "wait_ms": np.array(wait_ms, np.int64)}
    return encode_request(Model(name="line", signature="late"), inputs)


class LateRequest:
    """A request that is on its way when the block begins; a second later it can be answered."""

    _UNDER_WAY_S = 0.3

    def __init__(self, endpoint: Endpoint) -> None:
        self._channel = stream_channel(endpoint)

    def __enter__(self) -> Self:
        call: Any = self._channel.unary_unary(tf_messages.PREDICT_METHOD)
        self._future = call.future(late_request(1300), timeout=60)
        time.sleep(self._UNDER_WAY_S)
        assert not self._future.done(), self.end()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._channel.close()

    def end(self) -> tuple[str, str]:
        """Wait for its end; return gRPC code and text."""
        return self._future.code().name, self._future.details() or ""


def certificate_at(port: int) -> bytes:
    """Return the certificate that a new connection is shown, DER."""
    return ssl.PEM_cert_to_DER_cert(
        ssl.get_server_certificate(("127.0.0.1", port), timeout=20)
    )


def told(what: str, stream: SteadyStream) -> str:
    """Say what failed and how, for who reads the test's output."""
    failures = stream.failures
    texts = sorted({f"{one.code}: {one.details[:100]}" for one in failures})
    return (
        f"{what}: {len(failures)} of {len(stream.answers)} requests failed {texts}, "
        f"longest time without an answer {gap_s(stream.answers):.2f} s"
    )


def assert_clear(failures: list[Answer]) -> None:
    """Every failure says what it is: the code after which clients try again, and a text."""
    assert [one for one in failures if one.code != "UNAVAILABLE"] == []
    assert [one for one in failures if not one.details] == []


def assert_one_gap(stream: SteadyStream, since_s: float) -> None:
    """Requests fail from then on, until one is answered; from there on all are."""
    answers, failures = stream.answers, stream.failures
    assert failures, "nothing failed"
    first_s = min(one.ended_s for one in failures)
    assert first_s > since_s
    again_s = min(one.sent_s for one in answers if one.ok and one.sent_s > first_s)
    limit_s = again_s + _CONNECTED_AGAIN_S
    assert [one for one in failures if one.sent_s > limit_s] == []
    assert [
        one
        for one in failures
        if one.sent_s > again_s and "failed to connect" not in one.details
    ] == []


def assert_moved_once(stream: SteadyStream, old: Seen, new: Seen) -> None:
    """On every connection the old answers come first, then the new ones, and no other."""
    for name, ended in stream.by_connection().items():
        answers = [one for one in ended if one.ok]
        seen = [one.seen for one in answers]
        assert set(seen) == {old, new}, name
        moved_s = answers[seen.index(new)].sent_s
        late = [
            one.sent_s - moved_s
            for one in answers
            if one.seen == old and one.sent_s > moved_s + _OVERLAP_S
        ]
        assert late == [], name
        assert (seen[0], seen[-1]) == (old, new), name
