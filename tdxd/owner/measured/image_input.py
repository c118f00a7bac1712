"""Reads IMAGE of `tdx-keyd policy from-image`: a UKI, a raw disk, or the facts beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tdxd.core.measure.fat import FatVolume
from tdxd.core.measure.gpt import (
    SECTOR_BYTES,
    TABLE_MAX_BYTES,
    GptTable,
    parse_gpt,
)
from tdxd.core.measure.uki import Uki, parse_uki
from tdxd.errors import DataError, HostError

__all__ = ["BootImage", "read_boot_image"]

_UKI_MAX_BYTES = 1 << 30
_FACTS_MAX_BYTES = 4 << 20
_UKI_PATH = ("EFI", "BOOT", "BOOTX64.EFI")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BootImage:
    """What firmware measures of an image; `table` is None where only a UKI was given."""

    source: str
    uki: Uki
    table: GptTable | None


def read_boot_image(path: Path) -> BootImage:
    """Read an image, whichever of the three it is.

    Facts are a JSON object with `disk` or `uki`, each with `file`, a name beside it, and `sha256`,
    which must be right.

    Raises: HostError, DataError.
    """
    with _File(path) as file:
        head = file.read(0, 2 * SECTOR_BYTES)
        if head[:2] == b"MZ":
            data = file.read(0, _UKI_MAX_BYTES + 1)
            if len(data) > _UKI_MAX_BYTES:
                raise DataError(f"{path} is larger than {_UKI_MAX_BYTES} bytes")
            return BootImage(
                source=str(path), uki=parse_uki(data, source=str(path)), table=None
            )
        if head[:1] == b"{":
            return _by_facts(path, file.read(0, _FACTS_MAX_BYTES + 1))
        return _disk(path, file)


def _disk(path: Path, file: _File) -> BootImage:
    source = str(path)
    table = parse_gpt(file.read(0, TABLE_MAX_BYTES), source=source)
    if table.esp is None:
        raise DataError(f"{path} has no EFI system partition")
    start, size_bytes = table.esp
    volume = FatVolume(
        file.window(start, size_bytes), source=f"{source}, EFI system partition"
    )
    data = volume.file(*_UKI_PATH)
    name = "/".join((source, *_UKI_PATH))
    return BootImage(source=source, uki=parse_uki(data, source=name), table=table)


def _by_facts(path: Path, text: bytes) -> BootImage:
    try:
        facts: Any = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{path} is not valid JSON: {exc}") from exc
    for key in ("disk", "uki"):
        part = facts.get(key)
        name = part.get("file") if isinstance(part, dict) else None
        if not isinstance(name, str) or os.path.basename(name) != name or not name:
            continue
        beside = path.parent / name
        if os.path.exists(beside):  # no error for what can be no name
            _check_sha256(beside, part.get("sha256"), path)
            return _uki_or_disk(beside)
    hint = "keep the .json beside the .raw or .efi that it describes"
    raise DataError(f"{path} names no disk and no UKI that lies beside it", hint=hint)


def _uki_or_disk(path: Path) -> BootImage:
    """Read what facts name, which may not be facts again."""
    with _File(path) as file:
        if file.read(0, 1) == b"{":
            raise DataError(f"{path} is neither a UKI nor a disk")
    return read_boot_image(path)


def _check_sha256(path: Path, wanted: object, facts: Path) -> None:
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise HostError.of("read", str(path), exc) from exc
    if found != wanted:
        text = f"{path} has the SHA-256 {found}, and {facts} says {wanted}"
        raise DataError(text, hint="the two are of different builds, or one is damaged")


class _File:
    """A file that is read in places."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise HostError.of("read", str(path), exc) from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, offset: int, size: int) -> bytes:
        parts, taken = [], 0
        try:
            while taken < size:
                part = os.pread(self._fd, size - taken, offset + taken)
                if not part:
                    break
                parts.append(part)
                taken += len(part)
        except OSError as exc:
            raise HostError.of("read", str(self._path), exc) from exc
        return b"".join(parts)

    def window(self, start: int, size_bytes: int) -> Callable[[int, int], bytes]:
        """Return a reader of a part of the file, which ends where the part does."""

        def read(offset: int, size: int) -> bytes:
            return self.read(start + offset, max(0, min(size, size_bytes - offset)))

        return read
