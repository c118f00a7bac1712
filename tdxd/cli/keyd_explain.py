"""The explanation of a decision: its conclusion in words, what to do, and one table of all checks.

Long values are shortened where they agree. Where they differ they are shown whole, with the first
and the last byte that differ.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator, Sequence

from tdxd.core.check import Check

__all__ = ["Conclusion", "conclusion", "table"]

_COLUMN = 40
_HEX_LINE = 32
"""Hex digits on a line: 16 bytes."""
_LINES_MAX = 14
_HEX = re.compile(r"(?:[0-9a-f]{2}){17,}")
_HEX_PARTS = re.compile(r"((?:[0-9a-f]{2}){17,})[,; ]*")
_ENROL = "if it is yours: tdx-keyd policy enroll a quote of it, compare by policy diff"

_COMPARE = f"{_ENROL}; of a measured image: policy from-image IMAGE --compare LOG"

_MEANINGS: tuple[tuple[str, str, str], ...] = (
    ("token_expiry", "the challenge has expired", "the guest's quoting takes too long"),
    (
        "token",
        "the challenge was not made by this server",
        "the guest must ask here first; after a rotation of keys its next attempt does",
    ),
    (
        "quote_format",
        "what the guest sent is no TDX quote",
        "run tdxd doctor on the guest",
    ),
    (
        "report_data",
        "the quote was made for another request",
        "it is replayed or relayed; or the guest pins another signing_key than this server's",
    ),
    (
        "certificate",
        "the guest meant another certificate than this connection's",
        "somebody stands between, or it has just been changed: ask again",
    ),
    (
        "endpoint_proof",
        "the quote was not made for this connection and this question",
        "it is replayed or relayed: somebody stands between",
    ),
    (
        "root",
        "the quote is signed under a root that is not trusted here",
        "hardware before production, or a simulated platform without its [[root]]",
    ),
    (
        "collateral_floor",
        "the collateral is older than what this server has seen",
        "the source is stale or lies: tdx-keyd collateral status",
    ),
    (
        "collateral",
        "there is no valid collateral for this platform",
        "tdx-keyd collateral status says which part is missing or wrong",
    ),
    (
        "tcb_info_signer",
        "the TCB info is not signed by Intel's TCB signer",
        "a forgery: find out who runs the collateral source",
    ),
    (
        "qe_identity_signer",
        "the QE identity is not signed by Intel's TCB signer",
        "a forgery: find out who runs the collateral source",
    ),
    ("pck_crl_issuer", "the list of revoked PCKs is another CA's", "see collateral"),
    (
        "root_crl_issuer",
        "the root's list of revoked CAs is another's",
        "see collateral",
    ),
    ("quote", "the quote does not verify", "the reason stands in the table at quote"),
    ("clock", "the server's clock and the collateral disagree", "check the clock here"),
    (
        "volume",
        "the store has no such volume",
        "tdx-keyd add, or mend the guest's config",
    ),
    ("policy", "the volume has no valid policy", "tdx-keyd policy set"),
    ("not_before", "the policy is not yet in force", "wait, or change not_before"),
    ("not_after", "the policy is no longer in force", "change not_after"),
    ("mr_td", "the guest's firmware is another one (MRTD)", _ENROL),
    ("rtmr0", "firmware settings or virtual hardware differ (RTMR0)", _ENROL),
    ("rtmr1", "boot loader, kernel or partitions differ (RTMR1)", _COMPARE),
    ("rtmr2", "kernel command line or initrd differ (RTMR2)", _COMPARE),
    ("rtmr3", "something else was measured at run time (RTMR3)", _ENROL),
    (
        "td_attributes",
        "the guest was started with other attributes",
        "start it without them; never allow DEBUG or MIGRATABLE",
    ),
    ("xfam", "the guest has other CPU features", "start it with those of the policy"),
    (
        "mr_seam",
        "the host runs another TDX module",
        "after an update of the host: add it to mr_seam",
    ),
    ("seam_attributes", "the host runs a TDX module for tests", "never allow it"),
    ("mr_service_td", "a service TD takes part in the guest", "never allow it"),
    (
        "mr_",
        "the host configured the guest otherwise",
        "start it as the policy says, or add the value to the policy",
    ),
    (
        "event_log",
        "the guest's event log does not fit",
        "the first event that departs stands in the table",
    ),
    (
        "runtime",
        "the guest's runtime log does not fit",
        "boot it anew; or name the volume that its operator opened in [runtime] operator_volumes",
    ),
    (
        "runtime_volume",
        "the guest does not serve the volume that is expected",
        "another model or generation answers, or the guest may not extend RTMR3",
    ),
    (
        "tcb_status",
        "the platform's patch level is not accepted",
        "update the host's firmware and TDX module, or allow the status for a time",
    ),
    (
        "tcb_grace",
        "the platform has been behind for too long",
        "update the host's firmware and TDX module",
    ),
    (
        "tcb_evaluation",
        "the collateral is of an older TCB recovery than the policy asks for",
        "point [collateral] at a source that is up to date",
    ),
    (
        "tee_tcb_svn",
        "the TDX module is older than the policy asks for",
        "update the host",
    ),
    (
        "advisories",
        "a security advisory applies that the policy does not accept",
        "update the host, or allow the advisory on purpose",
    ),
    (
        "platform",
        "the machine is not on the policy's list",
        "if it is yours, add the PPID found to platforms",
    ),
    (
        "simulated",
        "the platform is simulated",
        "real hardware, or simulated = true in the policy of a test",
    ),
    (
        "tcb_clock",
        "the verification is not of this moment",
        "a fault of the server: report it",
    ),
    ("replay_key", "the challenge has no nonce", "a fault of the server: report it"),
    ("tee_type", "the quote is not a TD's", "run tdxd doctor on the guest"),
    (
        "pck_chain",
        "the quote's certificates are forged, or another machine's",
        "find out who sent it",
    ),
    ("pce_id", "the TCB info is for another kind of machine", "see collateral"),
    (
        "unused_fields",
        "the quoting enclave is not Intel's as known",
        "update this server",
    ),
    ("root_key", "another root signed than was expected", "a forgery"),
    ("vmid", "the quote is of a guest within the guest", "run tdxd in the TD itself"),
    (
        "td15_ex",
        "a service TD or a device takes part in the guest",
        "start it without",
    ),
    (
        "dynamic_platform",
        "the machine may get further packages",
        "all of the clouds' may: dynamic_platform = true",
    ),
    ("smt", "the machine has hyper-threading on", "switch it off, or smt = true"),
    (
        "cached_keys",
        "the machine's keys are kept by Intel's registration service",
        "all of the clouds' are: cached_keys = true",
    ),
    (
        "generations",
        "the store has no generation that the policy lets be served",
        "tdx-keyd add it, or change release.generations",
    ),
    ("quota", "the releases of this hour are used up", "wait, or raise max_per_hour"),
    ("secret", "the store cannot open the key bundle", "tdx-keyd audit verify"),
)
"""By the beginning of a check's name, the longest wins: what its failure means, what to do."""
_UNKNOWN = ("a check failed", "see the table")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Conclusion:
    """Why a table refuses, in words, and what to do; `event` is the first one that departs."""

    what: str
    todo: str
    also: tuple[str, ...]
    event: str

    def lines(self, verdict: str) -> Iterator[str]:
        """Yield what stands above the table."""
        yield f"{verdict}: {self.what}"
        if self.event:
            yield f"first event that departs: {_printable(self.event)}"
        if self.also:
            yield f"also failed: {', '.join(self.also)}"
        yield f"to do: {self.todo}"


