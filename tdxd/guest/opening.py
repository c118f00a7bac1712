"""Opens the image file of a volume, of several candidates the one that the key fits."""

from __future__ import annotations

import os
from collections.abc import Callable

from tdxd.core.bundle import KeyBundle
from tdxd.core.config import VolumeConfig
from tdxd.errors import BadHeaderError, IntegrityError, MissingError, TdxdError
from tdxd.host import images
from tdxd.host.ports import MappedVolume, Mapper

__all__ = ["is_open", "map_first"]


def map_first(
    mapper: Mapper,
    spec: VolumeConfig,
    bundle: KeyBundle,
    *,
    cancelled: Callable[[], bool],
) -> tuple[MappedVolume, str]:
    """Try each candidate; return what was opened and the path of its file.

    Raises: MissingError; the last candidate's error if none fits.
    """
    error: TdxdError = MissingError(
        f"volume {spec.id}: no file matches {spec.image}", hint="copy the image there"
    )
    for file in images.candidates(spec.image):
        try:
            return mapper.map_volume(file.path, bundle, cancelled=cancelled), file.path
        except (BadHeaderError, IntegrityError) as exc:
            error = exc
    raise error


def is_open(mapped: MappedVolume) -> bool:
    """Say whether the descriptor, if there is one, is still one of the device."""
    if mapped.fd < 0:
        return True
    try:
        return os.readlink(f"/proc/self/fd/{mapped.fd}") == mapped.device
    except OSError:
        return False
