"""An owner for tests: a store, a real key server on loopback, and a simulated platform."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.config import Address, KeyReleaseConfig, PlatformConfig
from tdxd.core.named_secret import ReleasedBundle
from tdxd.core.secret import Secret
from tdxd.errors import TdxdError
from tdxd.guest.events import Events
from tdxd.guest.keyfetch import Connect, Fetched, fetch_bundles
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.host.ports import Host, Tsm
from tdxd.host.rpc import GrpcKeyServer
from tdxd.owner import authority
from tdxd.owner.server.assembly import make_keyd
from tdxd.owner.server.config import read_config
from tdxd.owner.server.init import (
    GuestPin,
    InitOptions,
    ServerTls,
    init_store,
    read_tls,
)
from tdxd.owner.server.limits import LimitsConfig
from tdxd.owner.server.rpc_server import OnEnd, RpcServer, Service
from tdxd.owner.store.admin import add_bundle
from tdxd.owner.store.store import AuditRecord, Store
from tdxd.sim.collateral import Collateral
from tdxd.sim.pccs import PccsServer
from tdxd.sim.platform import SimPlatform

__all__ = [
    "LOOPBACK",
    "Guest",
    "Owner",
    "Platform",
    "make_bundle",
    "no_record",
    "opened_owner",
    "policy_text",
    "serving",
]

T = TypeVar("T")

LOOPBACK = Address("127.0.0.1", 0)


class Platform(SimPlatform):
    """A simulated platform whose collateral a test may change."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state: dict[str, Any] = {}
        self.mangle: Callable[[Collateral], Collateral] = lambda one: one

    def collateral(self, now_s: int, **overrides: Any) -> Collateral:
        return self.mangle(super().collateral(now_s, **{**self.state, **overrides}))


class Guest:
    """A `Tsm` whose quotes have the given overrides of report and shape."""

    def __init__(self, platform: SimPlatform, **overrides: Any) -> None:
        self._platform = platform
        self._overrides = overrides

    def quote(self, report_data: bytes) -> bytes:
        fields = {"report_data": report_data, **self._overrides}
        return self._platform.quote(**fields)

    def event_log(self) -> bytes:
        return self._platform.event_log


def make_bundle(volume_id: str, generation: int = 1, secret: bytes = b"") -> KeyBundle:
    manifest = Manifest(
        volume_id=volume_id,
        generation=generation,
        payload_offset_bytes=16 * 2**20,
        data_blocks=4,
        hash_blocks=1,
        root_hash=bytes(32),
        salt=bytes(32),
    )
    return KeyBundle(manifest=manifest, secret=Secret(secret or os.urandom(64)))


def policy_text(platform: SimPlatform, **changes: str) -> str:
    """A policy that this platform's TD meets; `changes` replace lines of `[tdx]`."""
    report = platform.report()
    registers = ", ".join(
        f'rtmr{index} = "{value.hex()}"' for index, value in enumerate(report.rtmrs)
    )
    lines = {
        "mrtd": f'["{report.mr_td.hex()}"]',
        "rtmr": f'[{{ name = "test-image", {registers} }}]',
        "td_attributes": '["SEPT_VE_DISABLE"]',
        "tcb_status": '["UpToDate"]',
        "platforms": '"any"',
        "simulated": "true",
        **changes,
    }
    release = lines.pop("release", "")
    body = "".join(f"{key} = {value}\n" for key, value in lines.items() if value)
    return f"[tdx]\n{body}{release}"


def no_record(directory: Path) -> RuntimeRecord:
    """The record of a guest whose kernel cannot extend RTMR3."""
    platform = PlatformConfig(
        extend="never", runtime_log=str(directory / "no-runtime-log")
    )
    return RuntimeRecord(cast("Any", None), platform, events=Events())


