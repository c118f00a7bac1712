"""A foreign volume's image: read its header once, and get its volume key from a passphrase.

What both mappers have in common. The host's bytes end here: onwards go the key, and the three
numbers of `Luks2Header` that the tables and the decryption need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import hmac
import threading
from collections.abc import Callable, Iterator

from tdxd.core.foreign import ForeignManifest
from tdxd.core.luks2_read import COPIES_BYTES, Luks2Header, read_luks2
from tdxd.core.secret import Secret
from tdxd.errors import HostError, IntegrityError
from tdxd.host import image_file, machine
from tdxd.host.workers import cancelled_error

__all__ = [
    "ForeignImage",
    "read_foreign",
    "read_image",
    "spare_memory_bytes",
    "unlocked",
]

_POLL_S = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ForeignImage:
    """An image whose header is validated: `region` is every byte before its payload."""

    path: str
    header: Luks2Header
    region: bytearray
    image_bytes: int

    @property
    def header_sha256(self) -> bytes:
        """The digest that pins header and keyslots in a manifest."""
        return hashlib.sha256(self.region).digest()


def read_image(path: str, fd: int) -> ForeignImage:
    """Read and validate what lies before the payload, each byte once.

    Raises: BadHeaderError, HostError.
    """
    size = image_file.size_bytes(path, fd)
    copies = image_file.read_range(path, fd, 0, COPIES_BYTES)
    header = read_luks2(copies, image_bytes=size, source=path)
    # In place: the host says how long it is, and several are opened at once.
    region = bytearray(header.payload_offset_bytes)
    region[:COPIES_BYTES] = copies
    with memoryview(region)[COPIES_BYTES:] as areas:
        got = image_file.read_into(path, fd, COPIES_BYTES, areas)
    del region[COPIES_BYTES + got :]
    return ForeignImage(path=path, header=header, region=region, image_bytes=size)


def read_foreign(path: str, fd: int, manifest: ForeignManifest) -> ForeignImage:
    """Read an image that must have the header that the manifest pins, if it pins one.

    Raises: BadHeaderError; IntegrityError if the manifest pins another header; HostError.
    """
    image = read_image(path, fd)
    pinned = manifest.header_sha256
    if pinned and not hmac.compare_digest(image.header_sha256, pinned):
        name = f"{manifest.volume_id} generation {manifest.generation}"
        raise IntegrityError(
            f"{path}: its header is not the one that belongs to {name}",
            hint="the file was changed, or is another image; if you changed a keyslot, add the "
            "volume to the key server again",
        )
    return image


@contextlib.contextmanager
def unlocked(
    image: ForeignImage, passphrase: Secret, *, cancelled: Callable[[], bool]
) -> Iterator[Secret]:
    """Yield the 64-byte volume key, which is wiped afterwards.

    Raises: WrongPassphraseError; HostError with ENOMEM if unlocking needs more memory than
    there is, with ECANCELED if `cancelled` turns true before or after the work.
    """
    from tdxd.core import luks2_unlock  # with cryptography: not at start

    needed_bytes = luks2_unlock.memory_bytes(image.header)
    with _memory.promised(needed_bytes, image.path, cancelled):
        key = luks2_unlock.unlock(
            image.header, image.region, passphrase, source=image.path
        )
    with key:
        if cancelled():
            raise cancelled_error(image.path)
        yield key


def spare_memory_bytes() -> int:
    """Return how much memory an image may ask for, since the host writes what it asks for.

    An eighth of what is available stays for everybody else.

    Raises: HostError.
    """
    left = machine.available_memory_bytes()
    return left - left // 8


class _Memory:
    """What unlocking takes: Argon2id up to a gigabyte, for each of several volumes at once."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._promised_bytes = 0

    @contextlib.contextmanager
    def promised(
        self, size: int, path: str, cancelled: Callable[[], bool]
    ) -> Iterator[None]:
        """Let no other volume have `size` bytes for the time of a with block.

        Waits while it is other volumes that leave too little.

        Raises: HostError, with ENOMEM if there is too little without them, too, and with
        ECANCELED when cancelled.
        """
        with self._changed:
            while True:
                if cancelled():
                    raise cancelled_error(path)
                left = spare_memory_bytes() - self._promised_bytes
                if size <= left:
                    break
                if not self._promised_bytes:
                    hint = f"its keyslot takes {size} bytes, {left} can be had"
                    raise HostError("unlock", path, errno.ENOMEM, hint=hint)
                self._changed.wait(_POLL_S)
            self._promised_bytes += size
        try:
            yield
        finally:
            with self._changed:
                self._promised_bytes -= size
                self._changed.notify_all()


_memory = _Memory()
