"""The daemon's command line. Run by systemd in the guest; see tdxd(8)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from tdxd import __version__
from tdxd.cli.boundary import Parser, run
from tdxd.core.config import Config
from tdxd.errors import NotAllowedError, ReexecError
from tdxd.guest import app, handover
from tdxd.host import exec_in_place, log, machine, mappers, mount, systemd
from tdxd.host.exec_in_place import Inherited
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
    parser.add_argument("--check-handover", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="close what a killed daemon left open, and exit",
    )
    parser.add_argument("--version", action="version", version=f"tdxd {__version__}")
    return parser


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    inherited = exec_in_place.take()
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
    if args.check_handover is not None:
        _check_handover(args.check_handover)
        return 0
    _serve(config, host, inherited, partial(app.read_config, args.config))
    return 0


def _serve(
    config: Config,
    host: Host,
    inherited: Inherited | None,
    load_config: Callable[[], Config],
) -> None:
    """Run the daemon, from a fresh start or in the place of the program before this one."""
    machine.harden()
    program = exec_in_place.this_program()
    notifier, sockets = systemd.adopt_environment()
    log.configure()
    handed = None
    if inherited is not None:
        passed = frozenset(one.fileno() for one in sockets.values())
        handed = app.take_over(inherited, config, host, besides=passed)
    if handed is None:
        mount.isolate()  # before any thread exists
        _sweep()
    import trio

    trio.run(
        partial(
            app.main,
            config=config,
            load_config=load_config,
            host=host,
            notifier=notifier,
            sockets=sockets,
            program=program,
            handed=handed,
        )
    )


def _check_handover(state_format: int) -> None:
    """Say whether this program could take the place of one that runs now.

    Raises: ReexecError.
    """
    if state_format != handover.FORMAT:
        text = f"it knows state of format {handover.FORMAT}, not {state_format}"
        raise ReexecError(text, hint="restart tdxd: systemctl restart tdxd")


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
