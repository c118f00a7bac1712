"""Gives an image another secret and generation; the file system in it stays, byte for byte."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, volume_key
from tdxd.errors import UsageError
from tdxd.host.image_file import open_image
from tdxd.owner.sealing.check import decrypt_payload
from tdxd.owner.sealing.image import ImageRequest, Progress, Sealed, make_image
from tdxd.owner.sealing.payload import real_path

__all__ = ["RekeyRequest", "rekey_image"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RekeyRequest(ImageRequest):
    """The image and bundle to start from, and what to make of them."""

    old_image: Path
    old_bundle: KeyBundle

    def __post_init__(self) -> None:
        old = self.old_bundle.manifest
        if self.generation <= old.generation:
            raise UsageError(
                f"generation {self.generation} is not above {old.generation}",
                hint="the key server serves a generation once; without the option it counts up",
            )


def rekey_image(request: RekeyRequest, progress: Progress) -> Sealed:
    """Verify and decrypt the old image, and seal its file system under the new secret.

    Salt and tree are new: they depend on secret and generation. The new image shares no block
    with the old one, which stays as it is.

    Raises: MissingError, BadHeaderError, IntegrityError, DataError, HostError; nothing is left
    under a final name.
    """
    old, name = request.old_bundle, str(real_path(request.old_image))
    size_bytes = old.manifest.data_blocks * BLOCK_BYTES

    def show(done: int, whole: int) -> None:
        progress("decrypt", done, whole)

    with open_image(name, old.manifest) as fd, volume_key(old) as key:

        def fill(plain: int) -> None:
            # The old tree goes behind the file system, and is cut off again.
            decrypt_payload(
                name,
                fd,
                old.manifest,
                key,
                tree_fd=plain,
                out_fd=plain,
                progress=show,
            )
            os.ftruncate(plain, size_bytes)

        return make_image(request, size_bytes, fill, progress)
