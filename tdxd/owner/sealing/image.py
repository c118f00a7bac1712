"""Makes a sealed image of a plaintext file system, as any user.

Two passes over a plaintext temporary file that has no name: the key depends on the root hash, so
the tree comes first. Nothing appears under a final name before it is whole.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from tdxd.core import luks2, verity
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, Manifest, derive, volume_key
from tdxd.core.sealed import PublicRecord
from tdxd.core.secret import Secret
from tdxd.errors import DataError, HostError
from tdxd.host.range_worker import Task
from tdxd.host.workers import Workers
from tdxd.owner.sealing.outputs import Outputs, unnamed_file
from tdxd.owner.sealing.survey import check_space

__all__ = [
    "ImageRequest",
    "Progress",
    "Sealed",
    "derived",
    "make_image",
    "record_beside",
]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""

_COPY_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest:
    """What to make, and where. `created` is RFC 3339 text for the public record.

    `image` may be a block device: `force` overwrites it, and `record` must be given.
    """

    volume_id: str
    generation: int
    image: Path
    bundle: Path
    secret: Secret
    recovery: Path | None = None
    record: Path | None = None
    force: bool = False
    created: str | None = None

    @property
    def record_path(self) -> Path:
        """Where the public record goes: beside the image, unless told otherwise."""
        return self.record or record_beside(self.image)

    @property
    def staging(self) -> Path:
        """The directory of the plaintext temporary file."""
        on_device = self.image.is_block_device()
        return self.bundle.parent if on_device else self.image.parent


def record_beside(image: Path) -> Path:
    """Return the path of the public record that lies beside an image."""
    return image.with_name(image.name + ".json")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What was made."""

    bundle: KeyBundle
    record: PublicRecord


def make_image(
    request: ImageRequest,
    size_bytes: int,
    fill: Callable[[int], None],
    progress: Progress,
) -> Sealed:
    """Make the image, its public record, the bundle, the recovery passphrase.

    `fill` writes the file system, of about `size_bytes`, into the descriptor that it is given.

    Raises: DataError, HostError, and what `fill` raises; nothing is left under a final name.
    """
    with Outputs(force=request.force) as outputs:
        # The image is named last: whoever sees it finds the others beside it.
        passphrase = -1
        if request.recovery is not None:
            passphrase = outputs.reserve(request.recovery, mode=0o600)
        bundle_fd = outputs.reserve(request.bundle, mode=0o600)
        record_fd = outputs.reserve(request.record_path, mode=0o644)
        image = outputs.reserve(request.image, mode=0o644)
        copies = 1 if request.image.is_block_device() else 2
        check_space(request.staging, copies * size_bytes)
        bundle, digest = _seal(request, image, fill, progress)
        record = _describe(request, bundle, digest)
        _write(request.bundle, bundle_fd, bundle.encode())
        _write(request.record_path, record_fd, record.encode())
        if request.recovery is not None:
            with luks2.recovery_passphrase(bundle) as text:
                _write(request.recovery, passphrase, text.reveal() + b"\n")
    return Sealed(bundle=bundle, record=record)


def _seal(
    request: ImageRequest, image: int, fill: Callable[[int], None], progress: Progress
) -> tuple[KeyBundle, str]:
    """Fill the image by way of a plaintext file; return the bundle and the image's SHA-256."""
    count, name = len(os.sched_getaffinity(0)), str(request.image)
    with (
        unnamed_file(request.staging) as plain,
        Workers(count, fds=(plain, image), what=name) as workers,
    ):
        # The workers load their libraries meanwhile.
        fill(plain)
        bundle = _build_tree(request, plain, workers, progress)
        digest = _encrypt(request, bundle, plain, image, workers, progress)
    return bundle, digest


def _write(path: Path, fd: int, data: bytes) -> None:
    try:
        os.write(fd, data)
    except OSError as exc:
        raise HostError.of("write", str(path), exc) from exc


