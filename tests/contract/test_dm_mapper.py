"""What the device mapper alone promises: the size of an image does not matter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tdxd.core import verity
from tdxd.core.bundle import KeyBundle, Manifest, volume_key
from tdxd.core.secret import Secret
from tdxd.host import dm
from tdxd.host.dm_map import DmMapper
from tdxd.host.workers import never
from tests import reference_image

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not dm.available(), reason="this kernel has no device mapper: runs in the guest"
    ),
]

DATA_BLOCKS = 2**21  # 8 GiB
READ_MAX_BYTES = 2**20


def bytes_read() -> int:
    """Bytes that this process has asked the kernel to read (proc(5), rchar)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


def test_an_image_of_8_gib_opens_by_reading_one_block(tmp_path: Path) -> None:
    """Only the top of its hash tree is there; every other block is EIO when it is read."""
    top = bytes(range(256)) * 16
    layout = verity.geometry(DATA_BLOCKS)
    manifest = Manifest(
        volume_id="contract-large",
        generation=1,
        payload_offset_bytes=reference_image.PAYLOAD_OFFSET,
        data_blocks=DATA_BLOCKS,
        hash_blocks=layout.hash_blocks,
        root_hash=hashlib.sha256(reference_image.SALT + top).digest(),
        salt=reference_image.SALT,
    )
    bundle = KeyBundle(manifest=manifest, secret=Secret(bytes(range(64))))
    key = volume_key(bundle).reveal()
    image = tmp_path / "large.img"
    place = layout.levels[0].first_block
    with image.open("wb") as file:
        file.truncate(manifest.image_bytes)
        file.seek(manifest.payload_offset_bytes + place * 4096)
        file.write(reference_image.xts(key, top, first_block=place))
    mapper, before = DmMapper(), bytes_read()
    mapped = mapper.map_volume(str(image), bundle, cancelled=never)
    try:
        assert bytes_read() - before < READ_MAX_BYTES
        with Path(mapped.device).open("rb") as device, pytest.raises(OSError):
            device.read(4096)
        assert not mapper.intact(mapped)
    finally:
        mapper.unmap(mapped)
