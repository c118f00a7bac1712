"""Writes the policy of a measured image: what `tdx-keyd policy from-image` does.

RTMR1 and RTMR2 are computed from the image, MRTD from a firmware file. RTMR0 holds what the host
gives its firmware, and is enrolled: from the quote of a guest that booted this image, which is then
held against what was computed, or from the policy of an image before it on the same machines.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tdxd.core.event_meaning import type_name
from tdxd.core.eventlog import Event, parse_event_log
from tdxd.core.log_departure import ReferenceLog
from tdxd.core.measure.boot import Prediction
from tdxd.core.measure.compare import Comparison, compare
from tdxd.core.measure.tdvf import mrtd, parse_tdvf
from tdxd.core.policy import Policy, RtmrSet, parse_policy
from tdxd.errors import ConfigError, DataError
from tdxd.owner.appraisal.appraise import read_quote
from tdxd.owner.appraisal.enroll import Reference, enroll, reference_text
from tdxd.owner.measured.image_input import BootImage

__all__ = [
    "Drafted",
    "draft",
    "firmware_mrtd",
    "from_policy",
    "from_quote",
    "read_events",
]

_COMPUTED = (1, 2)
_ZERO = bytes(48)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Drafted:
    """The text of a policy, or of part of one, and what a person should know."""

    text: str
    remarks: tuple[str, ...]
    complete: bool


def firmware_mrtd(firmware: bytes, *, source: str) -> bytes:
    """Return MRTD of a TD that QEMU starts with this file.

    Raises: DataError.
    """
    return mrtd(firmware, parse_tdvf(firmware, source=source))


def draft(
    image: BootImage, prediction: Prediction, name: str, mrtd_value: bytes | None
) -> Drafted:
    """Write what can be computed; what must be enrolled stands there as a comment."""
    lines = [
        f"# Computed from {_comment(image.source)} for machines {prediction.machine.name}."
    ]
    lines += ["[tdx]", *_mrtd_lines(prediction, mrtd_value), "", "[[tdx.rtmr]]"]
    lines += [f'name = "{name}"', *_why_rtmr0(prediction)]
    for register in _COMPUTED:
        value = prediction.value(register)
        if value is None:
            lines += [f"# rtmr{register}: enroll it, not computable:"]
            lines += [
                f"#   {one.meaning}: {one.why}" for one in prediction.unknown(register)
            ]
            lines += [f'# rtmr{register} = ""']
        else:
            lines.append(f'rtmr{register} = "{value.hex()}"')
    lines += [f'rtmr3 = "{_ZERO.hex()}"', ""]
    return Drafted(
        text="\n".join(lines),
        remarks=(
            *prediction.remarks,
            "not a whole policy yet: --enrolled takes the rest from a quote or from a policy",
        ),
        complete=False,
    )


def from_quote(
    prediction: Prediction, reference: Reference, mrtd_value: bytes | None
) -> Drafted:
    """Write the policy of a guest that booted this image, after holding it against the image.

    Raises: DataError where quote or log are not those of this image; what `enroll` raises.
    """
    made = enroll(reference)
    quote, _ = read_quote(reference.quote)
    if mrtd_value is not None and mrtd_value != quote.mr_td:
        text = f"quote: its MRTD is {quote.mr_td.hex()}, that of the firmware {mrtd_value.hex()}"
        raise DataError(
            text, hint="the machine has other firmware: leave --firmware out"
        )
    events = parse_event_log(reference.event_log)
    if events:
        _refuse_departure(compare(prediction, events))
    for register in _COMPUTED:
        _check_register(
            prediction, register, quote.rtmrs[register], with_log=bool(events)
        )
    head = [*_said(prediction, mrtd_value), ""]
    remarks = [f"{one.path}: {one.text}" for one in made.remarks]
    return Drafted(
        text="\n".join(head) + made.text,
        remarks=(*prediction.remarks, *remarks),
        complete=True,
    )


def from_policy(
    prediction: Prediction, name: str, text: str, *, source: str, base: str | None
) -> Drafted:
    """Add this image to a policy: RTMR0 and RTMR3 as those of an image in it.

    Raises: ConfigError for a policy that is none; DataError if the image cannot be added to it.
    """
    policy = parse_policy(text, source=source)
    old = _base(policy.tdx.rtmr, base, source)
    if name in [one.name for one in policy.tdx.rtmr]:
        text = f"{source} has an image {name!r} already"
        raise DataError(text, hint="choose another --name")
    lines = [
        "",
        f"# RTMR1 and RTMR2 computed from the image; RTMR0 and RTMR3 are those of {old.name}.",
        "[[tdx.rtmr]]",
        f'name = "{name}"',
        f'rtmr0 = "{old.rtmr0}"',
    ]
    for register in _COMPUTED:
        value = prediction.value(register)
        if value is None:
            (first, *_) = prediction.unknown(register)
            problem = f"rtmr{register} cannot be computed: {first.meaning}: {first.why}"
            raise DataError(problem, hint="enroll a quote of a guest that booted it")
        lines.append(f'rtmr{register} = "{value.hex()}"')
    lines += [f'rtmr3 = "{old.rtmr3}"', ""]
    whole = text.rstrip("\n") + "\n" + "\n".join(lines)
    whole += reference_text(_reference(prediction, name, policy, old))
    try:
        parse_policy(whole, source=source)
    except ConfigError as exc:
        problem = f"{source}: the new image cannot be appended to it: {exc}"
        raise DataError(
            problem, hint="write each of tdx.rtmr as a [[tdx.rtmr]] table"
        ) from exc
    return Drafted(text=whole, remarks=prediction.remarks, complete=True)


# --- what must agree ------------------------------------------------------------


def _refuse_departure(comparison: Comparison) -> None:
    for row in comparison.differences:
        facts = row.facts("rtmr")
        what = facts["meaning"] or facts["log_says"]
        where = f"{facts['register']}: {row.verdict}: {what}"
        text = f"the enrolled guest did not boot this image: {where}"
        hint = f"{row.note}; --compare shows every event"
        raise DataError(text, hint=hint)


def _check_register(
    prediction: Prediction, register: int, found: bytes, *, with_log: bool
) -> None:
    value = prediction.value(register)
    if value is None:
        if with_log:
            return  # the log leads to the quote, and agreed with the image but for these events
        (first, *_) = prediction.unknown(register)
        text = f"rtmr{register} cannot be computed: {first.meaning}: {first.why}"
        raise DataError(text, hint="give the guest's CCEL data, too: --event-log")
    if value != found:
        text = f"rtmr{register} of the quote is {found.hex()}, and the image gives {value.hex()}"
        hint = "the guest booted something else; --compare its event log shows what"
        raise DataError(text, hint=hint)


def _base(sets: tuple[RtmrSet, ...], base: str | None, source: str) -> RtmrSet:
    if (
        base is None
        and len({(one.rtmr0.lower(), one.rtmr3.lower()) for one in sets}) == 1
    ):
        return sets[-1]
    for one in sets:
        if one.name == base:
            return one
    names = ", ".join(one.name for one in sets)
    what = f"no image {base!r}" if base else "images with different RTMR0"
    raise DataError(f"{source} has {what}", hint=f"--base takes one of {names}")


def _reference(
    prediction: Prediction, name: str, policy: Policy, old: RtmrSet
) -> ReferenceLog | None:
    """Return the events of this image for people, with RTMR0's of the other; None without those."""
    for one in policy.reference:
        if one.name == old.name:
            computed = (
                tuple(
                    f"{event.digest.hex()[:16]} {type_name(event.type)} {event.meaning}"
                    for event in prediction.events
                    if event.register == register and event.digest is not None
                )
                for register in _COMPUTED
            )
            rtmr1, rtmr2 = computed
            return ReferenceLog(
                name=name, rtmr0=one.rtmr0, rtmr1=rtmr1, rtmr2=rtmr2, rtmr3=one.rtmr3
            )
    return None


