"""What the benchmarks of key release share: servers in processes of their own, and a guest."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.config import Address, parse_address, parse_signing_key
from tdxd.core.secret import Secret
from tdxd.host.rpc import tls_channel
from tdxd.owner.server.init import read_tls
from tdxd.owner.server.rpc_server import RpcServer
from tdxd.proto import keyrelease_pb2
from tests.keyserver import NO_LIMITS, Owner

__all__ = [
    "Client",
    "Server",
    "configure",
    "cpu_per_call",
    "empty_server",
    "key_server",
    "memory_directory",
]

_REPOSITORY = Path(__file__).parents[2]
_NO_LIMITS = """
[limits]
challenges_per_s = 1e6
releases_per_s = 1e6
peer_challenges_per_s = 1e6
peer_releases_per_s = 1e6
"""


def memory_directory() -> str | None:
    """Where a store costs what it costs without a disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def configure(owner: Owner, workers: int = 1) -> None:
    """Set the number of workers, and no limits: one client is a whole fleet here."""
    config = owner.directory / "keyd.toml"
    text = config.read_text().partition("\n[limits]")[0]
    config.write_text(f"{text}{_NO_LIMITS}[serve]\nworkers = {workers}\n")


class Server:
    """A server's processes, and the clocks of their processor time (clock_getcpuclockid(3))."""

    def __init__(self, pids: list[int], address: Address) -> None:
        self.pids = pids
        self.address = address

    def cpu_s(self) -> float:
        """Return the processor time of all workers."""
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in self.pids)


@contextlib.contextmanager
def key_server(owner: Owner) -> Iterator[Server]:
    """Run `tdx-keyd serve` on the owner's store."""
    command = [sys.executable, "-m", "tdxd.cli.tdx_keyd", "serve", str(owner.directory)]
    with _started(command, owner) as (pid, address):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        yield Server([int(one) for one in children.split()], address)


@contextlib.contextmanager
def empty_server(owner: Owner) -> Iterator[Server]:
    """Run the same server with nothing behind its two calls."""
    command = [sys.executable, "-m", "tests.bench.release_parts", str(owner.directory)]
    with _started(command, owner) as (pid, address):
        yield Server([pid], address)


@contextlib.contextmanager
def _started(command: list[str], owner: Owner) -> Iterator[tuple[int, Address]]:
    with (owner.directory.parent / "server.log").open("ab") as log:
        child = subprocess.Popen(
            command, cwd=_REPOSITORY, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert child.stdout is not None
        try:
            line = child.stdout.readline()
            if not line.startswith("ready "):
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield child.pid, parse_address(line.split()[1])
        finally:
            child.terminate()
            child.wait(timeout=30)
            child.stdout.close()


class Client:
    """Makes whole exchanges on one channel; what it spends itself does not count."""

    def __init__(self, owner: Owner, server: Server) -> None:
        ca_pem = (owner.directory / "ca.pem").read_bytes()
        self._platform = owner.platform
        self._channel: Any = tls_channel(server.address, ca_pem)
        self._pair = hpke.key_pair(Secret(os.urandom(hpke.SEED_BYTES)))
        raw = parse_signing_key(owner.pin.signing_key)
        self._key_id = protocol.signing_key_id(raw)
        self.wall_s: list[float] = []

    def call(self, path: str, request: bytes) -> bytes:
        """Make one call."""
        answer: bytes = self._channel.unary_unary(path)(request, timeout=30)
        return answer

    def empty(self) -> None:
        """Make both calls without a word, and between them what a guest does."""
        self.call(protocol.CHALLENGE_PATH, b"")
        self.request(bytes(protocol.TOKEN_BYTES))
        self.call(protocol.RELEASE_PATH, b"")

    def request(self, token: bytes) -> bytes:
        """Do what a guest does between its two calls."""
        log = self._platform.event_log
        bound = protocol.report_data(
            token=token,
            public_key=self._pair.public,
            volume_ids=("v",),
            signing_key_sha256=self._key_id,
            event_log=log,
            runtime_log=b"",
        )
        request = keyrelease_pb2.ReleaseRequest(
            token=token,
            public_key=self._pair.public,
            volume_ids=["v"],
            quote=self._platform.quote(bound),
            event_log=log,
        )
        return request.SerializeToString()

    def asked(self) -> bytes:
        """Ask for a challenge and return the request that answers it."""
        challenge = keyrelease_pb2.ChallengeResponse.FromString(
            self.call(protocol.CHALLENGE_PATH, b"")
        )
        return self.request(challenge.token)

    def release(self) -> None:
        """Make a whole exchange; the time of its two calls goes to `wall_s`."""
        start_s = time.perf_counter()
        challenge = keyrelease_pb2.ChallengeResponse.FromString(
            self.call(protocol.CHALLENGE_PATH, b"")
        )
        asked_s = time.perf_counter() - start_s
        request = self.request(challenge.token)
        start_s = time.perf_counter()
        answer = self.call(protocol.RELEASE_PATH, request)
        self.wall_s.append(asked_s + time.perf_counter() - start_s)
        check(answer)


def check(answer: bytes) -> None:
    """Raise RuntimeError unless an answer releases its one volume."""
    (verdict,) = keyrelease_pb2.ReleaseResponse.FromString(answer).verdicts
    if int(verdict.status) != protocol.Status.RELEASED:
        raise RuntimeError(f"release was denied: {verdict.reason}")


def cpu_per_call(call: Callable[[], None], times: int, server: Server) -> float:
    """Return the server's processor time for each of some calls."""
    start_s = server.cpu_s()
    for _ in range(times):
        call()
    return (server.cpu_s() - start_s) / times


class _Empty:
    """Answers both calls with nothing."""

    def challenge(self, _request: bytes, _peer: str, /) -> bytes:
        return b""

    def release(self, _request: bytes, _peer: str, /) -> bytes:
        return b""


async def _serve_empty(directory: Path) -> None:
    server = RpcServer(_Empty(), read_tls(directory), NO_LIMITS, share_port=True)
    port = await server.start(Address("127.0.0.1", 0))
    print(f"ready 127.0.0.1:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve_empty(Path(sys.argv[1])))
