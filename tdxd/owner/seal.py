"""Seals a directory into an encrypted image, as any user.

Two passes over a plaintext temporary file that has no name: the key depends on the root hash, so
the tree comes first. Nothing appears under a final name before it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tdxd.core import erofs, luks2, verity
from tdxd.core.bundle import BLOCK_BYTES, KeyBundle, Manifest, derive, volume_key
from tdxd.core.sealed import PublicRecord
from tdxd.core.secret import Secret
from tdxd.errors import DataError, HostError
from tdxd.host.range_worker import Task
from tdxd.host.workers import Workers
from tdxd.owner import survey

__all__ = ["SealRequest", "Sealed", "seal_directory"]

Progress = Callable[[str, int, int], None]
"""Called with what is being done, bytes done and bytes in all."""

_COPY_BYTES = 1024 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SealRequest:
    """What to seal, and where to. `created` is RFC 3339 text for the public record."""

    directory: Path
    volume_id: str
    generation: int
    image: Path
    bundle: Path
    secret: Secret
    recovery: Path | None = None
    force: bool = False
    created: str | None = None

    @property
    def record(self) -> Path:
        """The public record beside the image."""
        return self.image.with_name(self.image.name + ".json")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What was made."""

    bundle: KeyBundle
    record: PublicRecord


def seal_directory(request: SealRequest, progress: Progress) -> Sealed:
    """Seal a directory: the image, its public record, the bundle, the recovery passphrase.

    Raises: DataError for a directory that cannot be sealed, HostError for the disk; nothing
    is left under a final name.
    """
    _refuse_existing(request)
    size_bytes = survey.survey(request.directory)
    survey.check_space(request.image.parent, 2 * size_bytes)
    with _unnamed(request.image.parent) as plain, _unnamed(request.image.parent) as out:
        progress("file system", 0, size_bytes)
        _make_file_system(request, plain)
        count, name = os.cpu_count() or 1, str(request.image)
        with Workers(count, fds=(plain, out), what=name) as workers:
            bundle = _build_tree(request, plain, workers, progress)
            _encrypt(request, bundle, plain, out, workers, progress)
        record = _describe(request, bundle, out, progress)
        _write_file(request, request.bundle, bundle.encode(), 0o600)
        if request.recovery is not None:
            with luks2.recovery_passphrase(bundle) as passphrase:
                _write_file(
                    request, request.recovery, passphrase.reveal() + b"\n", 0o600
                )
        _write_file(request, request.record, record.encode(), 0o644)
        _give_name(out, request.image, force=request.force)
    return Sealed(bundle=bundle, record=record)


def _refuse_existing(request: SealRequest) -> None:
    targets = [request.image, request.bundle, request.record, request.recovery]
    for path in targets:
        if path is not None and path.exists() and not request.force:
            hint = "name another, or overwrite with --force"
            raise DataError(f"{path} exists already", hint=hint)


@contextlib.contextmanager
def _unnamed(directory: Path) -> Iterator[int]:
    """Open a file without a name: an interrupted run leaves nothing.

    Raises: HostError.
    """
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        hint = "the output directory must exist and take temporary files (O_TMPFILE)"
        raise HostError.of("make a file in", str(directory), exc, hint=hint) from exc
    try:
        yield fd
    finally:
        os.close(fd)


