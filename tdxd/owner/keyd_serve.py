"""Runs the key server: reads its directory, listens, and ends in order at SIGTERM.

One process on a port of its own, unless `share_port` lets several processes listen together
(SO_REUSEPORT): dcap-qvl holds the GIL, so more cores need more processes.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from tdxd.core import keyrelease as protocol
from tdxd.core.config import Address, parse_address
from tdxd.errors import ConfigError, HostError
from tdxd.host import systemd
from tdxd.owner.appraise import TrustedRoot, intel_root, load_root
from tdxd.owner.collateral import CollateralCache
from tdxd.owner.files import read_bytes
from tdxd.owner.judge import Judge
from tdxd.owner.kek import read_kek
from tdxd.owner.keyd import Keyd, KeydSecrets
from tdxd.owner.keyd_config import KeydConfig, read_config
from tdxd.owner.keyd_init import ServerTls, read_secrets, read_tls
from tdxd.owner.pcs import PcsSource, fetch_collateral
from tdxd.owner.store import Store
from tdxd.owner.volumes import Volumes

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

__all__ = ["Service", "make_keyd", "serve", "start_server"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_THREADS = 4
_CALLS_MAX = 64
"""Calls in work or waiting; the next one gets RESOURCE_EXHAUSTED."""
_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STOP_S = 5.0


class Service(Protocol):
    """The two calls, on raw bytes; `Keyd` is the one that runs."""

    def challenge(self, request: bytes, context: grpc.ServicerContext, /) -> bytes:
        """Answer a `ChallengeRequest`."""
        ...

    def release(self, request: bytes, context: grpc.ServicerContext, /) -> bytes:
        """Answer a `ReleaseRequest`."""
        ...


def serve(directory: Path, *, share_port: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; prints `ready HOST:PORT` on standard output.

    A service manager is told, too (sd_notify(3)).

    Raises: ConfigError, HostError.
    """
    config = read_config(directory)
    # Blocked before any thread exists and then waited for: a handler that sets an Event can
    # run while this thread holds the Event's own lock, and hangs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _END_SIGNALS)
    try:
        _serve(directory, config, share_port=share_port)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return 0


def _serve(directory: Path, config: KeydConfig, *, share_port: bool) -> None:
    with Store.open(directory) as store:
        keyd = make_keyd(directory, config, store)
        address = parse_address(config.listen)
        server, port = start_server(
            keyd, address, read_tls(directory), share_port=share_port
        )
        simulated = [root.file for root in config.root]
        if simulated:
            _log.warning("keyd.simulated_root_trusted", files=simulated)
        bound = Address(address.host, port)
        _log.info("keyd.started", listen=str(bound), simulated=bool(simulated))
        notifier, _sockets = systemd.adopt_environment()
        notifier.send(READY="1", STATUS=f"listening on {bound}")
        sys.stdout.write(f"ready {bound}\n")
        sys.stdout.flush()
        signal.sigwait(_END_SIGNALS)
        notifier.send(STOPPING="1")
        server.stop(_STOP_S).wait()
        _log.info("keyd.stopped")


def make_keyd(
    directory: Path,
    config: KeydConfig,
    store: Store,
    *,
    clock: Callable[[], float] = time.time,
) -> Keyd:
    """Build the key server of a store directory.

    Raises: ConfigError, HostError.
    """
    secrets = read_secrets(directory)
    deployment = bytes.fromhex(config.deployment)
    return Keyd(
        store=store,
        volumes=Volumes(store, read_kek(directory)),
        judge=_judge(directory, config, secrets),
        secrets=secrets,
        deployment=deployment,
        token_lifetime_s=config.token_lifetime_s,
        clock=clock,
        random_bytes=os.urandom,
    )


def _judge(directory: Path, config: KeydConfig, secrets: KeydSecrets) -> Judge:
    roots: dict[TrustedRoot, CollateralCache] = {
        intel_root(): _cache(
            config, config.collateral.url, config.collateral.root_crl_url
        )
    }
    for item in config.root:
        path = directory / item.file
        root = load_root(read_bytes(path), simulated=item.simulated, source=str(path))
        roots[root] = _cache(config, item.collateral_url, None)
    return Judge(
        token_keys=secrets.token_keys,
        deployment=bytes.fromhex(config.deployment),
        signing_key_sha256=protocol.signing_key_id(
            secrets.signing.public_key().public_bytes_raw()
        ),
        roots=roots,
    )


def _cache(config: KeydConfig, url: str, root_crl_url: str | None) -> CollateralCache:
    source = PcsSource(
        url=url, root_crl_url=root_crl_url, timeout_s=config.collateral.timeout_s
    )
    return CollateralCache(
        lambda fmspc, ca: fetch_collateral(source, fmspc, ca),
        refresh_s=config.collateral.refresh_s,
    )


def start_server(
    service: Service, address: Address, tls: ServerTls, *, share_port: bool
) -> tuple[grpc.Server, int]:
    """Start answering; return the server and the port that it listens on.

    Raises: HostError if the port is taken, ConfigError if the key does not fit the certificate.
    """
    import grpc

    server = grpc.server(
        ThreadPoolExecutor(_THREADS, thread_name_prefix="keyd"),
        maximum_concurrent_rpcs=_CALLS_MAX,
        options=[
            ("grpc.so_reuseport", int(share_port)),
            ("grpc.max_receive_message_length", protocol.REQUEST_MAX_BYTES),
            ("grpc.max_concurrent_streams", _CALLS_MAX),
        ],
    )
    # No (de)serialisers: requests are hashed exactly as they were received.
    handlers = {
        protocol.CHALLENGE_PATH.rpartition("/")[2]: service.challenge,
        protocol.RELEASE_PATH.rpartition("/")[2]: service.release,
    }
    name = protocol.RELEASE_PATH.split("/")[1]
    rpcs: dict[str, Any] = {
        method: grpc.unary_unary_rpc_method_handler(handler)
        for method, handler in handlers.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, rpcs),))
    pair = (tls.key_pem, tls.certificate_pem)
    try:
        credentials = grpc.ssl_server_credentials([pair])
        port = server.add_secure_port(str(address), credentials)
    except RuntimeError as exc:
        raise HostError(
            "listen on", str(address), 0, hint="is the port in use?"
        ) from exc
    except ValueError as exc:
        raise ConfigError(f"TLS certificate and key: {exc}") from exc
    server.start()
    return server, port
