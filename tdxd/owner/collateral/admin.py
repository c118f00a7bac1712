"""The admin verbs on collateral: what `tdx-keyd collateral` does, also while a server runs.

A server notices within two minutes what these verbs put into the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

from tdxd.errors import ConfigError, DataError, HostError
from tdxd.owner.appraisal.appraise import TrustedRoot
from tdxd.owner.collateral.bundle import (
    BUNDLE_MAX_BYTES,
    CollateralSet,
    encode_bundle,
    parse_bundle,
)
from tdxd.owner.collateral.cache import CollateralCache, Prepared, refusal
from tdxd.owner.collateral.files import CollateralFiles
from tdxd.owner.collateral.floors import floor_values
from tdxd.owner.collateral.pcs import PcsSource, check_question, fetch_collateral
from tdxd.owner.collateral.roots import find_root, make_cache, trusted_roots
from tdxd.owner.files import write_public
from tdxd.owner.server.config import read_config
from tdxd.owner.store.store import Store

__all__ = [
    "Imported",
    "SetStatus",
    "collateral_status",
    "export_bundle",
    "fetch_set",
    "import_bundle",
]

_REFRESH_HINT = "tdx-keyd collateral fetch, or import a newer bundle"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SetStatus:
    """What is known of one set; `state` is valid, refused, unreadable or missing.

    Times are unix seconds. `problem` and `hint` say why it is not valid, or what the server met
    when it last looked for a newer one.
    """

    root: str
    simulated: bool
    fmspc: str
    ca: str
    state: str
    source: str = ""
    fetched_s: int | None = None
    issued_s: int | None = None
    expires_s: int | None = None
    tcb_evaluation: int | None = None
    qe_evaluation: int | None = None
    pck_crl_number: int | None = None
    pck_crl_issued_s: int | None = None
    root_crl_number: int | None = None
    root_crl_issued_s: int | None = None
    floors: Mapping[str, int] = dataclasses.field(default_factory=dict)
    problem: str = ""
    problem_at_s: int | None = None
    hint: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """One set of a bundle that was good; `taken` is False where a later one was there."""

    fmspc: str
    ca: str
    expires_s: int
    taken: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Rooted:
    """One trusted root with everything that its collateral needs."""

    root: TrustedRoot
    source: PcsSource
    cache: CollateralCache
    files: CollateralFiles
    floors: Mapping[str, int]


@contextlib.contextmanager
def _opened(directory: Path, kek_file: Path | None) -> Iterator[dict[str, _Rooted]]:
    """Open a store; yield its roots by the hash of their keys."""
    config = read_config(directory)
    roots = trusted_roots(directory, config)
    with Store.open(directory, kek_file) as store:
        yield {
            root.key_sha384: _Rooted(
                root=root,
                source=source,
                cache=make_cache(directory, config, store, root, source),
                files=CollateralFiles(directory, root.key_sha384),
                floors=store.floors(),
            )
            for root, source in roots.items()
        }


def collateral_status(
    directory: Path, now_s: int, *, kek_file: Path | None = None
) -> tuple[SetStatus, ...]:
    """Return every set and every problem that the store knows of.

    Raises: ConfigError, HostError, BusyError.
    """
    with _opened(directory, kek_file) as roots:
        return tuple(
            _status(rooted, fmspc, ca, now_s)
            for rooted in roots.values()
            for fmspc, ca in rooted.files.questions()
        )


def fetch_set(
    directory: Path,
    fmspc: str,
    ca: str,
    root_key_sha384: str,
    now_s: int,
    *,
    kek_file: Path | None = None,
) -> SetStatus:
    """Fetch one set now, from the source of the root with this key.

    Raises: DataError, UnavailableError, ConfigError, HostError, BusyError.
    """
    check_question(fmspc, ca)
    config = read_config(directory)
    if config.collateral.offline:
        raise ConfigError(
            f"{directory}: [collateral] says offline = true, so nothing is fetched",
            hint="fetch and export in another store, and import here",
        )
    find_root(trusted_roots(directory, config), root_key_sha384)
    with _opened(directory, kek_file) as roots:
        rooted = roots[root_key_sha384]
        one = CollateralSet(
            root=root_key_sha384,
            fmspc=fmspc,
            ca=ca,
            source=rooted.source.base(),
            fetched_s=now_s,
            collateral=_fields(fetch_collateral(rooted.source, fmspc, ca)),
        )
        prepared = rooted.cache.accept(one, now_s)
        if not prepared.ok:
            raise refusal(fmspc, ca, prepared)
        return _status(rooted, fmspc, ca, now_s)


def export_bundle(
    directory: Path, file: Path, now_s: int, *, kek_file: Path | None = None
) -> tuple[CollateralSet, ...]:
    """Write every set that may be used now into a new file.

    Raises: DataError if there is none; ConfigError, HostError, BusyError.
    """
    with _opened(directory, kek_file) as roots:
        sets = [
            one
            for rooted in roots.values()
            for question in rooted.files.questions()
            for one, prepared in (_read(rooted, *question, now_s),)
            if one is not None and prepared is not None and prepared.ok
        ]
    if not sets:
        raise DataError(f"{directory} has no valid collateral", hint=_REFRESH_HINT)
    write_public(file, encode_bundle(sets))
    return tuple(sets)


def import_bundle(
    directory: Path, file: Path, now_s: int, *, kek_file: Path | None = None
) -> tuple[Imported, ...]:
    """Take in a bundle: every set of it must pass every check, or none is taken.

    Raises: DataError, naming the set and the check; ConfigError, HostError, BusyError.
    """
    sets = parse_bundle(_read_file(file), source=str(file))
    roots = trusted_roots(directory, read_config(directory))
    for one in sets:
        find_root(roots, one.root)
    with _opened(directory, kek_file) as opened:
        for one in sets:
            _refuse_bad(opened[one.root].cache.check(one, now_s), one, file)
        return tuple(_take(opened[one.root], one, file, now_s) for one in sets)


def _take(rooted: _Rooted, one: CollateralSet, file: Path, now_s: int) -> Imported:
    _, held = _read(rooted, one.fmspc, one.ca, now_s)
    offered = rooted.cache.check(one, now_s)
    taken = held is None or not held.ok or held.expires_s <= offered.expires_s
    if taken:
        marked = dataclasses.replace(
            one,
            fetched_s=min(one.fetched_s, now_s),
            source=one.source.removesuffix(" (imported)")[:480] + " (imported)",
        )
        _refuse_bad(rooted.cache.accept(marked, now_s), one, file)
    return Imported(
        fmspc=one.fmspc, ca=one.ca, expires_s=offered.expires_s, taken=taken
    )


def _refuse_bad(prepared: Prepared, one: CollateralSet, file: Path) -> None:
    if not prepared.ok:
        error = refusal(one.fmspc, one.ca, prepared)
        raise DataError(f"{file} is not imported: {error.message}", hint=error.hint)


def _read(
    rooted: _Rooted, fmspc: str, ca: str, now_s: int
) -> tuple[CollateralSet | None, Prepared | None]:
    """Return a set of the store, and the same with its checks; None where unreadable."""
    try:
        one = rooted.files.read(fmspc, ca)
        return one, None if one is None else rooted.cache.check(one, now_s)
    except DataError:
        return None, None


def _status(rooted: _Rooted, fmspc: str, ca: str, now_s: int) -> SetStatus:
    status = SetStatus(
        root=rooted.root.name,
        simulated=rooted.root.simulated,
        fmspc=fmspc,
        ca=ca,
        state="missing",
        hint=_REFRESH_HINT,
    )
    problem = rooted.files.problem(fmspc, ca)
    if problem is not None:
        status = dataclasses.replace(
            status,
            problem=problem.message,
            problem_at_s=problem.at_s,
            hint=problem.hint or _REFRESH_HINT,
        )
    try:
        one = rooted.files.read(fmspc, ca)
        if one is None:
            return status
        prepared = rooted.cache.check(one, now_s)
    except DataError as exc:
        return dataclasses.replace(
            status, state="unreadable", problem=exc.message, hint=_REFRESH_HINT
        )
    if not prepared.ok:
        error = refusal(fmspc, ca, prepared)
        status = dataclasses.replace(
            status, state="refused", problem=error.message, hint=error.hint
        )
    else:
        hint = status.hint if status.problem else ""
        status = dataclasses.replace(status, state="valid", hint=hint)
    return _with_numbers(status, rooted, one, prepared)


def _with_numbers(
    status: SetStatus, rooted: _Rooted, one: CollateralSet, prepared: Prepared
) -> SetStatus:
    names = floor_values(prepared, rooted.root.key_sha384, one.ca)
    return dataclasses.replace(
        status,
        source=one.source,
        fetched_s=one.fetched_s,
        issued_s=prepared.issued_s,
        expires_s=prepared.expires_s,
        tcb_evaluation=prepared.tcb_evaluation,
        qe_evaluation=prepared.qe_evaluation,
        pck_crl_number=prepared.pck_crl_number,
        pck_crl_issued_s=prepared.issued["pck_crl"],
        root_crl_number=prepared.root_crl_number,
        root_crl_issued_s=prepared.issued["root_ca_crl"],
        floors={name: rooted.floors[name] for name in names if name in rooted.floors},
    )


def _fields(text: str) -> dict[str, str]:
    """Return a fetched set as the plain fields that `fetch_collateral` wrote."""
    import json

    fields: dict[str, str] = json.loads(text)
    return fields


def _read_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(BUNDLE_MAX_BYTES + 1)
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
