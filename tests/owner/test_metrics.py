"""Metrics of the key server: counted by workers, added up by the parent, shown over HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest

from tdxd.core import keyrelease as protocol
from tdxd.core.config import parse_address
from tdxd.errors import ConfigError, DataError, HostError
from tdxd.host.rpc import tls_channel
from tdxd.owner.appraisal.judge import REASONS
from tdxd.owner.server.config import MetricsConfig, read_config
from tdxd.owner.server.init import InitOptions, init_store, read_tls
from tdxd.owner.server.limits import Kind, LimitsConfig
from tdxd.owner.server.metrics import CollateralSeen, Tally, Totals
from tdxd.owner.server.metrics_server import metrics_server
from tests.keyserver import serving
from tests.scrape import Scrape

ROOT = Path(__file__).parents[2]
WAIT_S = 40
LOOPBACK = MetricsConfig(listen="127.0.0.1:0")


def tally(challenges: int, *, fmspc: str = "", expires_s: int = 0) -> Tally:
    made = Tally()
    made.expect(REASONS)
    for _ in range(challenges):
        made.ended(Kind.CHALLENGE, "OK", 0.002)
    made.ended(Kind.RELEASE, "RESOURCE_EXHAUSTED", 9)
    made.decisions["denied", "quote"] += 1
    made.decisions["released", ""] += 2
    if fmspc:
        seen = CollateralSeen(
            root="Intel",
            fmspc=fmspc,
            ca="platform",
            issued_s=expires_s - 10,
            expires_s=expires_s,
        )
        made.collateral = lambda: [seen]
    return made


def test_counts_of_all_workers_add_up_and_survive_them():
    totals = Totals()
    totals.hear(1, tally(3, fmspc="AA", expires_s=100).line())
    totals.hear(1, tally(4, fmspc="AA", expires_s=100).line())
    totals.hear(2, tally(1, fmspc="AA", expires_s=200).line())
    totals.forget(1)
    totals.forget(1)
    totals.hear(3, tally(10, fmspc="BB", expires_s=50).line())
    seen = Scrape.of(totals.text())
    calls = "tdx_keyd_calls_total"
    assert seen.value(calls, method="challenges", code="OK") == 15
    assert seen.value(calls, method="releases", code="RESOURCE_EXHAUSTED") == 3
    assert seen.value(calls, method="releases", code="OK") == 0
    took = "tdx_keyd_call_duration_seconds"
    assert seen.value(f"{took}_count", method="challenges") == 15
    assert seen.value(f"{took}_bucket", method="challenges", le="0.001") == 0
    assert seen.value(f"{took}_bucket", method="challenges", le="0.0025") == 15
    assert seen.value(f"{took}_count", method="releases") == 0  # none was answered
    assert seen.value("tdx_keyd_releases_total") == 6
    denials = seen.labelled("tdx_keyd_denials_total", "reason")
    assert set(denials) == REASONS
    assert denials.pop("quote") == 3
    assert not any(denials.values())
    ends = seen.labelled("tdx_keyd_collateral_expiry_timestamp_seconds", "fmspc")
    assert ends == {"AA": 200, "BB": 50}


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b'{"calls": 1, "decisions": [], "durations": [], "collateral": []}',
        b'{"calls": [], "decisions": [], "durations": [["releases", [1], 1]], "collateral": []}',
        b'{"calls": [], "decisions": [], "durations": [], "collateral": [{"x": 1}]}',
        b'{"calls": [["releases", "OK", "x"]], "decisions": [], "durations": [], "collateral": []}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_count_changes_nothing(line):
    totals = Totals()
    totals.hear(1, tally(3).line())
    with pytest.raises(DataError):
        totals.hear(1, line)
    seen = Scrape.of(totals.text())
    assert seen.value("tdx_keyd_calls_total", method="challenges", code="OK") == 3


def get(address: Any, path: str = "/metrics", method: str = "GET") -> tuple[int, str]:
    request = urllib.request.Request(f"http://{address}{path}", method=method)
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def test_it_answers_over_http_and_nobody_keeps_it_from_others():
    with (
        metrics_server(LOOPBACK, lambda: "a 1\n") as address,
        contextlib.ExitStack() as stack,
    ):
        slow = [
            stack.enter_context(socket.create_connection(("127.0.0.1", address.port)))
            for _ in range(3)
        ]
        slow[0].sendall(b"GET /metr")
        assert get(address) == (200, "a 1\n")
        assert get(address, method="HEAD") == (200, "")
        assert get(address, "/other")[0] == 404
        assert get(address, method="POST")[0] == 405
        slow[1].sendall(b"x" * 100_000)
        assert slow[1].recv(100).startswith(b"HTTP/1.1 400 ")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", address.port))


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with (
            pytest.raises(HostError, match=f"listen on {listen}") as caught,
            metrics_server(MetricsConfig(listen=listen), str),
        ):
            pass
    assert "[metrics] listen" in caught.value.hint


def test_it_is_off_and_on_loopback_by_default(tmp_path):
    init_store(tmp_path / "s", InitOptions(names=("h",), listen="h:1"), os.urandom)
    assert read_config(tmp_path / "s").metrics is None
    config = tmp_path / "s" / "keyd.toml"
    with config.open("a") as file:
        file.write("[metrics]\n")
    found = read_config(tmp_path / "s").metrics
    assert found is not None
    assert parse_address(found.listen).host == "127.0.0.1"
    config.write_text(config.read_text() + 'listen = "everywhere"\n')
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        read_config(tmp_path / "s")


# --- how calls end -----------------------------------------------------------------


class Service:
    """Answers challenges; a release crashes."""

    def challenge(self, request: bytes, peer: str) -> bytes:
        return b"token"

    def release(self, request: bytes, peer: str) -> bytes:
        raise ZeroDivisionError


def test_every_end_of_a_call_is_counted_by_its_status(tmp_path):
    init_store(
        tmp_path / "s", InitOptions(names=("127.0.0.1",), listen="h:1"), os.urandom
    )
    limits = LimitsConfig(receive_s=0.1, peer_challenges_per_s=1e-3, burst_s=3000)
    counts, ca_pem = Tally(), (tmp_path / "s" / "ca.pem").read_bytes()

    def status(method: str, request: bytes | None) -> str:
        """Call; `None` is a request that does not come."""
        never = threading.Event()

        def messages():
            if request is None:
                never.wait(WAIT_S)
            else:
                yield request

        call: Any = channel.stream_unary(method)
        try:
            call(messages(), timeout=10)
        except grpc.RpcError as exc:
            code: grpc.StatusCode = exc.code()
            return code.name
        finally:
            never.set()
        return "OK"

    with (
        serving(Service(), read_tls(tmp_path / "s"), limits, counts.ended) as address,
        contextlib.closing(tls_channel(address, ca_pem)) as channel,
    ):
        assert status(protocol.CHALLENGE_PATH, b"") == "OK"
        assert status(protocol.CHALLENGE_PATH, None) == "DEADLINE_EXCEEDED"
        assert status(protocol.CHALLENGE_PATH, b"") == "OK"
        assert status(protocol.CHALLENGE_PATH, b"") == "RESOURCE_EXHAUSTED"
        assert status(protocol.RELEASE_PATH, b"") == "INTERNAL"
    assert {key: count for key, count in counts.calls.items() if count} == {
        ("challenges", "OK"): 2,
        ("challenges", "DEADLINE_EXCEEDED"): 1,
        ("challenges", "RESOURCE_EXHAUSTED"): 1,
        ("releases", "INTERNAL"): 1,
    }


# --- a real key server with two workers -------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A running `tdx-keyd serve`: its store, its address, that of its metrics, its pid."""
    store = tmp_path / "store"
    init_store(
        store, InitOptions(names=("127.0.0.1",), listen="127.0.0.1:0"), os.urandom
    )
    with (store / "keyd.toml").open("a") as file:
        file.write('[serve]\nworkers = 2\n[metrics]\nlisten = "127.0.0.1:0"\n')
    log_file = tmp_path / "log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tdxd.cli.tdx_keyd", "serve", str(store)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("ready "), log_file.read_text()
        (shown,) = re.findall(r"keyd.started .*metrics=(\S+)", log_file.read_text())
        yield store, parse_address(ready.split()[1]), shown, process.pid
    finally:
        process.kill()
        process.communicate()


