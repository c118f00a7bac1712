"""The daemon's command line. Run by systemd in the guest; see tdxd(8)."""

from __future__ import annotations

import argparse
import base64
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from tdxd import __version__
from tdxd.cli.boundary import Parser, run
from tdxd.core.config import Config
from tdxd.errors import ConfigError, NotAllowedError, ReexecError
from tdxd.guest import app, config_files, handover
from tdxd.guest.config_files import LoadedConfig
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
    parser.add_argument(
        "--require-measured",
        action="store_true",
        help="refuse a configuration that nothing measures, whatever it says itself",
    )
    parser.add_argument("--check-handover", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="close what a killed daemon left open, and exit",
    )
    parser.add_argument("--version", action="version", version=f"tdxd {__version__}")
    _add_verbs(parser)
    return parser


def _add_verbs(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", metavar="")
    digest = verbs.add_parser(
        "config-digest", help="print what MRCONFIGID must be for this configuration"
    )
    digest.add_argument(
        "--config", default=argparse.SUPPRESS, metavar="FILE", help="the configuration"
    )
    digest.add_argument(
        "--ca", metavar="FILE", help="where the file of key_release.ca lies now"
    )
    digest.add_argument(
        "--base64", action="store_true", help="in base64, as QEMU takes it; else in hex"
    )
    doctor = verbs.add_parser(
        "doctor", help="say what is missing on this machine, and what to do about it"
    )
    doctor.add_argument(
        "--config", default=argparse.SUPPRESS, metavar="FILE", help="the configuration"
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _main(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    inherited = exec_in_place.take()
    if args.verb == "config-digest":
        _print_digest(args)
        return 0
    if args.verb == "doctor":
        return _doctor(args)
    if args.check_config:
        config = config_files.read_config(args.config)
        print(f"{args.config}: ok, {len(config.volume)} volumes")
        return 0
    if os.geteuid() != 0:
        uid = os.geteuid()
        raise NotAllowedError(f"tdxd runs as root, not as uid {uid}", hint="sudo tdxd")
    if args.sweep:  # whatever the configuration is now, what was opened must not stay
        _sweep()
        return 0
    load = partial(_load, args.config, always=args.require_measured)
    loaded = load()
    app.check_machine(loaded.config)
    if args.check_handover is not None:
        _check_handover(args.check_handover)
        return 0
    _serve(loaded, inherited, load)
    return 0


def _load(path: str, *, always: bool) -> LoadedConfig:
    """Read the configuration.

    Raises: ConfigError, also if nothing measures it and that is not accepted.
    """
    loaded = config_files.load_config(path)
    return config_files.require_trust(loaded, always=always)


def _doctor(args: argparse.Namespace) -> int:
    """Examine this machine; a configuration that cannot be used is a finding."""
    from tdxd.cli.doctor_tables import show_findings
    from tdxd.guest import doctor

    try:
        findings = doctor.examine(config_files.load_config(args.config))
    except ConfigError as exc:
        findings = doctor.unconfigured(exc)
    return show_findings(doctor.report(findings), args.json)


def _print_digest(args: argparse.Namespace) -> None:
    digest = config_files.digest_of(args.config, ca=args.ca)
    print(base64.b64encode(digest).decode() if args.base64 else digest.hex())


def _serve(
    loaded: LoadedConfig,
    inherited: Inherited | None,
    load_config: Callable[[], LoadedConfig],
) -> None:
    """Run the daemon, from a fresh start or in the place of the program before this one."""
    config, host = loaded.config, _host(loaded.config)
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
            loaded=loaded,
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
    if state_format not in handover.READABLE:
        known = ", ".join(map(str, handover.READABLE))
        text = f"it knows state of format {known}, not {state_format}"
        raise ReexecError(text, hint="restart tdxd: systemctl restart tdxd")


def _host(config: Config) -> Host:
    from tdxd.host.evidence import make_tsm
    from tdxd.host.proc import CellChildren
    from tdxd.host.rtmr import SysfsRtmr

    return Host(
        tsm=make_tsm(config.platform),
        rtmr=SysfsRtmr(config.platform.rtmr),
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
