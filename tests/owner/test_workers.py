"""The parent of the worker processes: they share a port, come back, and end in order."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tdxd.core import keyrelease as protocol
from tdxd.core.config import Address, parse_address
from tdxd.errors import ConfigError, HostError
from tdxd.host.rpc import tls_channel
from tdxd.owner.server.assembly import opened_server
from tdxd.owner.server.init import InitOptions, init_store
from tdxd.owner.server.metrics import Tally, Totals
from tdxd.owner.server.workers import Supervisor, WorkerFailedError, reserve_port
from tdxd.proto import keyrelease_pb2
from tests.keyserver import in_server_loop

ROOT = Path(__file__).parents[2]
WAIT_S = 40


class Server:
    """A real `tdx-keyd serve` with two workers."""

    def __init__(self, store):
        self.store = store
        self.log = store.parent / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tdxd.cli.tdx_keyd", "serve", str(store)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.address = self.next_address()

    def next_address(self):
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready "), self.log.read_text()
        return parse_address(line.split()[1])

    def workers(self):
        """Children of the parent, by /proc: what it says of itself does not count."""
        pid = self.process.pid
        try:
            text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        except FileNotFoundError:
            return set()
        return {int(one) for one in text.split()}

    def wait_for(self, condition):
        limit = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.05)

    def listeners(self):
        """How many sockets listen on the port (proc(5), state 0A); gRPC's are of IPv6."""
        port = f":{self.address.port:04X}"
        lines = [
            line.split()
            for name in ("tcp", "tcp6")
            for line in Path("/proc/net", name).read_text().splitlines()[1:]
        ]
        return sum(line[1].endswith(port) and line[3] == "0A" for line in lines)

    def ask(self):
        """One challenge on a connection of its own."""
        ca_pem = (self.store / "ca.pem").read_bytes()
        with contextlib.closing(tls_channel(self.address, ca_pem)) as channel:
            call: Any = channel.unary_unary(protocol.CHALLENGE_PATH)
            answer = call(b"", timeout=10, wait_for_ready=True)
        return keyrelease_pb2.ChallengeResponse.FromString(answer)

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def store(tmp_path):
    options = InitOptions(names=("127.0.0.1",), listen="127.0.0.1:0")
    init_store(tmp_path / "store", options, os.urandom)
    with (tmp_path / "store" / "keyd.toml").open("a") as file:
        file.write("[serve]\nworkers = 2\n")
    return tmp_path / "store"


@pytest.fixture
def server(store):
    made = Server(store)
    yield made
    made.close()


def test_ready_means_that_all_workers_listen(server):
    assert len(server.workers()) == server.listeners() == 2
    assert len(server.ask().token) == protocol.TOKEN_BYTES


def test_worker_that_aborts_takes_nobody_with_it_and_comes_back(server):
    """dcap-qvl ends its process for some inputs: the others answer, and it is started again."""
    before = server.workers()
    victim, other = sorted(before)
    os.kill(victim, signal.SIGABRT)
    server.wait_for(lambda: victim not in server.workers())
    assert other in server.workers()
    for _ in range(5):
        server.ask()
    server.wait_for(lambda: len(server.workers()) == server.listeners() == 2)
    assert other in server.workers()
    for _ in range(5):
        server.ask()
    assert f"worker.ended pid={victim} status=-6" in server.log.read_text()


def test_all_workers_killed_again_and_again_come_back(server):
    for _ in range(3):
        gone = server.workers()
        for pid in gone:
            os.kill(pid, signal.SIGKILL)
        server.wait_for(lambda gone=gone: not gone & server.workers())
        server.wait_for(lambda: server.listeners() == 2)
    server.ask()
    assert server.process.poll() is None


def test_workers_end_in_order(server):
    workers = server.workers()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(WAIT_S) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert "keyd.stopped" in server.log.read_text()


def test_workers_end_when_their_parent_is_killed(server):
    workers = server.workers()
    server.process.kill()
    server.process.wait(WAIT_S)
    server.wait_for(
        lambda: (
            not any(
                Path(f"/proc/{pid}/cmdline").exists()
                and Path(f"/proc/{pid}/cmdline").read_bytes()
                for pid in workers
            )
        )
    )
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.address.port), 1)


def test_reload_takes_the_new_configuration_without_a_pause(server):
    before = server.workers()
    config = server.store / "keyd.toml"
    config.write_text(config.read_text().replace("workers = 2", "workers = 1"))
    server.process.send_signal(signal.SIGHUP)
    limit = time.monotonic() + WAIT_S
    while server.workers() & before or len(server.workers()) != 1:
        server.ask()
        assert time.monotonic() < limit
    assert server.next_address() == server.address
    server.ask()


def test_reload_of_a_broken_configuration_changes_nothing(server):
    before = server.workers()
    config = server.store / "keyd.toml"
    good = config.read_text()
    config.write_text(good + "wrong = 1\n")
    server.process.send_signal(signal.SIGHUP)
    server.wait_for(lambda: "reload.failed" in server.log.read_text())
    assert server.workers() == before
    server.ask()
    # A worker that dies meanwhile cannot start; the other answers, and the mended file heals it.
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    server.wait_for(lambda: "worker.failed" in server.log.read_text())
    assert "serve.wrong: unknown key" in server.log.read_text()
    assert server.process.poll() is None
    server.ask()
    config.write_text(good)
    server.wait_for(lambda: server.listeners() == 2)


