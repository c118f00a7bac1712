"""Where things stand in a LUKS2 file: what the writer and the strict reader share.

Source: LUKS2 On-Disk Format Specification 1.1.1, §2.1 and §2.2 (binary header, checksum), §3.2
(keyslots).
"""

from __future__ import annotations

import struct

__all__ = [
    "BINARY",
    "BINARY_BYTES",
    "CHECKSUM_BYTES",
    "CHECKSUM_OFFSET",
    "CIPHER",
    "COPY_BYTES",
    "JSON_BYTES",
    "KEYSLOT_AREA_BYTES",
    "KEYSLOT_OFFSET",
    "KEY_BYTES",
    "MAGICS",
    "STRIPES",
]

MAGICS = (b"LUKS\xba\xbe", b"SKUL\xba\xbe")
"""Of the first and of the second copy."""
BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
"""magic, version, copy's size, sequence number, label, checksum algorithm, salt, uuid,
subsystem, copy's offset, padding, checksum."""
BINARY_BYTES = 4096
CHECKSUM_OFFSET = 448
CHECKSUM_BYTES = 64
"""Of the field; a SHA-256 fills half of it."""
COPY_BYTES = 16384
"""A binary header and its JSON area, in the smallest and usual size."""
JSON_BYTES = COPY_BYTES - BINARY_BYTES
CIPHER = "aes-xts-plain64"
KEY_BYTES = 64
STRIPES = 4000
KEYSLOT_OFFSET = 2 * COPY_BYTES
KEYSLOT_AREA_BYTES = 258048
"""64-byte key x 4000 stripes, rounded up to 4096."""
