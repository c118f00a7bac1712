"""The verbs of tdx-keyd about policies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tdxd.cli.keyd_appraise import add_appraisal_verbs
from tdxd.cli.keyd_from_image import add_from_image
from tdxd.cli.keyd_verbs import add_kek, add_verb, now_s, print_json

if TYPE_CHECKING:
    from tdxd.core.policy_diff import Change
    from tdxd.core.policy_lint import Remark

__all__ = ["add_policy_verbs", "write_new"]


def add_policy_verbs(verbs: Any) -> None:
    """Add `policy`, `explain` and `appraise`."""
    parser = verbs.add_parser("policy", help="write, set, show and check policies")
    policy = parser.add_subparsers(metavar="VERB", required=True)
    _add_enroll(policy)
    add_from_image(policy)
    check = policy.add_parser(
        "check",
        help="check a policy file",
        description="Say whether a policy file is valid, and what in it is worth a second look.",
        allow_abbrev=False,
    )
    check.set_defaults(verb=_policy_check)
    check.add_argument("file", metavar="FILE", type=Path)
    check.add_argument("--json", action="store_true", help="print JSON")
    diff = add_verb(
        policy, "diff", _policy_diff, "show what FILE changes in a volume's policy"
    )
    diff.add_argument("id", metavar="ID")
    diff.add_argument("file", metavar="FILE", type=Path)
    setter = add_verb(policy, "set", _policy_set, "set the policy of a volume")
    setter.add_argument("id", metavar="ID")
    setter.add_argument("file", metavar="FILE", type=Path)
    add_kek(setter)
    show = add_verb(policy, "show", _policy_show, "print the policy of a volume")
    show.add_argument("id", metavar="ID")
    add_appraisal_verbs(verbs)


def _add_enroll(policy: Any) -> None:
    enroll = policy.add_parser(
        "enroll",
        help="write the policy that a reference guest fulfils",
        description="Write the policy that a reference guest fulfils, from its quote. Nothing is "
        "proved of that quote: take it from a guest that you trust.",
        allow_abbrev=False,
    )
    enroll.set_defaults(verb=_policy_enroll)
    enroll.add_argument("--quote", type=Path, metavar="FILE", required=True)
    enroll.add_argument(
        "--event-log", type=Path, metavar="FILE", help="its CCEL data, of the same boot"
    )
    enroll.add_argument(
        "--runtime-log",
        type=Path,
        metavar="FILE",
        help="its runtime log, if it serves already",
    )
    enroll.add_argument(
        "--name",
        default="image-1",
        help="what to call its registers, such as image-2026-11 (default: image-1)",
    )
    enroll.add_argument(
        "--platform",
        choices=("this", "any"),
        default="this",
        help="pin the machine of the quote, or let any run it (default: this)",
    )
    enroll.add_argument(
        "--simulated", action="store_true", help="the platform is simulated"
    )
    enroll.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="default: standard output"
    )


# --- the verbs ----------------------------------------------------------------


def _policy_enroll(options: argparse.Namespace) -> int:
    from tdxd.owner.appraisal.enroll import Reference, enroll
    from tdxd.owner.files import read_bytes

    made = enroll(
        Reference(
            quote=read_bytes(options.quote),
            event_log=read_bytes(options.event_log) if options.event_log else b"",
            runtime_log=read_bytes(options.runtime_log) if options.runtime_log else b"",
            name=options.name,
            platform=options.platform,
            simulated=options.simulated,
        )
    )
    if options.output is None:
        print(made.text, end="")
    else:
        write_new(options.output, made.text)
    _print_remarks(made.remarks)
    return 0


def write_new(path: Path, text: str) -> None:
    """Write a policy to a file that is not there yet.

    Raises: UsageError, HostError.
    """
    from tdxd.errors import HostError, UsageError

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        hint = "choose another name: a policy may have been edited by hand"
        raise UsageError(f"{path} exists", hint=hint) from None
    except OSError as exc:
        raise HostError.of("write", str(path), exc) from exc


def _policy_check(options: argparse.Namespace) -> int:
    from tdxd.core.policy import parse_policy
    from tdxd.core.policy_lint import lint
    from tdxd.owner.files import read_text

    policy = parse_policy(read_text(options.file), source=str(options.file))
    remarks = lint(policy, now_s())
    if options.json:
        warnings = [
            {"path": one.path, "text": one.text, "hint": one.hint} for one in remarks
        ]
        return print_json({"valid": True, "warnings": warnings})
    print(f"{options.file}: valid", end="")
    print(f", {len(remarks)} warning(s)" if remarks else "")
    _print_remarks(remarks, file=sys.stdout)
    return 0


def _print_remarks(remarks: Iterable[Remark], *, file: Any = None) -> None:
    for one in remarks:
        print(f"warning: {one.path}: {one.text}", file=file or sys.stderr)
        print(f"  hint: {one.hint}", file=file or sys.stderr)


def _policy_diff(options: argparse.Namespace) -> int:
    from tdxd.core.policy import parse_policy
    from tdxd.core.policy_diff import diff
    from tdxd.errors import DataError
    from tdxd.owner.files import read_text
    from tdxd.owner.store.store import Store

    new = parse_policy(read_text(options.file), source=str(options.file))
    with Store.open(options.store) as store:
        row = store.policy(options.id)
    if row is None:
        raise DataError(f"volume {options.id!r} has no policy")
    old = parse_policy(row.text, source=f"policy of {options.id}")
    changes = diff(old, new)
    if options.json:
        return print_json(
            {
                "id": options.id,
                "version": row.version,
                "changes": [_plain_change(one) for one in changes],
            }
        )
    print(f"policy of {options.id}, version {row.version}: {_summary(changes)}")
    for one in changes:
        _print_change(one)
    return 0


def _summary(changes: tuple[Change, ...]) -> str:
    if not changes:
        return "the file means the same"
    looser = sum(one.looser for one in changes)
    more = f"{looser} of them let more pass" if looser else "none lets more pass"
    return f"{len(changes)} change(s), {more}"


def _plain_change(one: Change) -> dict[str, object]:
    return {
        "path": one.path,
        "kind": one.kind,
        "old": one.old,
        "new": one.new,
        "looser": one.looser,
    }


def _print_change(one: Change) -> None:
    mark = "LOOSER" if one.looser else ""
    sign, text = {
        "added": ("+", one.new),
        "removed": ("-", one.old),
        "changed": ("~", f"{one.old} -> {one.new}"),
    }[one.kind]
    print(f"{mark:6} {sign} {one.path}: {text}")


def _policy_set(options: argparse.Namespace) -> int:
    from tdxd.owner.store.admin import set_policy

    version = set_policy(
        options.store, options.id, options.file, now_s(), kek_file=options.kek
    )
    if options.json:
        return print_json({"id": options.id, "policy_version": version})
    print(f"policy of {options.id} is now version {version}")
    return 0


def _policy_show(options: argparse.Namespace) -> int:
    from tdxd.errors import DataError
    from tdxd.owner.store.store import Store

    with Store.open(options.store) as store:
        row = store.policy(options.id)
    if row is None:
        raise DataError(f"volume {options.id!r} has no policy")
    if options.json:
        return print_json(
            {"id": row.volume_id, "version": row.version, "text": row.text}
        )
    print(row.text, end="" if row.text.endswith("\n") else "\n")
    return 0