def serve_once(store):
    return subprocess.run(
        [sys.executable, "-m", "tdxd.cli.tdx_keyd", "serve", str(store)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda store: (store / "signing.key").chmod(0o644), "others may read"),
        (lambda store: (store / "kek.private").unlink(), "kek.private"),
        (lambda store: (store / "server.pem").write_text("no"), "error"),
    ],
)
def test_first_start_that_fails_says_why_and_ends(store, broken, said):
    broken(store)
    done = serve_once(store)
    assert done.returncode in {71, 78}
    assert done.stderr.count("tdx-keyd: error: ") == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


# --- the parent, in this process -----------------------------------------------


def supervisor(script, ready, ended, count=2):
    return Supervisor(
        lambda total: [sys.executable, "-c", script, str(total)],
        lambda: count,
        environment=dict(os.environ),
        on_ready=ready.append,
        on_end=lambda: ended.append(True),
        totals=Totals(),
    )


LISTENS = 'import sys; print(\'{"ready": "x"}\', flush=True); sys.stdin.read()'


def test_signals_reload_and_end():
    ended: list[bool] = []
    signals = [signal.SIGHUP, signal.SIGTERM]

    class Next(list[int]):
        """Sends the next signal each time that the workers are ready."""

        def append(self, workers):
            super().append(workers)
            os.kill(os.getpid(), signals.pop(0))

    ready = Next()
    before = signal.getsignal(signal.SIGTERM)
    supervisor(LISTENS, ready, ended).run()
    assert ready == [2, 2]
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_reload_asked_for_while_one_is_under_way_is_made_afterwards():
    """Its files may have changed after the first one's workers had read them."""
    counted: list[int] = []

    def count():
        counted.append(len(counted))
        if len(counted) == 2:  # the first reload has begun
            os.kill(os.getpid(), signal.SIGHUP)
        return 1

    class Next(list[int]):
        def append(self, workers):
            super().append(workers)
            number = {1: signal.SIGHUP, 3: signal.SIGTERM}.get(len(self))
            if number:
                os.kill(os.getpid(), number)

    ready = Next()
    made = supervisor(LISTENS, ready, [])
    made._count = count
    guard = threading.Timer(20.0, os.kill, (os.getpid(), signal.SIGTERM))
    guard.start()
    made.run()
    guard.cancel()
    assert ready == [1, 1, 1]


def test_worker_that_ends_while_another_starts_comes_back(tmp_path):
    """Its SIGCHLD comes when nobody looks for one."""
    first = tmp_path / "first"
    script = (
        "import os, sys, time\n"
        "try:\n"
        f"    os.close(os.open({str(first)!r}, os.O_CREAT | os.O_EXCL))\n"
        '    print(\'{"ready": "x"}\', flush=True)\n'
        "    sys.exit(1)\n"
        "except FileExistsError:\n"
        "    pass\n"
        f"open({str(first)!r} + str(os.getpid()), 'w').close()\n"
        "time.sleep(1)\n"
        'print(\'{"ready": "x"}\', flush=True)\n'
        "sys.stdin.read()\n"
    )
    stop = threading.Timer(6.0, os.kill, (os.getpid(), signal.SIGTERM))
    stop.start()
    supervisor(script, [], []).run()
    stop.cancel()
    assert len(list(tmp_path.glob("first?*"))) == 2


@pytest.mark.parametrize(
    ("script", "kind", "said"),
    [
        (
            'print(\'{"error": "signing.key is no key", "hint": "h", "code": 78}\')',
            ConfigError,
            "signing.key is no key",
        ),
        (
            'print(\'{"error": "sqlite", "hint": "h", "code": 71}\')',
            WorkerFailedError,
            "sqlite",
        ),
        ("import sys; sys.exit(3)", WorkerFailedError, "status 3"),
        ("import os; os.abort()", WorkerFailedError, "status -6"),
    ],
)
def test_first_workers_that_do_not_start(script, kind, said):
    ready: list[int] = []
    ended: list[bool] = []
    with pytest.raises(kind, match=said):
        supervisor(script, ready, ended).run()
    assert ready == ended == []
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_end_while_the_workers_start():
    ready: list[int] = []
    ended: list[bool] = []
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    supervisor("import sys; sys.stdin.read()", ready, ended).run()
    assert (ready, ended) == ([], [True])


def test_server_of_one_worker_answers(store):
    with opened_server(store, 1, tally=Tally()) as server:
        port = in_server_loop(server.start(Address("127.0.0.1", 0)))
        ca_pem = (store / "ca.pem").read_bytes()
        with contextlib.closing(tls_channel(Address("127.0.0.1", port), ca_pem)) as ch:
            call: Any = ch.unary_unary(protocol.CHALLENGE_PATH)
            assert call(b"", timeout=10)
        in_server_loop(server.stop(0))


def test_port_that_somebody_listens_on_is_not_shared():
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(HostError, match=f"127.0.0.1:{port}") as caught,
            reserve_port(Address("127.0.0.1", port)),
        ):
            pass
    assert "in use" in caught.value.hint


def test_second_server_on_the_port_is_refused(server, tmp_path):
    options = InitOptions(names=("127.0.0.1",), listen=str(server.address))
    init_store(tmp_path / "second", options, os.urandom)
    done = serve_once(tmp_path / "second")
    assert done.returncode == 71
    assert f"listen on {server.address}: Address already in use" in done.stderr


def test_reserved_port_takes_no_connection():
    with reserve_port(Address("127.0.0.1", 0)) as held:
        assert held.port
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((held.host, held.port), 1)
        with socket.create_server((held.host, held.port), reuse_port=True):
            socket.create_connection((held.host, held.port), 1).close()


def test_address_that_is_not_ours():
    with (
        pytest.raises(HostError, match=r"192\.0\.2\.1"),
        reserve_port(Address("192.0.2.1", 0)),
    ):
        pass