def _make_file_system(request: SealRequest, plain: int) -> None:
    """Run mkfs.erofs into `plain`, then set the modes that it cannot."""
    uuid_bytes = _derived(request, "fs-uuid", 16)
    text = uuid_bytes.hex()
    uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    target = f"/proc/self/fd/{plain}"
    options = ("-x-1", "-T0", f"-U{uuid}", "--all-root", "--quiet")
    command = ["mkfs.erofs", *options, target, str(request.directory)]
    try:
        made = subprocess.run(
            command, pass_fds=(plain,), capture_output=True, check=False
        )
    except FileNotFoundError as exc:
        hint = "install erofs-utils"
        raise HostError("run", "mkfs.erofs", exc.errno or 0, hint=hint) from exc
    if made.returncode != 0:
        said = made.stderr.decode(errors="replace").strip()[-300:]
        raise DataError(f"mkfs.erofs failed on {request.directory}: {said}")
    os.ftruncate(plain, -(-os.fstat(plain).st_size // BLOCK_BYTES) * BLOCK_BYTES)

    def read(offset: int, size: int) -> bytes:
        return os.pread(plain, size, offset)

    for offset, data in erofs.normalised_modes(read):
        os.pwrite(plain, data, offset)
    patch = erofs.superblock_checksum(read(0, BLOCK_BYTES))
    if patch is not None:
        os.pwrite(plain, patch[1], patch[0])


def _build_tree(
    request: SealRequest, plain: int, workers: Workers, progress: Progress
) -> KeyBundle:
    """Write the hash tree behind the file system; return the bundle with its root hash."""
    data_blocks = os.fstat(plain).st_size // BLOCK_BYTES
    geometry = verity.geometry(data_blocks)
    salt = _derived(request, "verity-salt", 32)
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
    request: SealRequest,
    bundle: KeyBundle,
    plain: int,
    out: int,
    workers: Workers,
    progress: Progress,
) -> None:
    """Write header and payload, down to the disk."""
    manifest = bundle.manifest
    header = luks2.build_header(bundle, recovery=request.recovery is not None)
    blocks = manifest.data_blocks + manifest.hash_blocks
    try:
        os.posix_fallocate(out, 0, manifest.image_bytes)
        os.pwrite(out, header, 0)
        with volume_key(bundle) as key:
            task = Task(
                op="encrypt",
                in_fd=plain,
                in_base=0,
                out_fd=out,
                out_base=manifest.payload_offset_bytes,
                key=key.reveal(),
            )
            workers.run(task, blocks=blocks, done=_Counter("encrypt", blocks, progress))
        os.fsync(out)
    except OSError as exc:
        raise HostError.of("write", str(request.image), exc) from exc


def _describe(
    request: SealRequest, bundle: KeyBundle, out: int, progress: Progress
) -> PublicRecord:
    manifest = bundle.manifest
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    return PublicRecord(
        id=manifest.volume_id,
        generation=manifest.generation,
        size_bytes=manifest.image_bytes,
        sha256=_sha256(out, manifest.image_bytes, progress),
        created=request.created or now,
    )


def _sha256(fd: int, size_bytes: int, progress: Progress) -> str:
    state = hashlib.sha256()
    for offset in range(0, size_bytes, _COPY_BYTES):
        state.update(os.pread(fd, min(_COPY_BYTES, size_bytes - offset), offset))
        progress("checksum", min(offset + _COPY_BYTES, size_bytes), size_bytes)
    return state.hexdigest()


def _write_file(request: SealRequest, path: Path, data: bytes, mode: int) -> None:
    """Write a small file so that it appears whole."""
    with _unnamed(path.parent) as fd:
        os.write(fd, data)
        os.fchmod(fd, mode)
        os.fsync(fd)
        _give_name(fd, path, force=request.force)


def _give_name(fd: int, path: Path, *, force: bool) -> None:
    """Link an unnamed file to its final name; over an old file by way of a new name.

    Raises: HostError.
    """
    name = f".{path.name}.{os.getpid()}.new" if force else path.name
    try:
        parent = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # With a directory descriptor Python calls linkat(AT_SYMLINK_FOLLOW), as open(2)
            # wants it for files made with O_TMPFILE.
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=parent)
            if force:
                os.replace(name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        finally:
            os.close(parent)
    except OSError as exc:
        raise HostError.of("create", str(path), exc) from exc


def _derived(request: SealRequest, label: str, size: int) -> bytes:
    context = (request.volume_id.encode(), request.generation.to_bytes(8, "big"))
    with derive(request.secret, f"tdxd/seal/{label}/v1", size, *context) as made:
        return made.reveal()
