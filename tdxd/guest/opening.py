"""Opens the image file of a volume, of several candidates the one that a key fits."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from tdxd.core.bundle import KeyBundle
from tdxd.core.config import VolumeConfig
from tdxd.errors import BadHeaderError, IntegrityError, MissingError, TdxdError
from tdxd.host import images
from tdxd.host.ports import MappedVolume, Mapper

__all__ = ["is_open", "map_first"]


def map_first(
    mapper: Mapper,
    spec: VolumeConfig,
    bundles: Sequence[KeyBundle],
    *,
    cancelled: Callable[[], bool],
) -> tuple[MappedVolume, str]:
    """Try each candidate with each key; return what was opened and the path of its file.

    The first key comes first with all of them: an older generation is opened only if no file of a
    newer one is there.

    Raises: MissingError; the last candidate's error with the first key if none fits.
    """
    error: TdxdError = MissingError(
        f"volume {spec.id}: no file matches {spec.image}", hint="copy the image there"
    )
    files = images.candidates(spec.image)
    for bundle in bundles:
        for file in files:
            try:
                mapped = mapper.map_volume(file.path, bundle, cancelled=cancelled)
            except (BadHeaderError, IntegrityError) as exc:
                error = exc if bundle is bundles[0] else error
            else:
                return mapped, file.path
    raise error


def is_open(mapped: MappedVolume) -> bool:
    """Say whether the descriptor, if there is one, is still one of the device."""
    if mapped.fd < 0:
        return True
    try:
        return os.readlink(f"/proc/self/fd/{mapped.fd}") == mapped.device
    except OSError:
        return False
