"""The verb `policy from-image` of tdx-keyd: what an image measures, before it ever ran."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdxd.cli.keyd_verbs import print_json

if TYPE_CHECKING:
    from tdxd.core.measure.boot import Prediction
    from tdxd.core.measure.compare import Comparison, Row
    from tdxd.owner.measured.from_image import Drafted

__all__ = ["add_from_image"]

_POLICY_MAX_BYTES = 4 << 20


def add_from_image(policy: Any) -> None:
    """Add `from-image` to the verbs of `policy`."""
    parser = policy.add_parser(
        "from-image",
        help="compute the registers of a measured guest image",
        description="Compute from a guest image what its boot measures. RTMR1 and RTMR2 follow "
        "from it; the rest is enrolled from a guest that booted it, or taken from a policy.",
        allow_abbrev=False,
    )
    parser.set_defaults(verb=_from_image)
    add = parser.add_argument
    add(
        "image",
        metavar="IMAGE",
        type=Path,
        help="the raw disk, the UKI, or the JSON beside",
    )
    add(
        "--machine",
        metavar="KIND",
        default="edk2",
        help="edk2 (default), edk2-old, google or alibaba: whose firmware boots it",
    )
    add(
        "--firmware",
        type=Path,
        metavar="FILE",
        help="an OVMF.fd with TDX metadata: computes MRTD as QEMU builds the TD",
    )
    add("--name", default="image-1", help="what to call its registers")
    add(
        "--compare",
        type=Path,
        metavar="LOG",
        help="write no policy, but compare CCEL data with the image, event by event",
    )
    add("-o", "--output", type=Path, metavar="FILE", help="default: standard output")
    add("--json", action="store_true", help="print registers and events as JSON")
    _add_enrolled(parser)


def _add_enrolled(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--enrolled",
        type=Path,
        metavar="FILE",
        help="a quote of a guest that booted it; or a policy, to which it is added",
    )
    add("--event-log", type=Path, metavar="FILE", help="CCEL data of the quote's boot")
    add("--runtime-log", type=Path, metavar="FILE", help="its runtime log")
    add("--platform", choices=("this", "any"), default="this", help="as for enroll")
    add("--simulated", action="store_true", help="the quote's platform is simulated")
    add("--base", metavar="NAME", help="the image in the policy whose RTMR0 is taken")


def _from_image(options: argparse.Namespace) -> int:
    from tdxd.core.measure.boot import predict
    from tdxd.core.measure.machines import machine
    from tdxd.owner.files import read_bytes
    from tdxd.owner.measured.from_image import draft, firmware_mrtd, read_events
    from tdxd.owner.measured.image_input import read_boot_image

    _check(options)
    kind = machine(options.machine)
    image = read_boot_image(options.image)
    prediction = predict(image.uki, image.table, kind)
    if options.compare is not None:
        return _compare(prediction, read_events(read_bytes(options.compare)), options)
    mrtd = None
    if options.firmware is not None:
        from tdxd.core.measure.tdvf import FIRMWARE_MAX_BYTES

        data = read_bytes(options.firmware, max_bytes=FIRMWARE_MAX_BYTES)
        mrtd = firmware_mrtd(data, source=str(options.firmware))
    if options.json:
        return print_json(_facts(prediction, mrtd))
    if options.enrolled is None:
        made = draft(image, prediction, options.name, mrtd)
    else:
        made = _enrolled(prediction, mrtd, options)
    return _write(made, options.output)


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not belong together, and names that no policy can have.

    Raises: UsageError.
    """
    from tdxd.core.policy import RtmrSet
    from tdxd.errors import UsageError

    zero = "00" * 48
    try:
        RtmrSet(name=options.name, rtmr0=zero, rtmr1=zero, rtmr2=zero, rtmr3=zero)
    except ValueError as exc:
        raise UsageError(f"--name: {exc}") from exc
    logs = (options.event_log, options.runtime_log)
    if options.enrolled is None and (logs != (None, None) or options.base):
        text = "--event-log, --runtime-log and --base belong to --enrolled"
        raise UsageError(text, hint="--compare LOG compares a log alone")
    if options.compare is not None and (options.enrolled or options.output):
        raise UsageError("--compare writes no policy")
    if options.enrolled is not None and options.json:
        raise UsageError("--json shows what is computed, and takes no --enrolled")


