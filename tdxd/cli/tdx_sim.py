"""tdx-sim: a simulated TDX platform for developers, demonstrations and tests.

Never part of a guest image. What it signs is worth nothing to a key server that does not name its
root CA and say `simulated = true`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tdxd.cli.boundary import Parser, run
from tdxd.core.quote import td_attribute_names
from tdxd.errors import EX_OK, EX_TEMPFAIL, HostError, UsageError
from tdxd.sim.platform import SimPlatform

if TYPE_CHECKING:
    from tdxd.core.qgs import QgsAddress
    from tdxd.sim.pccs import PccsServer

__all__ = ["main"]

PROG = "tdx-sim"
_READY_TIMEOUT_S = 10.0


def main() -> int:
    """Run the program; the entry point."""
    return run(PROG, _run)


def _run(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    code: int = arguments.verb(arguments)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROG, description="Simulate a TDX platform, for tests and demonstrations."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=text, description=text)
        one.add_argument("directory", metavar="DIR", type=Path, help="the platform")
        return one

    init = verb("init", "Make a platform: a root CA of its own and platform.toml.")
    init.set_defaults(verb=_init)
    running = verb("run", "Mount its files, serve its collateral, until SIGTERM.")
    _add_run_options(running)
    running.set_defaults(verb=_serve)
    quote = verb("quote", "Write one quote.")
    quote.add_argument("--report-data", metavar="HEX", required=True, help="64 bytes")
    quote.add_argument("-o", "--output", metavar="FILE", type=Path, required=True)
    quote.set_defaults(verb=_quote)
    root = verb("root", "Print the root CA that a key server would pin, as PEM.")
    root.add_argument(
        "--der", action="store_true", help="print the path of the DER file"
    )
    root.set_defaults(verb=_root)
    measurements = verb("measurements", "Print the policy that this TD fulfils.")
    measurements.add_argument(
        "--json", action="store_true", help="print the values alone, as JSON"
    )
    measurements.set_defaults(verb=_measurements)
    return parser


def _add_run_options(running: argparse.ArgumentParser) -> None:
    running.add_argument("--mount", metavar="MNT", type=Path, help="where to mount")
    running.add_argument(
        "--pccs", metavar="IP:PORT", help="a loopback address; port 0: any"
    )
    running.add_argument(
        "--qgs", metavar="ADDRESS", help="unix:/PATH or vsock:CID:PORT; quotes by QGS"
    )
    only = running.add_mutually_exclusive_group()
    only.add_argument("--pccs-only", action="store_true", help="mount nothing")
    only.add_argument("--device-only", action="store_true", help="serve no collateral")
    only.add_argument("--qgs-only", action="store_true", help="serve --qgs alone")


def _init(arguments: argparse.Namespace) -> int:
    SimPlatform.create(arguments.directory)
    return EX_OK


def _quote(arguments: argparse.Namespace) -> int:
    platform = SimPlatform.load(arguments.directory)
    try:
        report_data = bytes.fromhex(arguments.report_data)
    except ValueError:
        raise UsageError("--report-data is not hex") from None
    quote = platform.quote(report_data)
    try:
        arguments.output.write_bytes(quote)
    except OSError as exc:
        raise HostError.of("write", str(arguments.output), exc) from exc
    return EX_OK


def _root(arguments: argparse.Namespace) -> int:
    platform = SimPlatform.load(arguments.directory)
    if arguments.der:
        print(arguments.directory.resolve() / "pki" / "root.der")
    else:
        print(platform.root_pem, end="")
    return EX_OK


def _measurements(arguments: argparse.Namespace) -> int:
    platform = SimPlatform.load(arguments.directory)
    report = platform.report()
    values: dict[str, str | list[str]] = {"mrtd": report.mr_td.hex()}
    values |= {f"rtmr{n}": value.hex() for n, value in enumerate(report.rtmrs)}
    values["td_attributes"] = list(td_attribute_names(report.td_attributes))
    values["xfam"] = report.xfam.hex()
    values["mr_seam"] = report.mr_seam.hex()
    values["mr_config_id"] = report.mr_config_id.hex()
    values["fmspc"] = platform.fmspc
    values["ppid"] = platform.pki.identity.ppid.hex()
    if arguments.json:
        print(json.dumps(values, indent=1))
        return EX_OK
    print(_policy(values), end="")
    return EX_OK


def _policy(values: dict[str, str | list[str]]) -> str:
    """Return the policy, as TOML, that this TD and no other fulfils."""
    rtmrs = ", ".join(f'rtmr{n} = "{values[f"rtmr{n}"]}"' for n in range(4))
    return f"""\
