"""The admin verbs on a store directory: what `tdx-keyd add`, `secret`, `policy` and `remove` do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tdxd.core.bundle import KeyBundle, Manifest
from tdxd.core.named_secret import (
    Content,
    NamedSecret,
    ReleasedBundle,
    SecretManifest,
)
from tdxd.core.policy import parse_policy
from tdxd.core.secret import Secret
from tdxd.errors import DataError, TdxdError, UnavailableError, UsageError
from tdxd.owner.audit.guard import check_for_change, export_after_change
from tdxd.owner.files import read_bytes, read_text
from tdxd.owner.server.config import read_config
from tdxd.owner.store.kek import read_public, wrap
from tdxd.owner.store.store import GenerationRow, Store, Transaction

__all__ = [
    "add_bundle",
    "add_bundles",
    "export_change",
    "known_volume",
    "put_secret",
    "remove_secret",
    "remove_volume",
    "set_policy",
]


def add_bundle(
    directory: Path,
    bundle_file: Path,
    policy_file: Path | None,
    now_s: int,
    *,
    kek_file: Path | None = None,
) -> GenerationRow:
    """Add the bundle of a sealed image, and set its volume's policy, all or nothing.

    Raises: DataError, ConfigError, HostError.
    """
    bundle = KeyBundle.parse(read_bytes(bundle_file), source=str(bundle_file))
    with bundle.secret:
        (row,) = add_bundles(directory, [bundle], policy_file, now_s, kek_file=kek_file)
    return row


def add_bundles(
    directory: Path,
    bundles: Sequence[ReleasedBundle],
    policy_file: Path | None,
    now_s: int,
    *,
    kek_file: Path | None = None,
) -> tuple[GenerationRow, ...]:
    """Add secrets of sealed images or passphrases, and set a policy for each, all or nothing.

    `kek_file` holds the private half of the key-encryption key, if the directory does not.

    Raises: DataError, ConfigError, HostError.
    """
    text = None if policy_file is None else _policy_text(policy_file)
    with _changing(directory, kek_file, now_s) as store:
        public = read_public(directory, store.kek())
        rows = tuple(_row(public, bundle, now_s) for bundle in bundles)
        with store.transaction() as change:
            for row in rows:
                change.add_generation(row)
                if text is not None:
                    change.set_policy(row.volume_id, text, now_s)
    return rows


def _row(public: bytes, bundle: ReleasedBundle, now_s: int) -> GenerationRow:
    manifest = bundle.manifest
    return GenerationRow(
        volume_id=manifest.volume_id,
        generation=manifest.generation,
        wrapped=wrap(public, bundle),
        manifest_sha256=manifest.digest().hex(),
        added_at_s=now_s,
        manifest=b"" if isinstance(manifest, Manifest) else manifest.encode(),
    )


def put_secret(
    directory: Path,
    secret_id: str,
    content: Content,
    data: Secret,
    now_s: int,
    *,
    policy: Path | str | None = None,
    kek_file: Path | None = None,
) -> GenerationRow:
    """Add the next generation of a named secret, and set its policy, all or nothing.

    `policy` is a file, or the id of a volume or secret that has the same one. The content is what
    `owner.secret_content` has checked.

    Raises: DataError for an id that a volume has, or one without a policy to take; UsageError for
    what is no id or no content; ConfigError, HostError.
    """
    text = _policy_text(policy) if isinstance(policy, Path) else None
    with _changing(directory, kek_file, now_s) as store:
        public = read_public(directory, store.kek())
        if isinstance(policy, str):
            known_volume(store, policy)
        with store.transaction() as change:
            number = change.next_generation(secret_id)
            row = _row(public, _secret(secret_id, number, content, data), now_s)
            change.add_generation(row)
            if isinstance(policy, str):
                text = _policy_of(change, policy)
            if text is not None:
                change.set_policy(secret_id, text, now_s)
    return row


def _secret(
    secret_id: str, generation: int, content: Content, data: Secret
) -> NamedSecret:
    try:
        manifest = SecretManifest(
            volume_id=secret_id, generation=generation, content=content
        )
        return NamedSecret(manifest=manifest, secret=data)
    except ValueError as exc:
        raise UsageError(str(exc)) from exc


def _policy_of(change: Transaction, volume_id: str) -> str:
    row = change.policy(volume_id)
    if row is None:
        raise DataError(
            f"{volume_id!r} has no policy to take",
            hint="name a policy file: --policy FILE",
        )
    return row.text


def remove_secret(
    directory: Path,
    secret_id: str,
    generation: int | None,
    now_s: int,
    *,
    kek_file: Path | None = None,
) -> int:
    """Remove one generation, or all of a named secret; return how many generations went.

    Raises: DataError if there is no such thing, or it is a volume; HostError.
    """
    with Store.open(directory, kek_file) as store:
        known_volume(store, secret_id)
        if store.generations(secret_id)[-1].kind != "secret":
            raise DataError(
                f"{secret_id!r} is a volume, no secret", hint="tdx-keyd remove"
            )
    return remove_volume(directory, secret_id, generation, now_s, kek_file=kek_file)


def set_policy(
    directory: Path,
    volume_id: str,
    policy_file: Path,
    now_s: int,
    *,
    kek_file: Path | None = None,
) -> int:
    """Set the policy of a volume; return its version.

    Raises: DataError for an unknown volume, ConfigError, HostError.
    """
    text = _policy_text(policy_file)
    with _changing(directory, kek_file, now_s) as store:
        known_volume(store, volume_id)
        with store.transaction() as change:
            version = change.set_policy(volume_id, text, now_s)
    return version


def remove_volume(
    directory: Path,
    volume_id: str,
    generation: int | None,
    now_s: int,
    *,
    kek_file: Path | None = None,
) -> int:
    """Remove one generation, or the whole volume; return how many generations went.

    Raises: DataError if there is no such thing, HostError.
    """
    with _changing(directory, kek_file, now_s) as store:
        known_volume(store, volume_id)
        with store.transaction() as change:
            gone = change.remove(volume_id, generation, now_s)
            if generation is not None and not gone:
                raise DataError(f"volume {volume_id!r} has no generation {generation}")
    return gone


def known_volume(store: Store, volume_id: str) -> None:
    """Raise DataError, naming the volumes there are, for an unknown id."""
    ids = store.volume_ids()
    if volume_id not in ids:
        raise DataError(
            f"no volume or secret {volume_id!r} in the store",
            hint=f"there are: {', '.join(ids) or 'none'}",
        )


@contextlib.contextmanager
def _changing(directory: Path, kek_file: Path | None, now_s: int) -> Iterator[Store]:
    """Open a store that may be changed, and export the checkpoint of what is changed in it."""
    with Store.open(directory, kek_file) as store:
        check_for_change(directory, read_config(directory), store)
        yield store
    export_change(directory, kek_file, now_s)


def export_change(directory: Path, kek_file: Path | None, now_s: int) -> None:
    """Export the checkpoint of a change that stands, where that is configured.

    Raises: UnavailableError, saying so.
    """
    try:
        export_after_change(directory, kek_file, now_s)
    except TdxdError as exc:
        raise UnavailableError(
            f"the change was made, but its checkpoint was not exported: {exc.message}",
            hint=exc.hint
            or "a running server tries again; or: tdx-keyd audit checkpoint",
        ) from exc


def _policy_text(path: Path) -> str:
    text = read_text(path)
    parse_policy(text, source=str(path))
    return text
