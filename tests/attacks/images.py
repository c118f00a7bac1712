"""What an attack on an image came to: whether it was refused, and what could be read after all."""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Callable
from pathlib import Path

from tdxd.core.bundle import KeyBundle
from tdxd.errors import EX_DATAERR, IntegrityError, Retry, TdxdError
from tdxd.host.ports import MappedVolume, Mapper
from tests.reference_image import PAYLOAD_OFFSET, Reference

BLOCK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """`unreadable` are the blocks that gave EIO; every other one was right."""

    refused: TdxdError | None = None
    unreadable: frozenset[int] = frozenset()
    intact: bool = True

    @property
    def harmless(self) -> bool:
        return self == Outcome()


def opened(
    mapper: Mapper,
    path: Path,
    image: Reference,
    *,
    bundle: KeyBundle | None = None,
    during: Callable[[], object] | None = None,
    after: Callable[[], object] | None = None,
) -> Outcome:
    """Open the image and read all of it; a wrong byte fails the test.

    `during` is done once the top of the hash tree was verified and before anything is mapped,
    `after` once the image is mapped.
    """
    first = [during] if during else []

    def cancelled() -> bool:
        for attack in first:
            first.clear()
            attack()
        return False

    used = bundle or image.bundle
    try:
        mapped = mapper.map_volume(str(path), used, cancelled=cancelled)
    except TdxdError as exc:
        return Outcome(refused=exc)
    try:
        if after is not None:
            after()
        unreadable = read_blocks(mapped, image.data)
        return Outcome(unreadable=unreadable, intact=mapper.intact(mapped))
    finally:
        mapper.unmap(mapped)


def read_blocks(mapped: MappedVolume, data: bytes) -> frozenset[int]:
    """Read the device block by block, from below its cache; return those that cannot be read."""
    unreadable = set()
    # Without the cache there is no reading ahead either, which would meet each error many times.
    fd = os.open(mapped.device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        assert os.lseek(fd, 0, os.SEEK_END) == len(data)
        with mmap.mmap(-1, BLOCK) as aligned:
            for start in range(0, len(data), BLOCK):
                try:
                    got = os.preadv(fd, [aligned], start)
                except OSError:
                    unreadable.add(start // BLOCK)
                else:
                    assert aligned[:got] == data[start : start + BLOCK], start // BLOCK
    finally:
        os.close(fd)
    return frozenset(unreadable)


def assert_found(outcome: Outcome, mapper: Mapper, blocks: range | set[int]) -> None:
    """The memory mapper refuses the image; dm-verity gives EIO for exactly these blocks."""
    if mapper.name == "memory":
        assert_refused(outcome, "is not what was sealed")
    else:
        assert outcome == Outcome(unreadable=frozenset(blocks), intact=False)


def assert_refused(outcome: Outcome, text: str) -> None:
    """Refused for good, with the reason and a hint."""
    error = outcome.refused
    assert isinstance(error, IntegrityError), outcome
    assert text in error.message
    assert error.hint
    assert error.exit_code == EX_DATAERR
    assert error.retry is Retry.OPERATOR


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def at_block(block: int) -> int:
    return PAYLOAD_OFFSET + block * BLOCK


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
        os.fsync(file.fileno())


def lose(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    """Another file takes the name, at once."""
    other = path.with_suffix(".other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


HARMFUL: dict[str, Callable[[Path], None]] = {
    "overwritten": overwrite,
    "emptied": lambda path: os.truncate(path, 0),
    "shortened": lambda path: os.truncate(path, at_block(1)),
    "without its last block": lambda path: os.truncate(
        path, path.stat().st_size - BLOCK
    ),
}
"""What is done to the file itself."""
HARMLESS = {"removed": lose, "swapped": swap, "a link": link}
"""What is done to its name: the opened file stays what it was."""
