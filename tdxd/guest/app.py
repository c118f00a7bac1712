"""The daemon's start and end: sockets, signals, watchdog, and the nursery of everything."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import trio

from tdxd.core.config import Config
from tdxd.errors import ConfigError, HostError, ReexecError, TdxdError
from tdxd.guest import control
from tdxd.guest.attest import Bundles
from tdxd.guest.config_files import LoadedConfig
from tdxd.guest.daemon import Daemon
from tdxd.guest.events import Events
from tdxd.guest.handover import State, decode_state
from tdxd.guest.listener import Listener, Listeners
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.guest.standstill import SILENT_S
from tdxd.guest.successor import Successor, mount_namespace
from tdxd.host import log, machine, proc, routes
from tdxd.host.exec_in_place import SIGNALS, Inherited, Program
from tdxd.host.ports import Host
from tdxd.host.systemd import Notifier

__all__ = ["check_machine", "fetch_bundles", "main", "take_over"]


def check_machine(config: Config) -> None:
    """Refuse to start where secrets could leak.

    Raises: ConfigError, naming the deliberate relaxation.
    """
    swap = machine.swap_areas()
    if swap and not config.security.accept_swap:
        raise ConfigError(
            f"this machine swaps to {', '.join(swap)}: keys and models could land there",
            hint="swapoff -a, or to try things out set security.accept_swap = true",
        )


async def fetch_bundles(
    host: Host, record: RuntimeRecord, loaded: LoadedConfig, ids: tuple[str, ...]
) -> Bundles:
    """Run one key release exchange; loads gRPC and cryptography only now."""
    from tdxd.guest import keyfetch

    return await keyfetch.fetch_bundles(
        ids,
        config=loaded.config.key_release,
        host=host,
        record=record,
        ca_pem=loaded.ca_pem,
    )


def take_over(
    inherited: Inherited, config: Config, host: Host, *, besides: frozenset[int]
) -> State | None:
    """Return the state of the program before this one, if this one can go on with it.

    Otherwise all that is left of that program is ended and closed, as if it had been killed,
    but for the descriptors `besides`; the caller sweeps and starts afresh.
    """
    directory = config.control.runtime_dir
    try:
        state = decode_state(inherited.state)
        directory = state.runtime_dir
        _check_same_place(state, config, host)
    except TdxdError as exc:
        log.open_log()(
            {"level": "warning", "event": "handover.refused", "error": exc.message}
        )
    else:
        return state
    proc.end_all_children()
    inherited.close(besides=besides)
    for point in reversed(host.mounts.under(directory)):
        with contextlib.suppress(TdxdError):
            host.mounts.unmount(point)
    shutil.rmtree(directory, ignore_errors=True)
    return None


def _check_same_place(state: State, config: Config, host: Host) -> None:
    """Check that what was opened is where this program looks for it.

    Raises: ReexecError.
    """
    for what, then, now in (
        ("runtime directory", state.runtime_dir, config.control.runtime_dir),
        ("mapper", state.mapper, host.mapper.name),
        ("mount namespace", state.mount_namespace, mount_namespace()),
    ):
        if then != now:
            raise ReexecError(f"the {what} is {now} now, it was {then}")


async def main(
    *,
    loaded: LoadedConfig,
    load_config: Callable[[], LoadedConfig],
    host: Host,
    notifier: Notifier,
    sockets: dict[str, socket.socket],
    program: Program,
    handed: State | None = None,
) -> None:
    """Run the daemon until SIGTERM or SIGINT, then close everything in order.

    `program` can take its place; `handed` is the state of the one whose place this one took.

    Raises: HostError if an address or the control socket cannot be had.
    """
    config = loaded.config
    listeners = Listeners(config, sockets, handed)
    runtime_dir, events = _make_runtime_dir(config), Events()
    around = {"runtime_dir": runtime_dir, "mapper": host.mapper.name}
    successor = Successor(program, notifier=notifier, listeners=listeners, **around)
    record = RuntimeRecord(host.rtmr, config.platform, events=events)
    with _received_signals() as signals:
        async with trio.open_nursery() as nursery:
            daemon = Daemon(
                host=host,
                record=record,
                loaded=loaded,
                load_config=load_config,
                fetch=partial(fetch_bundles, host, record),
                successor=successor,
                events=events,
                nursery=nursery,
            )
            daemon.start(handed.daemon if handed else None)
            nursery.start_soon(control.serve, listeners.control, daemon)
            nursery.start_soon(_serve_health, listeners.health, daemon)
            prove = partial(_serve_evidence, host=host, record=record)
            nursery.start_soon(prove, listeners.evidence, daemon)
            await _until_told_to_stop(daemon, notifier, nursery, signals)
    daemon.events.emit("daemon.stopped")
    listeners.close()
    shutil.rmtree(runtime_dir, ignore_errors=True)


def _make_runtime_dir(config: Config) -> str:
    path = config.control.runtime_dir
    os.makedirs(os.path.join(path, "volumes"), mode=0o755, exist_ok=True)
    os.chmod(path, 0o755)  # noqa: S103 — the serving user passes through; no secret here
    return path


@contextlib.contextmanager
def _received_signals() -> Iterator[AsyncIterator[int]]:
    """Receive signals; after that they are ignored, so that none cuts the end short.

    What was held back over an exec is received, too: see `exec_in_place.held_signals`.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    with trio.open_signal_receiver(*SIGNALS) as received:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        yield received


