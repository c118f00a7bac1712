"""Foreign images with what opens them: `luks2_genuine` makes the files."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from tdxd.core.foreign import ForeignManifest, PassphraseBundle
from tdxd.core.secret import Secret
from tests import luks2_genuine
from tests.luks2_genuine import PASSPHRASE, PAYLOAD_OFFSET_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """An image on disk, and what its payload holds."""

    path: Path
    data: bytes
    volume_id: str = "contract"

    def bundle(
        self, passphrase: bytes = PASSPHRASE, *, header_sha256: bytes = b""
    ) -> PassphraseBundle:
        """Return a new bundle, since whoever gets one may wipe it."""
        manifest = ForeignManifest(
            volume_id=self.volume_id, generation=1, header_sha256=header_sha256
        )
        return PassphraseBundle(manifest=manifest, secret=Secret(passphrase))

    def pinned(self) -> PassphraseBundle:
        """Return a bundle that pins the header as it is now."""
        with self.path.open("rb") as file:
            header = file.read(PAYLOAD_OFFSET_BYTES)
        return self.bundle(header_sha256=hashlib.sha256(header).digest())


def foreign(
    data: bytes,
    path: Path,
    *,
    sector_bytes: int = 4096,
    kdf: tuple[str, ...] = luks2_genuine.QUICK,
    volume_id: str = "contract",
) -> Foreign:
    """Make an image of a payload."""
    luks2_genuine.make_image(path, payload=data, sector_bytes=sector_bytes, kdf=kdf)
    return Foreign(path=path, data=data, volume_id=volume_id)
