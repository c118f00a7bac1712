"""The daemon's command line. Run by systemd in the guest; see tdxd(8)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

from tdxd import __version__
from tdxd.cli.boundary import Parser, run
from tdxd.core.config import Config
from tdxd.errors import NotAllowedError
from tdxd.guest import app
from tdxd.host import log, machine, mappers, mount, systemd
from tdxd.host.ports import Host

__all__ = ["main"]

_CONFIG = "/etc/tdxd/tdxd.toml"


def main() -> int:
    """Run the program; the entry point."""
    return run("tdxd", _main)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tdxd",
        description="Open sealed model volumes with attested keys, and serve the models.",
    )
    parser.add_argument("--config", default=_CONFIG, help=f"default: {_CONFIG}")
    parser.add_argument(
        "--check-config", action="store_true", help="read the configuration and exit"
    )
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="close what a killed daemon left open, and exit",
    )
    parser.add_argument("--version", action="version", version=f"tdxd {__version__}")
    return parser


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    config = app.read_config(args.config)
    if args.check_config:
        print(f"{args.config}: ok, {len(config.volume)} volumes")
        return 0
    if os.geteuid() != 0:
        uid = os.geteuid()
        raise NotAllowedError(f"tdxd runs as root, not as uid {uid}", hint="sudo tdxd")
    host = _host(config)
    if args.sweep:
        _sweep()
        return 0
    app.check_machine(config)
    machine.harden()
    mount.isolate()  # before any thread exists
    notifier, sockets = systemd.adopt_environment()
    log.configure()
    _sweep()
    import trio

    trio.run(
        partial(
            app.main,
            config=config,
            load_config=partial(app.read_config, args.config),
            host=host,
            notifier=notifier,
            sockets=sockets,
        )
    )
    return 0


def _host(config: Config) -> Host:
    from tdxd.host.proc import CellChildren
    from tdxd.host.tsm import ConfigfsTsm

    return Host(
        tsm=ConfigfsTsm(config.platform.tsm, config.platform.event_log),
        mapper=mappers.chosen(config.mapping),
        mounts=mount.KernelMounts(),
        children=CellChildren(),
        random_bytes=os.urandom,
    )


def _sweep() -> None:
    """Close what a killed daemon left: its mounts and children are gone with it."""
    for name in mappers.sweep():
        print(f"tdxd: swept {name}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