[tdx]
simulated = true
mrtd = ["{values["mrtd"]}"]
rtmr = [{{ name = "simulated", {rtmrs} }}]
td_attributes = {json.dumps(values["td_attributes"])}
xfam = ["{values["xfam"]}"]
mr_seam = ["{values["mr_seam"]}"]
tcb_status = ["UpToDate"]
platforms = ["{values["ppid"]}"]
"""


def _serve(arguments: argparse.Namespace) -> int:
    platform = SimPlatform.load(arguments.directory)
    mounts = not arguments.pccs_only and not arguments.qgs_only
    if mounts and arguments.mount is None:
        raise UsageError("run needs --mount MNT, --pccs-only or --qgs-only")
    pccs = not arguments.device_only and not arguments.qgs_only
    if pccs and arguments.pccs is None:
        raise UsageError("run needs --pccs 127.0.0.1:PORT, or --device-only")
    if arguments.qgs_only and arguments.qgs is None:
        raise UsageError("--qgs-only needs --qgs ADDRESS")
    signals = {signal.SIGTERM, signal.SIGINT}
    if not mounts:
        # Blocked before the servers' threads start: they inherit it, and only sigwait takes one.
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    words = ["ready"]
    with contextlib.ExitStack() as stack:
        if pccs:
            server = _pccs(platform, arguments.pccs)
            stack.callback(server.close)
            words.append(f"pccs={server.url}")
        if arguments.qgs is not None:
            words.append(f"qgs={_qgs(platform, arguments.qgs, stack)}")
        if mounts:
            return _serve_device(platform, arguments.mount.absolute(), words)
        print(*words, flush=True)
        signal.sigwait(signals)
    return EX_OK


def _qgs(platform: SimPlatform, text: str, stack: contextlib.ExitStack) -> QgsAddress:
    from tdxd.core.qgs import parse_qgs_address
    from tdxd.sim.qgs import QgsServer

    try:
        address = parse_qgs_address(text)
    except ValueError as exc:
        raise UsageError(f"--qgs {exc}") from None
    server = QgsServer(platform, address)
    stack.callback(server.close)
    return server.address


def _pccs(platform: SimPlatform, address: str) -> PccsServer:
    # An HTTP server, which the device alone starts without.
    from tdxd.sim.pccs import PccsServer

    return PccsServer(platform, *_address(address))


def _serve_device(platform: SimPlatform, mount_point: Path, words: list[str]) -> int:
    # FUSE is needed here only: every other verb works without libfuse.
    from tdxd.sim.tsmfs import clear_stale_mount, serve_tsm

    clear_stale_mount(mount_point)
    faults = platform.description.faults
    if faults.tsm == "none":
        words.append(f"tsm={mount_point}/report")
    if faults.quote != "no-provider":
        words.append(f"tdx_guest={mount_point}/tdx_guest")
    if faults.rtmr != "absent":
        words.append(f"rtmr={mount_point}/measurements")
    if platform.event_log:
        words.append(f"ccel={mount_point}/CCEL")
    threading.Thread(
        target=_announce, args=(mount_point, words), name="ready", daemon=True
    ).start()
    serve_tsm(platform, mount_point)
    return EX_OK


def _announce(mount_point: Path, words: list[str]) -> None:
    """Print the ready line as soon as the mount answers; end the program if it never does."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if os.path.ismount(mount_point):
            print(*words, flush=True)
            return
        time.sleep(0.01)
    print(f"{PROG}: error: {mount_point} does not answer", file=sys.stderr, flush=True)
    os._exit(EX_TEMPFAIL)


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{text!r} is not IP:PORT", hint="127.0.0.1:0 takes any port")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
