"""Users of a served model who call without a pause, count what failed, and time their waits."""

from __future__ import annotations

import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

import numpy as np

from tdxd.host import tf_messages
from tdxd.user.endpoint import Endpoint, open_channel
from tdxd.user.infer import Model, encode_request, predict
from tests.system.world import wait_for

__all__ = ["Users"]

INPUT = np.array([[1, 2, 3, 4]], dtype=np.float32)
ANSWER = [[3, 5, 7, 9]]


class Users:
    """Users who call again and again: on a kept connection, on new ones, and health probes.

    A call that takes longer than `timeout_s` has failed; `pause_s` lies between two calls.
    """

    def __init__(
        self,
        ca: Path,
        *,
        port: int,
        health: int,
        name: str,
        timeout_s: float = 20.0,
        pause_s: float = 0.002,
    ) -> None:
        self.timeout_s, self.pause_s = timeout_s, pause_s
        self.endpoint = Endpoint(
            address=f"127.0.0.1:{port}",
            ca_pem=ca.read_bytes(),
            server_name=name,
            timeout_s=timeout_s,
        )
        self.health = f"http://127.0.0.1:{health}"
        self.answers = dict.fromkeys(("kept", "fresh", "probe"), 0)
        self.gaps_s = dict.fromkeys(self.answers, 0.0)
        """Of each the longest time from one answer to the next."""
        self.failures: list[str] = []
        self._end = threading.Event()

    def __enter__(self) -> Self:
        kinds = {"kept": self.kept, "fresh": self.fresh, "probe": self.probe}
        self.threads = [
            threading.Thread(target=self.loop, args=(kind, call))
            for kind, call in kinds.items()
        ]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self.threads:
            thread.join(self.timeout_s + 40)

    def loop(self, kind: str, call: Any) -> None:
        answered = None
        with open_channel(self.endpoint) as channel:
            while not self._end.is_set():
                try:
                    call(channel)
                except Exception as exc:  # noqa: BLE001 — each failure is what is counted
                    self.failures.append(f"{kind}: {exc!r}")
                else:
                    before, answered = answered, time.monotonic()
                    gap_s = answered - (before or answered)
                    self.gaps_s[kind] = max(self.gaps_s[kind], gap_s)
                    self.answers[kind] += 1
                time.sleep(self.pause_s)

    def kept(self, channel: Any) -> None:
        request = encode_request(Model(name="line"), {"x": INPUT})
        channel.unary_unary(tf_messages.PREDICT_METHOD)(request, timeout=self.timeout_s)

    def fresh(self, _channel: Any) -> None:
        answer = predict(self.endpoint, Model(name="line"), {"x": INPUT})
        assert answer.outputs["y"].tolist() == ANSWER

    def probe(self, _channel: Any) -> None:
        for path in ("livez", "readyz"):
            url = f"{self.health}/{path}"
            with urllib.request.urlopen(url, timeout=self.timeout_s) as reply:
                assert reply.status == 200

    def more(self, count: int = 5) -> None:
        """Wait until each has that many answers more."""
        before = dict(self.answers)
        wait_for(
            lambda: all(self.answers[one] >= before[one] + count for one in before),
            f"answers: {self.answers} {self.failures[:3]}",
        )
