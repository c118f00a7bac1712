"""Opens the image file of a volume, of several candidates the one that a key fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from tdxd.core.bundle import KeyBundle
from tdxd.core.config import VolumeConfig
from tdxd.core.foreign import AnyBundle, ForeignManifest, PassphraseBundle
from tdxd.core.secret import Secret
from tdxd.errors import (
    BadBundleError,
    ConfigError,
    HostError,
    IntegrityError,
    MissingError,
    Retry,
    TdxdError,
    VolumeError,
)
from tdxd.host import images
from tdxd.host.images import ImageFile
from tdxd.host.ports import MappedVolume, Mapper

__all__ = [
    "check_first",
    "check_kind",
    "check_mapper",
    "is_open",
    "longest_map_s",
    "lost_error",
    "map_first",
    "operator_hint",
    "passphrase_bundle",
    "wipe",
]

_T = TypeVar("_T")
_OPERATORS_GENERATION = 1
"""What an operator opens has no generations."""
_SLOWEST_BYTES_PER_S = 10e6
"""A disk slower than this while mapping counts as hanging."""
_LEAST_S = 30.0
_UNLOCK_S = 120.0
"""The costliest header that is taken, on a slow machine."""
_FOREIGN_MAX_BYTES = 8 * 2**30
"""The size of such a file is the host's to say; what it says beyond this earns no more time."""


def map_first(
    mapper: Mapper,
    spec: VolumeConfig,
    bundles: Sequence[AnyBundle],
    *,
    cancelled: Callable[[], bool],
) -> tuple[MappedVolume, ImageFile]:
    """Try each candidate with each key; return what was opened and its file.

    The first key comes first with all of them: an older generation is opened only if no file of a
    newer one is there. A candidate that cannot be read does not keep the others from being tried.

    Raises: MissingError without a candidate. If none fits: an error with the first key that may
    pass by itself, so that it is tried again, else that of the last candidate.
    """

    def open_it(file: ImageFile, bundle: AnyBundle) -> MappedVolume:
        return mapper.map_volume(
            file.path, bundle, cancelled=cancelled, writable=spec.writable
        )

    return _first(spec, bundles, open_it, cancelled=cancelled)


def check_first(
    mapper: Mapper, spec: VolumeConfig, bundles: Sequence[AnyBundle]
) -> None:
    """Check that `map_first` would find a candidate, as far as that is seen without opening it.

    Raises: as `map_first`.
    """

    def check(file: ImageFile, bundle: AnyBundle) -> None:
        mapper.check(file.path, bundle)

    _first(spec, bundles, check, cancelled=lambda: False)


def _first(
    spec: VolumeConfig,
    bundles: Sequence[AnyBundle],
    try_it: Callable[[ImageFile, AnyBundle], _T],
    *,
    cancelled: Callable[[], bool],
) -> tuple[_T, ImageFile]:
    errors: list[TdxdError] = []
    files = images.candidates(spec.image)
    for bundle in bundles:
        for file in files:
            try:
                return try_it(file, bundle), file
            except (VolumeError, HostError) as exc:
                if cancelled():
                    raise
                if bundle is bundles[0]:
                    errors.append(exc)
    if not errors:
        text = f"volume {spec.id}: no file matches {spec.image}"
        raise MissingError(text, hint="copy the image there")
    passing = next((one for one in errors if one.retry is Retry.BACKOFF), None)
    raise passing or _none_fits(spec, bundles[0].manifest.generation, errors)


def _none_fits(
    spec: VolumeConfig, generation: int, errors: Sequence[TdxdError]
) -> TdxdError:
    """Return the last error; of several files none alone is to blame."""
    last = errors[-1]
    if len(errors) == 1:
        return last
    text = f"none of {len(errors)} files that match {spec.image} is generation {generation}"
    return type(last)(f"{text}; the last of them: {last.message}", hint=last.hint)


def longest_map_s(bundles: Sequence[AnyBundle], files: Sequence[ImageFile]) -> float:
    """Return how long mapping may take before the disk counts as hanging."""
    longest_s = _LEAST_S
    for one in bundles:
        if isinstance(one, KeyBundle):
            longest_s += one.manifest.image_bytes / _SLOWEST_BYTES_PER_S
            continue
        for file in files:
            size_bytes = min(file.size_bytes, _FOREIGN_MAX_BYTES)
            longest_s += _UNLOCK_S + size_bytes / _SLOWEST_BYTES_PER_S
    return longest_s


def check_mapper(spec: VolumeConfig, mapper: Mapper) -> None:
    """Check that this machine can do what the configuration asks for.

    Raises: ConfigError.
    """
    if spec.writable and mapper.name != "dm":
        raise ConfigError(
            f"volume {spec.id}: writable needs the mapper dm, this machine has {mapper.name}",
            hint="load dm_crypt (modprobe dm_crypt), or leave writable out of the configuration",
        )


def check_kind(spec: VolumeConfig, bundles: Sequence[AnyBundle]) -> None:
    """Check that what the key server released is of the kind that the configuration says.

    Raises: BadBundleError, naming both.
    """
    for one in bundles:
        kind = "sealed" if isinstance(one, KeyBundle) else one.manifest.kind
        if kind != spec.kind:
            raise BadBundleError(
                f"volume {spec.id}: the key server has a volume of kind {kind}, "
                f"the configuration says {spec.kind}",
                hint=f'kind = "{kind}" in the configuration, or add the other to the key server',
            )


def operator_hint(spec: VolumeConfig) -> str:
    """Return what an operator does to bring the passphrase."""
    return f"tdxctl mount {spec.id} asks for it, or takes it by --passphrase-fd"


def lost_error(spec: VolumeConfig) -> IntegrityError:
    """Return the error of an open volume that is no longer what was opened."""
    what = "the image changed after it was opened"
    if spec.kind != "sealed":
        what = "its device is gone"
    hint = f"replace the image file, or: tdxctl retry {spec.id}"
    return IntegrityError(f"volume {spec.id}: {what}", hint=hint)


def passphrase_bundle(volume_id: str, passphrase: Secret) -> PassphraseBundle:
    """Return what stands for an operator's passphrase: no manifest says more of its image."""
    manifest = ForeignManifest(volume_id=volume_id, generation=_OPERATORS_GENERATION)
    return PassphraseBundle(manifest=manifest, secret=passphrase)


def wipe(bundles: Sequence[AnyBundle]) -> None:
    """Wipe all secrets."""
    for one in bundles:
        one.secret.wipe()


def is_open(mapped: MappedVolume) -> bool:
    """Say whether the descriptor, if there is one, is still one of the device."""
    if mapped.fd < 0:
        return True
    try:
        return os.readlink(f"/proc/self/fd/{mapped.fd}") == mapped.device
    except OSError:
        return False