def conclusion(checks: Sequence[Check]) -> Conclusion | None:
    """Say why a table refuses; None if it does not."""
    failed = [check for check in checks if not check.ok]
    if not failed:
        return None
    what, todo = _meaning(failed[0].name)
    departed = [check.actual for check in failed if check.name == "event_log"]
    return Conclusion(
        what=what,
        todo=todo,
        also=tuple(check.name for check in failed[1:]),
        event=departed[0] if departed else "",
    )


def _meaning(name: str) -> tuple[str, str]:
    fitting = [one for one in _MEANINGS if name.startswith(one[0])]
    if not fitting:
        return _UNKNOWN
    _, what, todo = max(fitting, key=lambda one: len(one[0]))
    return what, todo


def table(checks: Sequence[Check]) -> Iterator[str]:
    """Yield the lines of a table: check, verdict, expected, found; what failed comes first."""
    width = max((len(check.name) for check in checks), default=5)
    yield _line(width, "CHECK", "", "EXPECTED", "FOUND")
    for check in sorted(checks, key=lambda one: one.ok):
        expected, actual = _printable(check.expected), _printable(check.actual)
        if check.ok:
            same = expected == actual
            cells = [_short(expected)], ["the same" if same else _short(actual)]
        else:
            note = _difference(expected, actual)
            cells = _whole(expected), _whole(actual) + ([note] if note else [])
        verdict = "ok" if check.ok else "FAIL"
        for index in range(max(map(len, cells))):
            left, right = (cell[index] if index < len(cell) else "" for cell in cells)
            first = (check.name, verdict) if index == 0 else ("", "")
            yield _line(width, *first, left, right)


def _line(width: int, name: str, verdict: str, expected: str, found: str) -> str:
    return f"{name:{width}}  {verdict:4}  {expected:{_COLUMN}}  {found}".rstrip()


def _printable(text: str) -> str:
    """Escape what a terminal would obey: names and events are the guest's own words."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def _short(text: str) -> str:
    text = _HEX.sub(lambda hit: f"{hit[0][:12]}…{hit[0][-6:]}", text)
    return text if len(text) <= _COLUMN else text[: _COLUMN - 1] + "…"


def _whole(text: str) -> list[str]:
    """Wrap a value: alternatives on lines of their own, hex by 16 bytes."""
    lines: list[str] = []
    for index, part in enumerate(text.split(" or ")):
        if index and (_HEX.search(part) or len(text) > _COLUMN):
            lines.append("or")
        elif index:
            lines[-1] += f" or {part}"
            continue
        for piece in _HEX_PARTS.split(part):
            if _HEX.fullmatch(piece):
                lines += textwrap.wrap(piece, _HEX_LINE)
            else:
                lines += textwrap.wrap(piece, _COLUMN, break_on_hyphens=False)
    if len(lines) > _LINES_MAX:
        more = len(lines) - _LINES_MAX + 1
        lines = [*lines[: _LINES_MAX - 1], f"… {more} more lines: --json"]
    return lines or [""]


def _difference(expected: str, actual: str) -> str:
    """Say which bytes of two hex values of the same size differ."""
    want, have = _HEX.findall(expected), _HEX.findall(actual)
    if len(want) != 1 or len(have) != 1 or len(want[0]) != len(have[0]):
        return ""
    pairs = zip(bytes.fromhex(want[0]), bytes.fromhex(have[0]), strict=True)
    differ = [index for index, (one, other) in enumerate(pairs) if one != other]
    if not differ:
        return ""
    return f"bytes {differ[0]} to {differ[-1]} of {len(want[0]) // 2} differ"