def _enrolled(
    prediction: Prediction, mrtd: bytes | None, options: argparse.Namespace
) -> Drafted:
    """Complete what was computed by a quote, or by a policy: no text has the NULs of a quote."""
    from tdxd.errors import UsageError
    from tdxd.owner.appraisal.enroll import Reference
    from tdxd.owner.files import read_bytes, read_text
    from tdxd.owner.measured.from_image import from_policy, from_quote

    data = read_bytes(options.enrolled, max_bytes=_POLICY_MAX_BYTES)
    if b"\0" not in data:
        if mrtd is not None or options.event_log or options.runtime_log:
            text = "a policy has its MRTD and no logs"
            raise UsageError(text, hint="--enrolled took its file for a policy")
        text = read_text(options.enrolled)
        source = str(options.enrolled)
        base = options.base
        return from_policy(prediction, options.name, text, source=source, base=base)
    if options.base:
        raise UsageError("--base names an image of a policy, and --enrolled is a quote")
    log, runtime = options.event_log, options.runtime_log
    reference = Reference(
        quote=data,
        event_log=read_bytes(log) if log else b"",
        runtime_log=read_bytes(runtime) if runtime else b"",
        name=options.name,
        platform=options.platform,
        simulated=options.simulated,
    )
    return from_quote(prediction, reference, mrtd)


def _write(made: Drafted, output: Path | None) -> int:
    from tdxd.cli.keyd_policy import write_new

    if output is None:
        print(made.text, end="")
    else:
        write_new(output, made.text)
    for one in made.remarks:
        print(f"warning: {one}", file=sys.stderr)
    return 0


def _facts(prediction: Prediction, mrtd: bytes | None) -> dict[str, object]:
    registers = {
        f"rtmr{register}": value.hex() if value is not None else None
        for register in prediction.machine.predicted
        for value in (prediction.value(register),)
    }
    from tdxd.core.event_meaning import type_name

    events = [
        {
            "register": f"rtmr{one.register}",
            "type": type_name(one.type),
            "digest": None if one.digest is None else one.digest.hex(),
            "meaning": one.meaning,
            "why_unknown": one.why,
        }
        for one in prediction.events
    ]
    return {
        "machine": prediction.machine.name,
        "mrtd": None if mrtd is None else mrtd.hex(),
        "rtmr0": None,
        **registers,
        "events": events,
        "remarks": list(prediction.remarks),
    }


# --- comparing ------------------------------------------------------------------


def _compare(prediction: Prediction, events: Any, options: argparse.Namespace) -> int:
    from tdxd.core.measure.compare import compare
    from tdxd.errors import EX_NOPERM

    found = compare(prediction, events)
    if options.json:
        name = prediction.machine.register_name
        rows = [row.facts(name) for row in found.rows]
        print_json({"agrees": found.agrees, "events": rows})
    else:
        _print_comparison(found, prediction)
    return 0 if found.agrees else EX_NOPERM


def _print_comparison(found: Comparison, prediction: Prediction) -> None:
    differences = found.differences
    if differences:
        print(
            f"DIFFERS: {len(differences)} event(s) are not those of a boot of this image"
        )
    elif taken := sum(row.verdict == "taken" for row in found.rows):
        print(f"AGREES, but for {taken} event(s) taken as they are: not computable")
    else:
        print("AGREES: every event is that of a boot of this image")
    for row in found.rows:
        _print_row(row, prediction.machine.register_name)


def _print_row(row: Row, register_name: str) -> None:
    facts = row.facts(register_name)
    mark = "ok" if row.verdict == "same" else row.verdict
    place = "" if row.index is None else f", log entry {row.index}"
    print(f"\n{facts['register']} {mark:8} {facts['type']}{place}")
    if facts["meaning"]:
        print(f"    means     {facts['meaning']}")
    if row.verdict == "same":
        print(f"    digest    {facts['found']}")
        return
    for label, key in (
        ("expected", "expected"),
        ("found", "found"),
        ("log says", "log_says"),
    ):
        if facts[key]:
            print(f"    {label:9} {facts[key]}")
    if row.note:
        print(f"    why       {row.note}")
