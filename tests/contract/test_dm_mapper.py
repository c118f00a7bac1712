"""What the device mapper alone promises: the size of an image does not matter."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from pathlib import Path

import pytest

from tdxd.core import verity
from tdxd.core.bundle import KeyBundle, Manifest, volume_key
from tdxd.core.dm_table import OURS
from tdxd.core.secret import Secret
from tdxd.errors import HostError
from tdxd.host import dm
from tdxd.host.dm_map import DmMapper
from tdxd.host.workers import never
from tests import luks2_genuine, reference_image
from tests.foreign_image import foreign

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(
        not dm.available(), reason="this kernel has no device mapper: runs in the guest"
    ),
]

DATA_BLOCKS = 2**21  # 8 GiB
READ_MAX_BYTES = 2**20
REMOVED_MAX_S = 20.0


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


def test_a_device_that_fails_while_it_is_looked_at_goes_with_the_last_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the plaintext would stay, and the volume could not be opened again."""
    made = foreign(bytes(65536), tmp_path / "m.img", volume_id="contract-probed")
    ours, looks = f"{OURS}contract-probed", []

    def probed(uuid: str, *_: object, **__: object) -> None:
        entries = Path("/sys/block").glob("dm-*")
        uuids = {one.name: (one / "dm/uuid").read_text().strip() for one in entries}
        (name,) = [name for name, found in uuids.items() if found == uuid]
        looks.append(os.open(f"/dev/{name}", os.O_RDONLY))
        raise HostError("read back the table of", uuid, errno.EBADMSG)

    monkeypatch.setattr(dm, "_check", probed)
    with pytest.raises(HostError, match="read back the table of"):
        DmMapper().map_volume(str(made.path), made.bundle(), cancelled=never)
    os.close(looks.pop())
    deadline_s = time.monotonic() + REMOVED_MAX_S
    while dm.mappings(ours):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)  # the kernel removes it in a thread of its own


def test_a_foreign_image_of_8_gib_opens_by_reading_its_header(tmp_path: Path) -> None:
    made = foreign(bytes(65536), tmp_path / "large.img")
    size_bytes = DATA_BLOCKS * 4096
    with made.path.open("r+b") as file:
        file.truncate(luks2_genuine.PAYLOAD_OFFSET_BYTES + size_bytes)
    mapper, before = DmMapper(), bytes_read()
    mapped = mapper.map_volume(str(made.path), made.bundle(), cancelled=never)
    try:
        most = luks2_genuine.PAYLOAD_OFFSET_BYTES + READ_MAX_BYTES
        assert bytes_read() - before < most
        assert mapped.payload_bytes == size_bytes
        with Path(mapped.device).open("rb") as device:
            assert device.read(65536) == bytes(65536)
    finally:
        mapper.unmap(mapped)