def _build_tree(
    request: ImageRequest, plain: int, workers: Workers, progress: Progress
) -> KeyBundle:
    """Write the hash tree behind the file system; return the bundle with its root hash."""
    data_blocks = os.fstat(plain).st_size // BLOCK_BYTES
    geometry = verity.geometry(data_blocks)
    salt = derived(request, "verity-salt", 32)
    progress("hash tree", 0, data_blocks * BLOCK_BYTES)
    for level in reversed(geometry.levels):
        task = Task(
            op="hash",
            in_fd=plain,
            in_base=level.covered_first_block * BLOCK_BYTES,
            out_fd=plain,
            out_base=level.first_block * BLOCK_BYTES,
            salt=salt,
        )
        counter = _Counter("hash tree", level.covered_blocks, progress)
        workers.run(task, blocks=level.covered_blocks, done=counter)
    top_block = geometry.levels[0].first_block if geometry.levels else 0
    top = os.pread(plain, BLOCK_BYTES, top_block * BLOCK_BYTES)
    manifest = Manifest(
        volume_id=request.volume_id,
        generation=request.generation,
        payload_offset_bytes=luks2.PAYLOAD_OFFSET_BYTES,
        data_blocks=data_blocks,
        hash_blocks=geometry.hash_blocks,
        root_hash=verity.block_digest(salt, top),
        salt=salt,
    )
    return KeyBundle(manifest=manifest, secret=request.secret)


class _Counter:
    """Adds up finished ranges and shows them."""

    def __init__(self, step: str, blocks: int, progress: Progress) -> None:
        self._step, self._whole, self._progress = step, blocks * BLOCK_BYTES, progress
        self._done = 0

    def __call__(self, _first: int, blocks: int) -> None:
        self._done += blocks * BLOCK_BYTES
        self._progress(self._step, self._done, self._whole)


def _encrypt(
    request: ImageRequest,
    bundle: KeyBundle,
    plain: int,
    image: int,
    workers: Workers,
    progress: Progress,
) -> str:
    """Write header and payload; return the SHA-256 of the whole file, in hex."""
    manifest = bundle.manifest
    blocks = manifest.data_blocks + manifest.hash_blocks
    digest = _FileDigest(image, manifest, _Counter("encrypt", blocks, progress))
    header = luks2.build_header(bundle, recovery=request.recovery is not None)
    try:
        _make_room(request.image, image, manifest.image_bytes)
        os.pwrite(image, header, 0)
        with volume_key(bundle) as key:
            task = Task(
                op="encrypt",
                in_fd=plain,
                in_base=0,
                out_fd=image,
                out_base=manifest.payload_offset_bytes,
                key=key.reveal(),
            )
            workers.run(task, blocks=blocks, done=digest.add)
    except OSError as exc:
        raise HostError.of("write", str(request.image), exc) from exc
    return digest.finish()


def _make_room(path: Path, fd: int, size_bytes: int) -> None:
    """Set the size of a file; on a block device, wipe what stands before the payload."""
    if not path.is_block_device():
        os.truncate(fd, size_bytes)
        return
    room = os.lseek(fd, 0, os.SEEK_END)
    if room < size_bytes:
        raise DataError(f"{path} has {room} bytes, the image needs {size_bytes}")
    for start in range(0, luks2.PAYLOAD_OFFSET_BYTES, _COPY_BYTES):
        os.pwrite(fd, bytes(_COPY_BYTES), start)


class _FileDigest:
    """SHA-256 of the image, taken while the workers write it, as far as it has no gap."""

    def __init__(self, fd: int, manifest: Manifest, counter: _Counter) -> None:
        self._fd, self._manifest, self._counter = fd, manifest, counter
        self._state = hashlib.sha256()
        self._ready: dict[int, int] = {}
        self._next_block = 0
        self._hashed_bytes = 0

    def add(self, first: int, blocks: int) -> None:
        """Take note of a written range, and hash what lies before the first gap."""
        self._ready[first] = blocks
        while (more := self._ready.pop(self._next_block, None)) is not None:
            self._next_block += more
        end = self._manifest.payload_offset_bytes + self._next_block * BLOCK_BYTES
        while self._hashed_bytes < end:
            size = min(_COPY_BYTES, end - self._hashed_bytes)
            self._state.update(os.pread(self._fd, size, self._hashed_bytes))
            self._hashed_bytes += size
        self._counter(first, blocks)

    def finish(self) -> str:
        """Return the digest in hex; every range must have been added."""
        assert self._hashed_bytes == self._manifest.image_bytes
        return self._state.hexdigest()


def _describe(request: ImageRequest, bundle: KeyBundle, digest: str) -> PublicRecord:
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return PublicRecord(
        id=bundle.manifest.volume_id,
        generation=bundle.manifest.generation,
        size_bytes=bundle.manifest.image_bytes,
        sha256=digest,
        created=request.created or now,
    )


def derived(request: ImageRequest, label: str, size: int) -> bytes:
    """Derive what would otherwise be random from the secret, id and generation."""
    context = (request.volume_id.encode(), request.generation.to_bytes(8, "big"))
    with derive(request.secret, f"tdxd/seal/{label}/v1", size, *context) as made:
        return made.reveal()