def until(shown: str, name: str, wanted: float, **labels: str) -> None:
    limit_s = time.monotonic() + WAIT_S
    found = None
    while found != wanted:
        assert time.monotonic() < limit_s, found
        time.sleep(0.05)
        found = Scrape.of(get(shown)[1]).value(name, **labels)


def test_one_address_shows_all_workers_and_those_that_ended(server):
    store, address, shown, pid = server
    ca_pem = (store / "ca.pem").read_bytes()
    for _ in range(6):  # a connection stays with one worker
        with contextlib.closing(tls_channel(address, ca_pem)) as channel:
            ask: Any = channel.unary_unary(protocol.CHALLENGE_PATH)
            ask(b"", timeout=10, wait_for_ready=True)
            release: Any = channel.unary_unary(protocol.RELEASE_PATH)
            with pytest.raises(grpc.RpcError):
                release(b"\xff", timeout=10)
    calls = "tdx_keyd_calls_total"
    until(shown, calls, 6, method="challenges", code="OK")
    until(shown, calls, 6, method="releases", code="INVALID_ARGUMENT")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 2
    for one in children:
        os.kill(int(one), signal.SIGKILL)
    until(shown, "tdx_keyd_worker_restarts_total", 2)
    seen = Scrape.of(get(shown)[1])
    assert seen.value(calls, method="challenges", code="OK") == 6
    assert set(seen.labelled("tdx_keyd_denials_total", "reason")) == REASONS