# --- what is written ------------------------------------------------------------


def _mrtd_lines(prediction: Prediction, value: bytes | None) -> Iterator[str]:
    if value is not None:
        yield "# The firmware file, as QEMU and KVM build a TD of it."
        yield f'mrtd = ["{value.hex()}"]'
        return
    if prediction.machine.mrtd:
        yield "# MRTD: the machine's firmware; --firmware OVMF.fd computes it, or enroll it."
    else:
        yield "# MRTD: enroll it; this cloud's firmware and its way to build a TD are its own."
    yield '# mrtd = [""]'


def _why_rtmr0(prediction: Prediction) -> Iterator[str]:
    yield "# RTMR0: enroll it. It holds what the host gives its firmware: its memory map (TD HOB),"
    yield "# the configuration volume, Secure Boot variables, ACPI tables"
    if prediction.machine.boot_variables == 0:
        yield "# and boot variables. It is the same for every image on one type of machine."
    else:
        yield "# and more. It is the same for every image on one type of machine."
    yield '# rtmr0 = ""'


def _said(prediction: Prediction, mrtd_value: bytes | None) -> Iterator[str]:
    whole = [f"RTMR{one}" for one in _COMPUTED if prediction.value(one) is not None]
    whole += ["MRTD"] if mrtd_value is not None else []
    yield f"# Computed from the image and found in the quote: {', '.join(whole) or 'nothing'}."
    for register in _COMPUTED:
        for one in prediction.unknown(register):
            yield f"# Taken from the guest's log, in RTMR{register}: {one.meaning}: {one.why}."
    taken = "MRTD and RTMR0" if mrtd_value is None else "RTMR0"
    yield f"# Taken from the guest as they are: {taken}, and all that is not a register."


def _comment(text: str) -> str:
    return "".join(one if " " <= one <= "~" else "?" for one in text)


def read_events(log: bytes) -> tuple[Event, ...]:
    """Read a log to compare with; an empty one is refused.

    Raises: EvidenceMalformedError, DataError.
    """
    events = parse_event_log(log)
    if not events:
        raise DataError(
            "the event log is empty", hint="copy CCEL's data, not its table"
        )
    return events
