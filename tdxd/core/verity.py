"""The dm-verity hash tree: where its levels lie, and how they are made and checked.

Only one shape is spoken: sha256, 4096-byte blocks on both sides, hash type 1 (the salt goes
before the data), no superblock, levels stored from the top down, the last block of each level
padded with zeros. The tree is never held whole: callers hand in one run of blocks at a time.

Source: Linux, Documentation/admin-guide/device-mapper/verity.rst; the positions of the levels
are those of `verity_ctr` in drivers/md/dm-verity-target.c.
"""

from __future__ import annotations

import dataclasses
import hashlib

from tdxd.core.runs import (
    DIGEST_BYTES,
    DIGESTS_PER_BLOCK,
    padded,
    run_digests,
)

__all__ = [
    "DIGESTS_PER_BLOCK",
    "DIGEST_BYTES",
    "Geometry",
    "Level",
    "block_digest",
    "geometry",
    "padded",
    "run_digests",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One level of the tree: `blocks` hash blocks that cover `covered_blocks` below.

    `first_block` and `covered_first_block` count from the start of the payload, so that they
    are also encryption sector numbers.
    """

    first_block: int
    blocks: int
    covered_first_block: int
    covered_blocks: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """The levels of a tree, top first; none when there is one data block only."""

    data_blocks: int
    levels: tuple[Level, ...]

    @property
    def hash_blocks(self) -> int:
        """Blocks of the whole tree."""
        return sum(level.blocks for level in self.levels)


def geometry(data_blocks: int) -> Geometry:
    """Lay out the tree that follows `data_blocks` blocks of data.

    Raises: ValueError for fewer than one block.
    """
    if data_blocks < 1:
        msg = f"{data_blocks} data blocks, at least 1 needed"
        raise ValueError(msg)
    sizes = [data_blocks]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // DIGESTS_PER_BLOCK))
    levels: list[Level] = []
    first = data_blocks
    for depth in range(len(sizes) - 1, 0, -1):
        below = 0 if depth == 1 else first + sizes[depth]
        level = Level(
            first_block=first,
            blocks=sizes[depth],
            covered_first_block=below,
            covered_blocks=sizes[depth - 1],
        )
        levels.append(level)
        first += sizes[depth]
    return Geometry(data_blocks=data_blocks, levels=tuple(levels))


def block_digest(salt: bytes, block: bytes | memoryview) -> bytes:
    """Hash one 4096-byte block: SHA-256(salt ‖ block), 32 bytes."""
    state = hashlib.sha256(salt)
    state.update(block)
    return state.digest()
