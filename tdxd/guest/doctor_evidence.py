"""Judges whether this guest can prove itself: quote, event log, registers."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tdxd.guest.finding import Facts, Finding, fail, ok, warn

__all__ = ["has_length_fix", "judge"]

_LENGTH_FIX = {(6, 12): 80, (6, 18): 21, (6, 19): 11}
"""First version of each maintained series with c3fd16c3b98e (CVE-2026-31470); 7.0 has it."""
_SLOW_QUOTE_S = 5.0


def judge(facts: Facts) -> Iterator[Finding]:
    """Yield the findings, in the order in which they are mended."""
    yield _interface(facts)
    yield _quote(facts)
    yield _event_log(facts)
    yield _registers(facts)
    yield _kernel(facts)


def _interface(facts: Facts) -> Finding:
    name, platform, evidence = "quotes-by", facts.config.platform, facts.evidence
    if evidence.provider and platform.evidence != "ioctl":
        return ok(name, f"the kernel offers quotes at {platform.tsm}")
    if evidence.device and platform.evidence != "configfs":
        return ok(
            name,
            f"TD reports of {platform.tdx_guest} are signed by QGS at {platform.qgs}",
        )
    if platform.evidence == "ioctl":
        return fail(name, f"there is no device {platform.tdx_guest}", _LOAD)
    if evidence.report_dir:
        text = f"{platform.tsm} has no provider of TDX quotes"
        return fail(name, text, _LOAD)
    if not evidence.configfs:
        text = f"configfs is not mounted, so there is no {platform.tsm}"
        return fail(name, text, "mount -t configfs none /sys/kernel/config")
    if not evidence.module:
        text = f"the module tdx_guest is not loaded, so there is no {platform.tsm}"
        return fail(name, text, _LOAD)
    return fail(
        name,
        f"this kernel has no {platform.tsm}",
        'configfs-tsm needs Linux 6.7; before it, platform.evidence = "ioctl" with a QGS',
    )


_LOAD = "modprobe tdx_guest: in a TDX guest, with Linux 6.7 or later (the device alone: 6.2)"


def _quote(facts: Facts) -> Finding:
    problem = facts.evidence.quote
    if problem is not None:
        todo = problem.hint or "on the host: is QGS running? journalctl -u qgsd"
        return fail("quote", f"no quote: {problem.message}", todo)
    took_s = facts.evidence.quote_s
    text = (
        f"the host's quoting service made a quote of {facts.evidence.quote_bytes} bytes"
    )
    if took_s > _SLOW_QUOTE_S:
        todo = "on the host: QGS reaches its PCCS slowly; see journalctl -u qgsd"
        return warn("quote", f"{text}, but took {took_s:.1f} s", todo)
    return ok("quote", f"{text} in {took_s:.2f} s")


def _event_log(facts: Facts) -> Finding:
    evidence = facts.evidence
    if evidence.event_log is not None:
        problem = evidence.event_log
        return fail("event-log", problem.message, problem.hint or "run as root")
    if evidence.table_problem is not None:
        todo = (
            "the host's firmware (TDVF) is broken; a policy can pin RTMR values alone"
        )
        return fail("event-log", evidence.table_problem.message, todo)
    size, table = evidence.event_log_bytes, evidence.table
    if table is not None and size not in (0, table.log_bytes):
        text = f"the event log is {size} bytes long, ACPI says {table.log_bytes}"
        return fail("event-log", text, "the host's firmware (TDVF) is broken")
    if not size:
        text = f"there is no event log at {facts.config.platform.event_log}"
        todo = "policies that require one will refuse; values of RTMRs can be pinned without"
        return warn("event-log", text, todo)
    return ok("event-log", f"the firmware's event log has {size} bytes")


def _registers(facts: Facts) -> Finding:
    problem, wanted = facts.evidence.rtmr, facts.config.platform.extend
    if problem is None:
        return ok("rtmr3", "RTMR3 can be extended with what is served")
    text = f"RTMR3 cannot be extended: {problem.message}"
    if wanted == "required":
        todo = problem.hint or "see platform.extend in man tdxd.toml"
        return fail("rtmr3", text, todo)
    todo = "quotes do not show which models are served; the configuration accepts that"
    return warn("rtmr3", text, todo)


def _kernel(facts: Facts) -> Finding:
    release = facts.machine.kernel
    if has_length_fix(release) is not False:
        return ok("kernel", f"Linux {release}")
    return warn(
        "kernel",
        f"Linux {release} may show the host memory of this guest with a quote (CVE-2026-31470)",
        "unless the distribution has mended it: 6.12.80, 6.18.21, 6.19.11 or 7.0 and later",
    )


def has_length_fix(release: str) -> bool | None:
    """Say whether this version of Linux checks the length of a quote that the host sets.

    None for a text that is no version. Before 6.7 there was nothing to check.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if found is None:
        return None
    series, patch = (int(found[1]), int(found[2])), int(found[3] or 0)
    if series < (6, 7) or series >= (7, 0):
        return True
    return series in _LENGTH_FIX and patch >= _LENGTH_FIX[series]