@dataclasses.dataclass
class Owner:
    """One owner and one platform; `offset_s` moves the key server's clock."""

    directory: Path
    platform: Platform
    store: Store
    pin: GuestPin
    offset_s: float = 0.0
    address: Address = LOOPBACK
    service: Service = dataclasses.field(init=False)

    def now_s(self) -> float:
        return time.time() + self.offset_s

    def add(
        self,
        volume_id: str,
        generation: int = 1,
        policy: str | None = "",
        **changes: str,
    ) -> KeyBundle:
        """Add a bundle; `policy` None leaves the volume without one."""
        bundle = make_bundle(volume_id, generation)
        kept = make_bundle(volume_id, generation, bundle.secret.reveal())
        file = self.directory.parent / f"{volume_id}-{generation}.bundle"
        file.write_bytes(bundle.encode())
        policy_file = None
        if policy is not None:
            policy_file = file.with_suffix(".toml")
            policy_file.write_text(policy or policy_text(self.platform, **changes))
        add_bundle(self.directory, file, policy_file, 0)
        return kept

    def server_tls(self, names: Sequence[str] = ("127.0.0.1",)) -> ServerTls:
        """A certificate of the pinned CA, for somebody else."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import (
            Encoding,
            load_pem_private_key,
        )

        ca = x509.load_pem_x509_certificate((self.directory / "ca.pem").read_bytes())
        ca_key = load_pem_private_key((self.directory / "ca.key").read_bytes(), None)
        key, certificate = authority.issue_server(cast("Any", ca_key), ca, names)
        return ServerTls(
            certificate_pem=certificate.public_bytes(Encoding.PEM),
            key_pem=authority.key_pem(key),
        )

    def config(self, *servers: Address, **changes: Any) -> KeyReleaseConfig:
        fields: dict[str, Any] = {
            "servers": tuple(str(one) for one in servers or (self.address,)),
            "ca": self.pin.ca,
            "signing_key": self.pin.signing_key,
            **changes,
        }
        return KeyReleaseConfig(**fields)

    async def fetch(
        self,
        *volume_ids: str,
        tsm: Tsm | None = None,
        config: KeyReleaseConfig | None = None,
        connect: Connect = GrpcKeyServer,
    ) -> dict[str, ReleasedBundle | TdxdError]:
        """Fetch as a guest on this platform does; without the leases."""
        found = await self.fetch_leased(
            *volume_ids, tsm=tsm, config=config, connect=connect
        )
        return {
            name: one if isinstance(one, TdxdError) else one.bundle
            for name, one in found.items()
        }

    async def fetch_leased(
        self,
        *volume_ids: str,
        tsm: Tsm | None = None,
        record: RuntimeRecord | None = None,
        config: KeyReleaseConfig | None = None,
        connect: Connect = GrpcKeyServer,
    ) -> Fetched:
        """Fetch as a guest on this platform does, whose runtime record is `record`."""
        host = Host(
            tsm=tsm or Guest(self.platform),
            rtmr=cast("Any", None),
            mapper=cast("Any", None),
            mounts=cast("Any", None),
            children=cast("Any", None),
            random_bytes=os.urandom,
        )
        return await fetch_bundles(
            volume_ids,
            config=config or self.config(),
            host=host,
            record=record or no_record(self.directory.parent),
            connect=connect,
        )

    def last(self) -> AuditRecord:
        """The newest audit record."""
        return self.store.audit(limit=1)[0]

    def failed(self) -> dict[str, tuple[str, str]]:
        """Expected and actual value of each failed check of the newest record."""
        return {
            one.name: (one.expected, one.actual)
            for one in self.last().checks
            if not one.ok
        }


@functools.cache
def _server_loop() -> asyncio.AbstractEventLoop:
    """One event loop for all servers of the tests, in a thread that ends with the process.

    grpcio's asyncio servers of several loops in one process disturb each other.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="servers", daemon=True).start()
    return loop


def in_server_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run something in the thread of the servers and wait for it."""
    return asyncio.run_coroutine_threadsafe(work, _server_loop()).result(60)


NO_LIMITS = LimitsConfig(
    challenges_per_s=1e6,
    releases_per_s=1e6,
    peer_challenges_per_s=1e6,
    peer_releases_per_s=1e6,
)
"""Tests ask faster than a fleet of guests; those about limits set their own."""


@contextlib.contextmanager
def serving(
    service: Service,
    tls: ServerTls,
    limits: LimitsConfig = NO_LIMITS,
    on_end: OnEnd = lambda _kind, _code, _took_s: None,
) -> Iterator[Address]:
    """Answer on a loopback port, over real gRPC and TLS."""
    server = RpcServer(service, tls, limits, share_port=False, on_end=on_end)
    port = in_server_loop(server.start(LOOPBACK))
    try:
        yield Address("127.0.0.1", port)
    finally:
        in_server_loop(server.stop(0))


@contextlib.contextmanager
def opened_owner(directory: Path) -> Iterator[Owner]:
    """An owner with a running key server and a platform with a running PCCS."""
    platform = cast("Platform", Platform.create())
    pccs = PccsServer(platform, "127.0.0.1", 0)
    with contextlib.closing(pccs), contextlib.ExitStack() as stack:
        root = directory / "root.pem"
        root.write_text(platform.root_pem)
        options = InitOptions(
            names=("127.0.0.1",),
            listen="127.0.0.1:0",
            collateral_url=pccs.url,
            simulated_root=root,
        )
        pin = init_store(directory / "store", options, os.urandom)
        store = stack.enter_context(Store.open(directory / "store"))
        owner = Owner(directory / "store", platform, store, pin)
        config = read_config(owner.directory)
        keyd = make_keyd(owner.directory, config, store, clock=owner.now_s)
        owner.service = keyd
        owner.address = stack.enter_context(serving(keyd, read_tls(owner.directory)))
        yield owner
