"""What the doctor learns of this guest's evidence: by asking for one quote, and looking."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path

from tdxd.core.ccel import CcelTable, parse_ccel_table
from tdxd.core.config import PlatformConfig
from tdxd.core.quote import parse_quote
from tdxd.errors import EvidenceUnavailableError, TdxdError
from tdxd.host.bounded import read_bounded
from tdxd.host.event_log import read_event_log
from tdxd.host.evidence import make_tsm
from tdxd.host.facts import Problem
from tdxd.host.rtmr import SysfsRtmr
from tdxd.host.tsm import ConfigfsTsm

__all__ = ["EvidenceFacts", "gather_evidence", "table_of"]

_DATA = "/data/CCEL"
_TABLE_MAX_BYTES = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceFacts:
    """Whether each part of the evidence is there; `None` where it is, else the problem."""

    configfs: bool
    """Whether configfs is mounted anywhere."""
    module: bool
    """Whether the kernel has loaded tdx_guest."""
    report_dir: bool
    """Whether the configured report directory exists."""
    provider: bool
    """Whether it has a provider of TDX quotes."""
    device: bool
    """Whether the device of a TDX guest exists."""
    quote: Problem | None
    quote_bytes: int = 0
    quote_s: float = 0.0
    event_log: Problem | None = None
    event_log_bytes: int = 0
    table: CcelTable | None = None
    """What ACPI says of the event log, where there is a table."""
    table_problem: Problem | None = None
    rtmr: Problem | None = None


def table_of(event_log_path: str) -> str | None:
    """Return where ACPI's table stands beside the data, as the kernel shows both."""
    if not event_log_path.endswith(_DATA):
        return None
    return event_log_path.removesuffix(_DATA) + "/CCEL"


def gather_evidence(config: PlatformConfig) -> EvidenceFacts:
    """Ask for a quote, read the event log, try whether RTMR3 could be extended; change nothing.

    Takes as long as the kernel waits for a quote, 30 s, at most twice.
    """
    quote, size, duration_s = _one_quote(config)
    event_log, log_bytes = None, 0
    try:
        log_bytes = len(read_event_log(config.event_log))
    except TdxdError as exc:
        event_log = Problem.of(exc)
    table, table_problem = _table(config.event_log)
    rtmr = None
    try:
        SysfsRtmr(config.rtmr).check()
    except TdxdError as exc:
        rtmr = Problem.of(exc)
    return EvidenceFacts(
        configfs=_mounted("configfs"),
        module=Path("/sys/module/tdx_guest").exists(),
        report_dir=Path(config.tsm).is_dir(),
        provider=ConfigfsTsm(config.tsm, config.event_log).has_provider(),
        device=Path(config.tdx_guest).exists(),
        quote=quote,
        quote_bytes=size,
        quote_s=duration_s,
        event_log=event_log,
        event_log_bytes=log_bytes,
        table=table,
        table_problem=table_problem,
        rtmr=rtmr,
    )


def _mounted(kind: str) -> bool:
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
        return any(line.split()[2] == kind for line in lines)
    return False


def _one_quote(config: PlatformConfig) -> tuple[Problem | None, int, float]:
    report_data = os.urandom(64)
    began_s = time.monotonic()
    try:
        data = make_tsm(config, attempts=2).quote(report_data)
        if parse_quote(data).report_data != report_data:
            raise EvidenceUnavailableError(
                "the quote is over other report data than was given"
            )
    except TdxdError as exc:
        return Problem.of(exc), 0, time.monotonic() - began_s
    return None, len(data), time.monotonic() - began_s


def _table(event_log_path: str) -> tuple[CcelTable | None, Problem | None]:
    path = table_of(event_log_path)
    if path is None or not Path(path).exists():
        return None, None
    try:
        return parse_ccel_table(read_bounded(path, _TABLE_MAX_BYTES)), None
    except TdxdError as exc:
        return None, Problem.of(exc)
    except OSError as exc:
        return None, Problem(f"read {path}: {exc.strerror}", "run as root")
