"""The owner's own copy of a foreign image: its header is read, tried and pinned."""

from __future__ import annotations

import os
from pathlib import Path

from tdxd.core.luks2_unlock import unlock
from tdxd.core.secret import Secret
from tdxd.host.image_file import open_file
from tdxd.host.luks2_map import ForeignImage, read_image

__all__ = ["pin_header", "read_foreign"]


def read_foreign(image: Path) -> ForeignImage:
    """Read the header of a LUKS2 image, a file or a block device, by the guest's own reader.

    Links are followed: the owner's file is where he says.

    Raises: MissingError, BadHeaderError naming what is refused, HostError.
    """
    with open_file(os.path.realpath(image)) as fd:
        return read_image(str(image), fd)


def pin_header(image: Path, passphrase: Secret) -> bytes:
    """Return the SHA-256 that pins an image's header, after the passphrase opened it.

    Raises: MissingError, BadHeaderError, WrongPassphraseError, HostError.
    """
    found = read_foreign(image)
    with unlock(found.header, found.region, passphrase, source=str(image)):
        return found.header_sha256
