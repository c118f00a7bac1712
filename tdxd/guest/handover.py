"""The state that one program of the daemon hands to the next over an exec, and its encoding.

Plain values and descriptor numbers: nothing in it is secret, keys are not among it. It lives in
memory, between two programs of one process, and is no state file.

`FORMAT` must change when a field comes, goes or changes its meaning; the same holds for the
records from elsewhere in it (`VolumeConfig`, `MappedVolume` with its manifest, `Lease`,
`LastError`, `HandedChild`, `ImageFile`, `Model`): so no program is handed what it does not know.
Where all that came has a default the older format stays in `READABLE`, and an upgrade closes
nothing. A field named `fd` or `…_fd` is a descriptor that stays open, -1 is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final, Literal

import msgpack

from tdxd.core.config import VolumeConfig
from tdxd.core.decode import decode, plain, strict_map
from tdxd.core.plan import Failure, ServingState, VolumeState
from tdxd.errors import DataError, Retry, TdxdError
from tdxd.guest.last_error import LastError
from tdxd.guest.leased import Lease
from tdxd.host.content import Model
from tdxd.host.images import ImageFile
from tdxd.host.ports import HandedChild, MappedVolume

__all__ = [
    "FORMAT",
    "READABLE",
    "HandedDaemon",
    "HandedEvents",
    "HandedFailure",
    "HandedFront",
    "HandedListener",
    "HandedSecret",
    "HandedServer",
    "HandedServing",
    "HandedVolume",
    "ServedVolume",
    "State",
    "decode_state",
    "descriptors",
    "encode_state",
]

FORMAT: Final = 4
READABLE: Final = (2, 3, 4)
"""2 knew no foreign volumes, 3 no change of certificates within a running front."""
_MAX_BYTES = 64 * 2**20
_SOURCE = "handed over state"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedVolume:
    """Proof that a volume is mounted: what a model server may be started on."""

    volume_id: str
    generation: int
    mount_point: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedListener:
    """A listening socket; `address` as in the configuration, or the path of a Unix socket."""

    address: str
    fd: int

    def __post_init__(self) -> None:
        if self.fd < 0:
            msg = f"fd {self.fd} is no descriptor"
            raise ValueError(msg)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedFailure:
    """A `Failure` of `core.plan`; its error keeps what plan and status read of it."""

    code: str
    retry: str
    exit_code: int
    message: str
    hint: str
    attempts: int
    age_s: float
    left_s: float
    image_tag: tuple[int, ...] | None

    def __post_init__(self) -> None:
        Retry(self.retry)

    @classmethod
    def of(cls, failure: Failure, now_s: float) -> HandedFailure:
        """Make what is handed over of a failure."""
        error = failure.error
        return cls(
            code=error.code,
            retry=error.retry.value,
            exit_code=error.exit_code,
            message=error.message,
            hint=error.hint,
            attempts=failure.attempts,
            age_s=now_s - failure.since_s,
            left_s=failure.until_s - now_s,
            image_tag=failure.image_tag,
        )

    def failure(self, now_s: float) -> Failure:
        """Return the failure, on another clock."""
        traits = {
            "code": self.code,
            "retry": Retry(self.retry),
            "exit_code": self.exit_code,
        }
        kind: type[TdxdError] = type("HandedError", (TdxdError,), traits)
        return Failure(
            error=kind(self.message, hint=self.hint),
            attempts=self.attempts,
            since_s=now_s - self.age_s,
            until_s=now_s + self.left_s,
            image_tag=self.image_tag,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedVolume:
    """One volume as `VolumeReconciler` holds it. A key is not handed over.

    A failure that is likely to pass is not either: it is tried again at once. `newer_than` is the
    generation that it is to take over from, `opened` the image file as it was when it was opened.
    """

    spec: VolumeConfig
    wanted: bool
    leaving: bool
    state: str
    since: str
    image: str | None
    mapped: MappedVolume | None
    lease: Lease | None
    failure: HandedFailure | None
    read_before: int = 0
    last_error: LastError | None = None
    newer_than: int | None = None
    opened: ImageFile | None = None

    def __post_init__(self) -> None:
        VolumeState(self.state)

    @property
    def file(self) -> ImageFile | None:
        """The image file; of an older program, which told its path alone, like no other."""
        if self.opened is None and self.image is not None:
            return ImageFile(
                path=self.image, device=0, inode=0, size_bytes=0, mtime_ns=0
            )
        return self.opened


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedServer:
    """One model server. Times are relative, since trio's clock starts anew."""

    slot: str
    key: str
    volumes: tuple[ServedVolume, ...]
    models: tuple[Model, ...]
    child: HandedChild
    socket_path: str
    ready: bool
    drained: bool
    age_s: float
    drain_left_s: float | None
    lines: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedFront:
    """The front. Its certificate stays in its own memory. `active` is missing if it has no server.

    `sources` are where its certificates are from; none: an older program started it.
    """

    key: str
    active: str | None
    child: HandedChild
    admin_path: str
    lines: tuple[str, ...]
    served_key: bytes = b""
    sources: tuple[str, ...] = ()
    certificate_sha256: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedServing:
    """Serving: `wanted` is what the model servers were last meant to serve."""

    state: str
    since: str
    restarts: int
    wanted: tuple[ServedVolume, ...]
    servers: tuple[HandedServer, ...]
    front: HandedFront | None
    listener: HandedListener | None
    rest_listener: HandedListener | None = None

    def __post_init__(self) -> None:
        ServingState(self.state)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedSecret:
    """One named secret: its content is in sealed memory, `fd`, which is -1 if there is none now.

    `generation` and `sha256` (hex, of the content) are of the newest that ever came.
    """

    secret_id: str
    generation: int
    content: str
    sha256: str
    since: str
    fd: int
    lease: Lease | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedEvents:
    """How many events there were, and the kept ones, as msgpack: each has fields of its own."""

    count: int
    kept: bytes

    def __post_init__(self) -> None:
        self.items()

    def items(self) -> list[dict[str, object]]:
        """Return the kept events.

        Raises: ValueError.
        """
        items = msgpack.unpackb(self.kept, raw=False)
        if not isinstance(items, list) or not all(map(_is_event, items)):
            msg = "kept is not a list of events"
            raise ValueError(msg)
        return items


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandedDaemon:
    """What `Daemon` holds. `reexecs` counts how often its program was replaced before."""

    version: str
    reexecs: int
    started: str
    volumes: tuple[HandedVolume, ...]
    serving: HandedServing
    events: HandedEvents
    secrets: tuple[HandedSecret, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Everything. `control` is missing where systemd made the socket: it hands it over itself.

    `mount_namespace` is the inode number of the private namespace, `mapper` what opened the
    volumes: state of another one, or of another runtime directory, cannot be adopted.
    """

    format: Literal[2, 3, 4] = FORMAT
    runtime_dir: str
    mount_namespace: int
    mapper: str
    control: HandedListener | None
    health: HandedListener | None
    evidence: HandedListener | None = None
    daemon: HandedDaemon


def _is_event(item: object) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("seq"), int)
        and {"time", "level", "event"} <= item.keys()
    )


def encode_state(state: State) -> bytes:
    """Encode as msgpack."""
    encoded: bytes = msgpack.packb(plain(state), use_bin_type=True)
    return encoded


def decode_state(data: bytes) -> State:
    """Decode what `encode_state` made, in this version of the program or another.

    Raises: DataError, for another format first.
    """
    value = strict_map(data, source=_SOURCE, max_bytes=_MAX_BYTES)
    found = value.get("format") if isinstance(value, dict) else None
    if found not in READABLE:
        known = ", ".join(map(str, READABLE))
        raise DataError(f"{_SOURCE}: format {found!r}, this program knows {known}")
    return decode(State, value, source=_SOURCE, error=DataError)


def descriptors(value: object) -> Iterator[int]:
    """Yield every descriptor that a record names, however deep."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            inner = getattr(value, field.name)
            if field.name == "fd" or field.name.endswith("_fd"):
                if inner >= 0:
                    yield inner
            else:
                yield from descriptors(inner)
    elif isinstance(value, tuple):
        for item in value:
            yield from descriptors(item)
