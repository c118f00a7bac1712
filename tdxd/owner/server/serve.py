"""Runs the key server of a store directory: the parent of its worker processes.

The parent reads the configuration and no key; each worker opens the store and its keys for itself
(`worker`).
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import structlog

from tdxd.core.config import Address, parse_address
from tdxd.host import machine, systemd
from tdxd.host.log import configure
from tdxd.owner.server.config import KeydConfig, read_config
from tdxd.owner.server.metrics import Totals
from tdxd.owner.server.workers import Supervisor, reserve_port, worker_command

__all__ = ["serve"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


def serve(directory: Path, kek_file: Path | None = None) -> int:
    """Serve until SIGTERM or SIGINT; prints `ready HOST:PORT` on standard output.

    `kek_file` is where the private half of the key-encryption key lies, if elsewhere. A service
    manager is told, too (sd_notify(3)). SIGHUP reads the configuration and the keys again, without
    a pause.

    Raises: TdxdError.
    """
    machine.harden()
    notifier, _sockets = systemd.adopt_environment()
    environment = dict(
        os.environ
    )  # before the log takes what it names: the workers log as well
    configure()
    config = read_config(directory)
    totals = Totals()
    with (
        reserve_port(parse_address(config.listen)) as bound,
        _metrics(config, totals) as shown,
    ):

        def ready(workers: int) -> None:
            _log_start(config, bound, workers, shown)
            notifier.send(READY="1", STATUS=f"listening on {bound}")
            sys.stdout.write(f"ready {bound}\n")
            sys.stdout.flush()

        def count() -> int:
            return read_config(directory).serve.processes()

        supervisor = Supervisor(
            lambda total: worker_command(
                str(directory), str(bound), str(total), str(kek_file or "")
            ),
            count,
            environment=environment,
            on_ready=ready,
            on_end=lambda: notifier.send(STOPPING="1"),
            totals=totals,
        )
        supervisor.run()
    _log.info("keyd.stopped")
    return 0


def _log_start(
    config: KeydConfig, bound: Address, workers: int, shown: Address | None
) -> None:
    simulated = [root.file for root in config.root]
    if simulated:
        _log.warning("keyd.simulated_root_trusted", files=simulated)
    more = {"metrics": str(shown)} if shown else {}
    _log.info("keyd.started", listen=str(bound), workers=workers, **more)


def _metrics(
    config: KeydConfig, totals: Totals
) -> contextlib.AbstractContextManager[Address | None]:
    """Show the metrics, if the configuration says where; loads asyncio only now."""
    if config.metrics is None:
        return contextlib.nullcontext()
    from tdxd.owner.server.metrics_server import metrics_server

    return metrics_server(config.metrics, totals.text)
