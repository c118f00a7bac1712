"""The JSON area of a LUKS2 header that the host wrote: what it may say, and nothing else.

The profile is what `cryptsetup luksFormat -s 512 -c aes-xts-plain64` of version 2.6 leaves in a
file, also after luksAddKey, luksKillSlot, luksChangeKey, `reencrypt --encrypt`, and `convert` from
LUKS1. Every cost is capped here, so that whoever holds the result may pay it.

A keyslot bound to nothing (`luksAddKey --unbound`) is refused: there is one digest, and it names
every keyslot.

Source: LUKS2 On-Disk Format Specification 1.1.1, §3.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
from typing import Any, Literal, NoReturn

from tdxd.core.decode import decode
from tdxd.core.luks2_layout import KEYSLOT_AREA_BYTES, KEYSLOT_OFFSET
from tdxd.errors import BadHeaderError

__all__ = [
    "Argon2id",
    "Digest",
    "Document",
    "Keyslot",
    "Pbkdf2",
    "parse_document",
]

_KEYSLOTS_MAX = 8
_MEMORY_KIB = (32, 2**20)
_PASSES = (4, 16)
_LANES = (1, 4)
_ITERATIONS = (1000, 10**7)
_DIGEST_ITERATIONS = (1000, 2 * 10**6)
"""luksFormat makes an eighth of a second of them: 250,000 here."""
_COST_MAX = 2.0
"""All keyslots together may cost what two do that reach the caps of their kind: eight of 1 GiB
and 4 passes, as luksFormat makes them on a large machine, or some 20 s of one processor."""
_DIGESTS_MAX = 5 * 10**6
"""Iterations, each keyslot that is tried taking the digest's once: half of a keyslot's cost."""
_SALT_BYTES = 32
_DIGEST_BYTES = (32, 20)
"""`cryptsetup convert` keeps the 20 bytes that LUKS1 has."""
_ALIGNMENT_BYTES = 4096
_KEY_MAX_CHARACTERS = 32
_NUMBER = re.compile(r"0|[1-9][0-9]{0,14}")
_KEYSLOT_NUMBER = re.compile(r"[12]?[0-9]|3[01]")
_HINT = "taken is what `cryptsetup luksFormat --type luks2 -s 512 -c aes-xts-plain64` writes"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pbkdf2:
    """PBKDF2-HMAC-SHA256."""

    type: Literal["pbkdf2"]
    hash: Literal["sha256"]
    iterations: int
    salt: str

    def __post_init__(self) -> None:
        _within("iterations", self.iterations, _ITERATIONS)
        _bytes("salt", self.salt, _SALT_BYTES)

    @property
    def cost(self) -> float:
        """Share of what one keyslot of this kind may cost."""
        return self.iterations / _ITERATIONS[1]

    @property
    def memory_bytes(self) -> int:
        """Memory that deriving takes."""
        return 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Argon2id:
    """Argon2id: `time` passes over `memory` KiB in `cpus` lanes."""

    type: Literal["argon2id"]
    time: int
    memory: int
    cpus: int
    salt: str

    def __post_init__(self) -> None:
        _within("time", self.time, _PASSES)
        _within("memory", self.memory, _MEMORY_KIB)
        _within("cpus", self.cpus, _LANES)
        _bytes("salt", self.salt, _SALT_BYTES)

    @property
    def cost(self) -> float:
        """Share of what one keyslot of this kind may cost."""
        return self.time * self.memory / (_PASSES[1] * _MEMORY_KIB[1])

    @property
    def memory_bytes(self) -> int:
        """Memory that deriving takes."""
        return self.memory * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Splitter:
    type: Literal["luks1"]
    stripes: Literal[4000]
    hash: Literal["sha256"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Area:
    type: Literal["raw"]
    offset: str
    size: Literal["258048"]
    encryption: Literal["aes-xts-plain64"]
    key_size: Literal[64]

    def __post_init__(self) -> None:
        _offset("offset", self.offset)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Keyslot:
    """One way to the volume key."""

    type: Literal["luks2"]
    key_size: Literal[64]
    af: _Splitter
    area: _Area
    kdf: Pbkdf2 | Argon2id

    @property
    def area_offset_bytes(self) -> int:
        """Where the area starts in the file."""
        return int(self.area.offset)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Segment:
    type: Literal["crypt"]
    offset: str
    size: Literal["dynamic"]
    iv_tweak: Literal["0"]
    encryption: Literal["aes-xts-plain64"]
    sector_size: Literal[512, 4096]

    def __post_init__(self) -> None:
        _offset("offset", self.offset)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Segments:
    only: _Segment = dataclasses.field(metadata={"key": "0"})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """How the right volume key is told from a wrong one: PBKDF2-HMAC-SHA256 of it."""

    type: Literal["pbkdf2"]
    keyslots: tuple[str, ...]
    segments: tuple[Literal["0"], ...]
    hash: Literal["sha256"]
    iterations: int
    salt: str
    digest: str

    def __post_init__(self) -> None:
        _within("iterations", self.iterations, _DIGEST_ITERATIONS)
        _bytes("salt", self.salt, _SALT_BYTES)
        _bytes("digest", self.digest, *_DIGEST_BYTES)
        if len(self.segments) != 1:
            msg = "segments: does not name '0' alone: are its keyslots unbound?"
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Nothing:
    """An object without keys."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Config:
    json_size: Literal["12288"]
    keyslots_size: str

    def __post_init__(self) -> None:
        _offset("keyslots_size", self.keyslots_size)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole JSON area, checked."""

    keyslots: dict[str, Keyslot]
    tokens: _Nothing
    segments: _Segments
    digests: dict[str, Digest]
    config: _Config

    def __post_init__(self) -> None:
        if not 1 <= len(self.keyslots) <= _KEYSLOTS_MAX:
            msg = f"keyslots: {len(self.keyslots)}, not 1 to {_KEYSLOTS_MAX}"
            raise ValueError(msg)
        for path, names in (("keyslots", self.keyslots), ("digests", self.digests)):
            for name in names:
                if not _KEYSLOT_NUMBER.fullmatch(name):
                    msg = f"{path}: {name!r} is not a number from 0 to 31"
                    raise ValueError(msg)
        if len(self.digests) != 1:
            msg = f"digests: {len(self.digests)}, not 1"
            raise ValueError(msg)
        named = self.digest.keyslots
        if sorted(named) != sorted(self.keyslots):
            msg = f"digests: names keyslots {_list(named)}, there are {_list(self.keyslots)}"
            raise ValueError(msg)
        self._check_places()
        self._check_cost()

    def _check_cost(self) -> None:
        """Check what trying all keyslots may cost."""
        cost = sum(slot.kdf.cost for slot in self.keyslots.values())
        if cost > _COST_MAX:
            msg = (
                f"keyslots: together {cost:.1f} times what the costliest may cost, "
                f"at most {_COST_MAX:.1f}"
            )
            raise ValueError(msg)
        count, iterations = len(self.keyslots), self.digest.iterations
        if count * iterations > _DIGESTS_MAX:
            msg = (
                f"digests: {iterations} iterations for each of {count} keyslots, "
                f"at most {_DIGESTS_MAX} together"
            )
            raise ValueError(msg)

    def _check_places(self) -> None:
        """Check that header, areas and payload follow each other without overlap."""
        end = KEYSLOT_OFFSET
        for offset in sorted(slot.area_offset_bytes for slot in self.keyslots.values()):
            if offset < end:
                msg = f"keyslots: area at {offset} begins before {end}"
                raise ValueError(msg)
            end = offset + KEYSLOT_AREA_BYTES
        areas_end = KEYSLOT_OFFSET + int(self.config.keyslots_size)
        if end > areas_end:
            msg = (
                f"config.keyslots_size: areas end at {areas_end}, one of them at {end}"
            )
            raise ValueError(msg)
        if areas_end > self.payload_offset_bytes:
            msg = (
                f"segments.0.offset: payload at {self.payload_offset_bytes}, "
                f"before the end of the keyslot areas at {areas_end}"
            )
            raise ValueError(msg)

    @property
    def digest(self) -> Digest:
        """The digest, of which there is one."""
        return next(iter(self.digests.values()))

    @property
    def payload_offset_bytes(self) -> int:
        """Where the payload starts in the file."""
        return int(self.segments.only.offset)

    @property
    def sector_bytes(self) -> int:
        """Size of an encryption sector of the payload."""
        return self.segments.only.sector_size


def parse_document(area: bytes, *, source: str) -> Document:
    """Parse a JSON area: text, then NUL to its end.

    The text must be ASCII and what `cryptsetup` would write for its content: no space, no
    escape but those that are needed, no key twice, no number but whole ones.

    Raises: BadHeaderError, naming key path and value.
    """
    text = area.rstrip(b"\0")
    try:
        document: Any = json.loads(
            text.decode("ascii"),
            object_pairs_hook=_object,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
        canonical = json.dumps(document, separators=(",", ":")).encode() == text
    except (ValueError, RecursionError) as exc:
        reason = str(exc) if isinstance(exc, _ShapeError) else "not valid JSON"
        raise BadHeaderError(f"{source}: JSON area: {reason}", hint=_HINT) from exc
    if not canonical:
        text_ = f"{source}: JSON area: not written as cryptsetup writes it"
        raise BadHeaderError(text_, hint=_HINT)
    if isinstance(document, dict) and document.get("tokens"):
        hint = "remove them from a copy: cryptsetup token remove --token-id N IMAGE"
        raise BadHeaderError(f"{source}: JSON area: tokens: not empty", hint=hint)
    try:
        return decode(Document, document, source=source, error=BadHeaderError)
    except BadHeaderError as exc:
        raise BadHeaderError(exc.message, hint=exc.hint or _HINT) from exc


class _ShapeError(ValueError):
    """JSON that is valid but not ours; its text shows nothing of the input unescaped."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        msg = "a key stands twice in one object"
        raise _ShapeError(msg)
    longest = max(map(len, made), default=0)
    if longest > _KEY_MAX_CHARACTERS:
        msg = f"a key of {longest} characters"
        raise _ShapeError(msg)
    return made


def _no_number(text: str) -> NoReturn:
    msg = f"{text[:40]!r} is not a whole number"
    raise _ShapeError(msg)


def _within(name: str, value: int, bounds: tuple[int, int]) -> None:
    low, high = bounds
    if not low <= value <= high:
        msg = f"{name} {value} is not between {low} and {high}"
        raise ValueError(msg)


def _bytes(name: str, text: str, *sizes: int) -> None:
    """Check standard base64 of a size."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    if len(data) not in sizes or base64.b64encode(data).decode() != text:
        msg = f"{name} is not {sizes[0]} bytes in base64"
        raise ValueError(msg)


def _offset(name: str, text: str) -> None:
    """Check a 64-bit number, which LUKS2 writes as a string, and its alignment."""
    if not _NUMBER.fullmatch(text) or int(text) % _ALIGNMENT_BYTES:
        msg = f"{name} {text[:40]!r} is not a multiple of {_ALIGNMENT_BYTES}"
        raise ValueError(msg)


def _list(names: Any) -> str:
    return ", ".join(repr(str(name)[:8]) for name in list(names)[: _KEYSLOTS_MAX + 1])
