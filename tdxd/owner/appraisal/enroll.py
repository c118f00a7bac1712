"""Writes the policy that a reference guest fulfils: what `tdx-keyd policy enroll` does.

Nothing of the quote is proved here: it must come from a guest that the owner trusts. That it is
genuine shows `tdx-keyd appraise` with the policy that was written.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from tdxd.core.event_rules import ReferenceLog, reference_log
from tdxd.core.eventlog import Event, parse_event_log, replay
from tdxd.core.policy import (
    ANY,
    FATAL_ATTRIBUTES,
    NEEDED_ATTRIBUTE,
    parse_policy,
)
from tdxd.core.policy_lint import Remark
from tdxd.core.quote import TD_ATTRIBUTE_BITS, Quote, td_attribute_names
from tdxd.core.runtime_log import parse_runtime_log, replay_runtime
from tdxd.errors import DataError
from tdxd.owner.appraisal.appraise import (
    INTEL_ROOT_KEY_SHA384,
    PckIdentity,
    read_pck_identity,
    read_quote,
)

__all__ = ["Enrolled", "Reference", "enroll", "reference_text"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The evidence of a reference guest, and how to name and place it.

    `platform` "this" pins the machine it runs on, "any" writes that any may be. `simulated` must be
    said for a quote that Intel's root did not sign.
    """

    quote: bytes
    event_log: bytes = b""
    runtime_log: bytes = b""
    name: str = "image-1"
    platform: Literal["any", "this"] = "this"
    simulated: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """The text of a policy, and what the owner should look at again."""

    text: str
    remarks: tuple[Remark, ...]


def enroll(reference: Reference) -> Enrolled:
    """Write a policy that this guest fulfils and another one does not.

    Raises: EvidenceMalformedError for evidence that cannot be read; DataError for a guest that no
    policy could accept, and for logs that do not lead to the registers of the quote; ConfigError
    for a name that a policy cannot have.
    """
    quote, exact = read_quote(reference.quote)
    pck = read_pck_identity(exact)
    if pck.forged:
        raise DataError(f"quote: its PCK certificate chain is forged: {pck.forged}")
    _refuse_hopeless(quote)
    _refuse_unmeant_root(pck, simulated=reference.simulated)
    events = parse_event_log(reference.event_log)
    initial_rtmr3 = _initial_rtmr3(reference, events, quote)
    rtmrs = (*quote.rtmrs[:3], initial_rtmr3)
    log = reference_log(reference.name, events) if events else None
    text = _text(reference, quote, rtmrs, pck, log)
    parse_policy(text, source="enrolled policy")
    return Enrolled(text=text, remarks=_remarks(quote, reference))


# --- what is refused ----------------------------------------------------------


def _refuse_hopeless(quote: Quote) -> None:
    names = td_attribute_names(quote.td_attributes)
    hint = "take the quote from a guest that is started as yours will be"
    for name in names:
        if name in FATAL_ATTRIBUTES:
            text = (
                f"quote: TD attribute {name} is set: no policy can accept such a guest"
            )
            raise DataError(text, hint=hint)
        if name not in TD_ATTRIBUTE_BITS:
            text = f"quote: TD attribute {name} is set, whose meaning is not known"
            raise DataError(text, hint=hint)
    if NEEDED_ATTRIBUTE not in names:
        text = f"quote: TD attribute {NEEDED_ATTRIBUTE} is not set: no policy can accept it"
        raise DataError(text, hint=hint)
    for field, value in (
        ("mr_service_td", quote.mr_service_td),
        ("mr_signer_seam", quote.mr_signer_seam),
        ("seam_attributes", quote.seam_attributes),
        ("vmid", bytes([quote.vmid or 0])),
        ("td15_ex", quote.ex_tail),
    ):
        if any(value or b""):
            text = f"quote: {field} is not zero: no policy can accept such a guest"
            raise DataError(text, hint="service TDs and L2 guests are not supported")


def _refuse_unmeant_root(pck: PckIdentity, *, simulated: bool) -> None:
    intel = pck.root_key_sha384 == INTEL_ROOT_KEY_SHA384
    if not intel and not simulated:
        text = f"quote: {pck.root_name} is not Intel's production root"
        raise DataError(text, hint="--simulated writes a policy that accepts it")
    if intel and simulated:
        raise DataError("quote: it is of a real platform", hint="leave --simulated out")


def _initial_rtmr3(
    reference: Reference, events: tuple[Event, ...], quote: Quote
) -> bytes:
    """Return RTMR3 as the boot left it.

    Raises: DataError if the logs do not replay to the quote.
    """
    later = parse_runtime_log(reference.runtime_log)
    if not reference.event_log and not later:
        return quote.rtmrs[3]
    registers = replay(events)
    if reference.event_log:
        for index in range(3):
            if registers[index] != quote.rtmrs[index]:
                raise _departed(index, registers[index], quote.rtmrs[index])
    found = replay_runtime(registers[3], later)
    if found != quote.rtmrs[3]:
        raise _departed(3, found, quote.rtmrs[3])
    return registers[3]