async def _serve_health(listener: socket.socket | None, daemon: Daemon) -> None:
    """Answer health requests if there is where to; loads h11 only now."""
    if listener is None:
        return
    from tdxd.guest import health

    await health.serve(listener, daemon)


async def _serve_evidence(
    listener: Listener, daemon: Daemon, *, host: Host, record: RuntimeRecord
) -> None:
    """Answer clients who ask for evidence once the configuration lets them; loads it only then."""

    def wanted() -> bool:
        serving = daemon.config.serving
        return serving is not None and serving.attest

    def served_key() -> bytes | None:
        front = daemon.serving.front
        return front.served_key or None if front is not None else None

    await daemon.until(wanted)
    from tdxd.guest import evidence_endpoint
    from tdxd.guest.front_start import evidence_path
    from tdxd.guest.prover import Prover

    prover = Prover(
        tsm=host.tsm,
        record=record,
        served_key=served_key,
        standstill=daemon.standstill,
        events=daemon.events,
        counts=daemon.evidence,
    )
    path = evidence_path(daemon.config.control.runtime_dir)
    try:
        sock = listener.at(path, evidence_endpoint.listen_for_front)
    except HostError as exc:  # after a reload: nothing else may suffer from it
        daemon.events.emit("evidence.not_served", level="error", error=exc.message)
        return
    await evidence_endpoint.serve(sock, prover, daemon.standstill, wanted=wanted)


async def _until_told_to_stop(
    daemon: Daemon,
    notifier: Notifier,
    nursery: trio.Nursery,
    signals: AsyncIterator[int],
) -> None:
    """Tell the service manager, wait for a signal, then close everything in order."""
    nursery.start_soon(_watchdog, notifier, daemon)
    nursery.start_soon(_status_text, notifier, daemon)
    nursery.start_soon(_watch_routes, daemon)
    daemon.events.emit("daemon.started", pid=os.getpid())
    notifier.send(READY="1")
    try:
        await _obey(signals, daemon, notifier)
    finally:
        with trio.CancelScope(shield=True):
            notifier.send(STOPPING="1")
            await daemon.stop()
            await daemon.close()
        nursery.cancel_scope.cancel()


async def _obey(
    signals: AsyncIterator[int], daemon: Daemon, notifier: Notifier
) -> None:
    """Reload at SIGHUP; return at SIGTERM or SIGINT."""
    async with trio.open_nursery() as nursery:
        async for number in signals:
            daemon.events.emit("signal.received", signal=signal.Signals(number).name)
            if number != signal.SIGHUP:
                nursery.cancel_scope.cancel()
                return
            nursery.start_soon(_reload, daemon, notifier)


async def _reload(daemon: Daemon, notifier: Notifier) -> None:
    notifier.reloading()
    try:
        await daemon.reload()
    except TdxdError as exc:
        daemon.events.emit(
            "config.reload_failed", level="error", error=exc.message, hint=exc.hint
        )
    notifier.send(READY="1")


async def _watchdog(notifier: Notifier, daemon: Daemon) -> None:
    """Ping the service manager while every reconciler beats."""
    if notifier.watchdog_s is None:
        return
    while True:
        oldest = min(daemon.beats())
        if trio.current_time() - oldest < SILENT_S:
            notifier.send(WATCHDOG="1")
        await trio.sleep(notifier.watchdog_s / 3)


async def _status_text(notifier: Notifier, daemon: Daemon) -> None:
    """Keep the line that `systemctl status` shows true."""
    while True:
        count = daemon.changes.count
        ready, reasons, _code = daemon.readiness()
        notifier.send(STATUS="serving" if ready else "; ".join(reasons))
        await daemon.changes.after(count)


async def _watch_routes(daemon: Daemon) -> None:
    """Try again at once when a network may have come up."""
    try:
        async for _ in routes.gained():
            daemon.network_came_up()
    except HostError as exc:
        daemon.events.emit("routes.not_watched", level="warning", error=exc.message)
