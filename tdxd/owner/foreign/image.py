"""The owner's own copy of a foreign image: its header is read, tried and pinned."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path

from tdxd.core.luks2_read import COPIES_BYTES, Luks2Header, read_luks2
from tdxd.core.luks2_unlock import unlock
from tdxd.core.secret import Secret
from tdxd.host.image_file import open_file, read_range, size_bytes

__all__ = ["OwnersImage", "pin_header", "read_foreign"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OwnersImage:
    """What the strict reader takes: `region` is every byte before the payload."""

    header: Luks2Header
    region: bytes
    image_bytes: int

    @property
    def header_sha256(self) -> bytes:
        """The digest that pins header and keyslots in a manifest."""
        return hashlib.sha256(self.region).digest()


def read_foreign(image: Path) -> OwnersImage:
    """Read the header of a LUKS2 image, a file or a block device, by the guest's own reader.

    Links are followed: the owner's file is where he says.

    Raises: MissingError, BadHeaderError naming what is refused, HostError.
    """
    source, path = str(image), os.path.realpath(image)
    with open_file(path) as fd:
        image_bytes = size_bytes(source, fd)
        copies = read_range(source, fd, 0, COPIES_BYTES)
        header = read_luks2(copies, image_bytes=image_bytes, source=source)
        rest_bytes = header.payload_offset_bytes - COPIES_BYTES
        region = copies + read_range(source, fd, COPIES_BYTES, rest_bytes)
    return OwnersImage(header=header, region=region, image_bytes=image_bytes)


def pin_header(image: Path, passphrase: Secret) -> bytes:
    """Return the SHA-256 that pins an image's header, after the passphrase opened it.

    Raises: MissingError, BadHeaderError, WrongPassphraseError, HostError.
    """
    found = read_foreign(image)
    with unlock(found.header, found.region, passphrase, source=str(image)):
        return found.header_sha256
