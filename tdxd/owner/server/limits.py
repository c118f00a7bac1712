"""How much the key server does for whom: rates and calls at once, of one peer and of all.

A peer is an IPv4 address, or the /64 network of an IPv6 address: whoever has one address of it has
them all. A call over a limit is refused at once, before its body is read; what one peer is refused
takes nothing from the others. Several worker processes do not talk to each other: each takes its
share of the limits of all, while those of one peer hold in each process (a connection stays with
one process).
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import ipaddress
import math
import urllib.parse
from collections.abc import Callable

__all__ = ["Gate", "Kind", "LimitsConfig", "peer_name"]

_V6_PREFIX = 64


class Kind(enum.Enum):
    """What a call asks for; the value is its name in messages."""

    CHALLENGE = "challenges"
    RELEASE = "releases"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """The `[limits]` table; rates are calls per second.

    `burst_s`: who has been quiet may spend the calls of so many seconds at once. `calls` and
    `peer_calls` are calls at once, those that still send their request among them. `peers` is how
    many peers are remembered; the one that was quiet longest is forgotten first.
    """

    challenges_per_s: float = 500.0
    releases_per_s: float = 500.0
    peer_challenges_per_s: float = 50.0
    peer_releases_per_s: float = 50.0
    burst_s: float = 4.0
    calls: int = 256
    peer_calls: int = 32
    peers: int = 10_000
    receive_s: float = 10.0
    """A request must have arrived within this time."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value < math.inf:
                raise ValueError(f"{field.name} {value} is not greater than 0")
        if min(self.peer_challenges_per_s, self.peer_releases_per_s) * self.burst_s < 1:
            raise ValueError("burst_s is too short for a single call of one peer")

    def share(self, workers: int) -> LimitsConfig:
        """Return what one of several workers may take."""
        return dataclasses.replace(
            self,
            challenges_per_s=self.challenges_per_s / workers,
            releases_per_s=self.releases_per_s / workers,
            calls=max(1, self.calls // workers),
        )

    def rate(self, kind: Kind) -> float:
        """Return the rate of all peers together."""
        challenge = kind is Kind.CHALLENGE
        return self.challenges_per_s if challenge else self.releases_per_s

    def peer_rate(self, kind: Kind) -> float:
        """Return the rate of one peer."""
        challenge = kind is Kind.CHALLENGE
        return self.peer_challenges_per_s if challenge else self.peer_releases_per_s


class _Bucket:
    """Tokens that come in at a rate, up to a cap; a call takes one."""

    __slots__ = ("_at_s", "_cap", "_rate", "_tokens")

    def __init__(self, rate: float, burst_s: float, now_s: float) -> None:
        self._rate = rate
        self._cap = max(1.0, rate * burst_s)
        self._tokens = self._cap
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Return in how many seconds a call may come, 0 for now."""
        self._tokens = min(
            self._cap, self._tokens + self._rate * max(0.0, now_s - self._at_s)
        )
        self._at_s = max(self._at_s, now_s)
        return max(0.0, (1.0 - self._tokens) / self._rate)

    def take(self) -> None:
        self._tokens -= 1.0


class Gate:
    """Lets calls in and out; of one thread only. `clock` is monotonic, in seconds."""

    def __init__(self, limits: LimitsConfig, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        now_s = clock()
        self._all = {
            kind: _Bucket(limits.rate(kind), limits.burst_s, now_s) for kind in Kind
        }
        self._peers: collections.OrderedDict[str, dict[Kind, _Bucket]] = (
            collections.OrderedDict()
        )
        self._inside: dict[str, int] = {}
        self._calls = 0
        self.refused = 0
        """Calls refused so far."""

    def __len__(self) -> int:
        """Return how many peers are remembered."""
        return len(self._peers)

    def enter(self, peer: str, kind: Kind) -> str:
        """Let a call in and return "", or refuse it and say why; what was let in must `leave`."""
        refusal = self._refusal(peer, kind)
        if refusal:
            self.refused += 1
            return refusal
        self._calls += 1
        self._inside[peer] = self._inside.get(peer, 0) + 1
        return ""

    def leave(self, peer: str) -> None:
        """Say that a call has ended."""
        self._calls -= 1
        left = self._inside[peer] - 1
        if left:
            self._inside[peer] = left
        else:
            del self._inside[peer]

    def _refusal(self, peer: str, kind: Kind) -> str:
        limits = self._limits
        if self._inside.get(peer, 0) >= limits.peer_calls:
            return f"{limits.peer_calls} calls of {peer} at once, no more"
        if self._calls >= limits.calls:
            return f"{limits.calls} calls at once, no more"
        now_s = self._clock()
        mine, everybody = self._buckets(peer, now_s)[kind], self._all[kind]
        wait_s = mine.wait_s(now_s)
        if wait_s:
            rate = limits.peer_rate(kind)
            return f"{peer}: {_rate(rate, kind)}; try again in {math.ceil(wait_s)} s"
        wait_s = everybody.wait_s(now_s)
        if wait_s:
            rate = limits.rate(kind)
            return f"busy: {_rate(rate, kind)}; try again in {math.ceil(wait_s)} s"
        mine.take()
        everybody.take()
        return ""

    def _buckets(self, peer: str, now_s: float) -> dict[Kind, _Bucket]:
        found = self._peers.get(peer)
        if found is not None:
            self._peers.move_to_end(peer)
            return found
        while len(self._peers) >= self._limits.peers:
            self._peers.popitem(last=False)
        burst_s = self._limits.burst_s
        made = {
            kind: _Bucket(self._limits.peer_rate(kind), burst_s, now_s) for kind in Kind
        }
        self._peers[peer] = made
        return made


def _rate(rate: float, kind: Kind) -> str:
    return f"at most {rate:g} {kind.value} per second"


@functools.lru_cache(maxsize=4096)  # a connection keeps its name
def peer_name(grpc_peer: str) -> str:
    """Return whom a limit counts, of gRPC's name for a connection, as "ipv6:%5B::1%5D:4711"."""
    scheme, _, rest = urllib.parse.unquote(grpc_peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if scheme not in {"ipv4", "ipv6"}:
        return scheme
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return scheme
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, _V6_PREFIX), strict=False))
    return str(address)