def _departed(index: int, found: bytes, wanted: bytes) -> DataError:
    text = f"rtmr{index} of the quote is {wanted.hex()}, and the log leads to {found.hex()}"
    hint = "take quote and logs of the same boot"
    if index == 3:
        hint += "; a guest that serves has a runtime log, too: --runtime-log"
    return DataError(text, hint=hint)


# --- what is written ----------------------------------------------------------


def _text(
    reference: Reference,
    quote: Quote,
    rtmrs: tuple[bytes, ...],
    pck: PckIdentity,
    log: ReferenceLog | None,
) -> str:
    lines = [
        "# Policy of a volume, written from the quote of a reference guest.",
        "# All values are hex, in the byte order of the quote. What stands nowhere is refused.",
        "",
        "[tdx]",
        "# The guest's firmware: every image that boots by it has the same.",
        f"mrtd = {_list([quote.mr_td.hex()])}",
        "# Attributes, exactly these.",
        f"td_attributes = {_list(td_attribute_names(quote.td_attributes))}",
        "# CPU features.",
        f"xfam = {_list([quote.xfam.hex()])}",
        '# The TDX module, which an update of the host changes; "any" takes all that Intel knows.',
        f"mr_seam = {_list([quote.mr_seam.hex()])}",
        *_identities(quote),
        *_platform(reference, pck),
        "",
        "# One table for each image that may run. RTMR3 is as the boot leaves it.",
        "[[tdx.rtmr]]",
        f"name = {_string(reference.name)}",
        *(f'rtmr{index} = "{value.hex()}"' for index, value in enumerate(rtmrs)),
        "",
        "[release]",
        "# max_per_hour = 60",
        "# lease_s = 86400      # the guest closes the volume when it cannot renew in time",
        "# not_after = 2030-01-01T00:00:00Z",
        "",
        "[event_log]",
        f"required = {'true' if log else 'false'}",
    ]
    return "\n".join(lines) + "\n" + reference_text(log)


def _platform(reference: Reference, pck: PckIdentity) -> list[str]:
    lines = [
        "# Patch level of the platform. To let others pass, and for how long:",
        '#   tcb_status = ["UpToDate", "OutOfDate"]',
        "#   tcb_grace_days = { OutOfDate = 700 }   # since the date of its TCB level, which",
        "#                                          # is 450 to 610 days back when it falls behind",
        'tcb_status = ["UpToDate"]',
        '# advisories_refused = ["INTEL-SA-00000"]',
    ]
    if reference.platform == "this":
        lines += [
            "# The machine of the reference guest, and no other, by PPID.",
            f"platforms = {_list([pck.ppid])}",
        ]
    else:
        lines += [
            f"# Any machine; that of the reference guest has the PPID {pck.ppid}.",
            f"platforms = {_string(ANY)}",
        ]
    if reference.simulated:
        lines += ["# A simulated platform protects nothing.", "simulated = true"]
    return lines


def _identities(quote: Quote) -> list[str]:
    given = {
        "mr_config_id": quote.mr_config_id,
        "mr_owner": quote.mr_owner,
        "mr_owner_config": quote.mr_owner_config,
    }
    lines = [f"{name} = {_list([v.hex()])}" for name, v in given.items() if any(v)]
    if lines:
        lines.insert(
            0, "# What the host configured the guest with: must be zero if absent."
        )
    return lines


def reference_text(log: ReferenceLog | None) -> str:
    """Write the events for people to read: they say which one departs, and decide nothing."""
    if log is None:
        return ""
    lines = [
        "",
        "# The boot of the reference guest: for diagnosis, the registers above decide.",
        "[[reference]]",
        f"name = {_string(log.name)}",
    ]
    for index, events in enumerate(log.registers):
        lines.append(f"rtmr{index} = [")
        lines += [f"  {_string(event)}," for event in events]
        lines.append("]")
    return "\n".join(lines) + "\n"


def _list(values: list[str] | tuple[str, ...]) -> str:
    return "[" + ", ".join(map(_string, values)) + "]"


def _string(value: str) -> str:
    """Write a TOML string; other than printable ASCII is escaped."""
    if value.isascii() and value.isprintable() and '"' in value and "'" not in value:
        return f"'{value}'"
    plain = {'"': '\\"', "\\": "\\\\"}
    parts = [
        plain.get(one, one if " " <= one <= "~" else f"\\U{ord(one):08X}")
        for one in value
    ]
    return '"' + "".join(parts) + '"'


def _remarks(quote: Quote, reference: Reference) -> tuple[Remark, ...]:
    remarks = []
    for name in td_attribute_names(quote.td_attributes):
        if name != NEEDED_ATTRIBUTE:
            text = f"the reference guest has {name} set, and so must every guest"
            hint = "start the guest without it if you can"
            remarks.append(Remark(path="tdx.td_attributes", text=text, hint=hint))
    if not reference.event_log:
        text = "no event log: a denial cannot name the event that departs"
        hint = "give the guest's CCEL data: --event-log"
        remarks.append(Remark(path="reference", text=text, hint=hint))
    if reference.platform == ANY:
        text = "any machine may run this guest"
        hint = "--platform this pins the machine of the quote"
        remarks.append(Remark(path="tdx.platforms", text=text, hint=hint))
    return tuple(remarks)
