"""Checkpoints: what a store held at one moment, signed, to be kept where the store is not.

Whoever can put back the whole database, its key file included, can put back everything that is in
it; a newer checkpoint elsewhere shows that. Canonical msgpack: a map of `body`, `key` (the raw
Ed25519 public key) and `signature` over LP("tdxd/checkpoint/v1") || LP(body). The body is canonical
msgpack, too: a map with the keys of `Checkpoint`.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from tdxd.core.decode import decode, decode_canonical, encode_canonical, plain
from tdxd.core.keyrelease import encode_lp
from tdxd.core.showing import when
from tdxd.errors import DataError
from tdxd.owner.store.seal import Seal
from tdxd.owner.store.state import State

__all__ = ["CHECKPOINT_MAX_BYTES", "Checkpoint", "VolumeMark", "read_checkpoint"]

CHECKPOINT_MAX_BYTES = 64 * 1024 * 1024
_LABEL = encode_lp(b"tdxd/checkpoint/v1")
_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VolumeMark:
    """The current generation of a volume (0: all are removed), its policy's version (0: none)."""

    generation: int
    policy_version: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The store's seal, and what it says in words; `deployment` is 16 bytes."""

    deployment: bytes
    floors: dict[str, int]
    head: bytes
    made_at_s: int
    revision: int
    seq: int
    state_sha256: bytes
    version: int = _VERSION
    volumes: dict[str, VolumeMark]

    @classmethod
    def of(
        cls,
        seal: Seal,
        state: State,
        *,
        deployment: bytes,
        now_s: int,
    ) -> Self:
        """Make the checkpoint of a store."""
        ids = {*state.policies, *state.generations}
        return cls(
            deployment=deployment,
            floors=dict(state.floors),
            head=seal.head,
            made_at_s=now_s,
            revision=seal.revision,
            seq=seal.seq,
            state_sha256=seal.state_sha256,
            volumes={
                name: VolumeMark(
                    generation=state.current(name),
                    policy_version=state.policy_version(name),
                )
                for name in ids
            },
        )

    @property
    def made_at(self) -> str:
        """The time in ISO 8601, UTC."""
        return when(self.made_at_s)

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """Return the signed bytes: what is exported."""
        body = encode_canonical(plain(self))
        return encode_canonical(
            {
                "body": body,
                "key": key.public_key().public_bytes_raw(),
                "signature": key.sign(_LABEL + encode_lp(body)),
            }
        )


def read_checkpoint(data: bytes, keys: Sequence[bytes], *, source: str) -> Checkpoint:
    """Read a checkpoint that one of the raw Ed25519 public keys signed.

    Raises: DataError.
    """
    outer = decode_canonical(data, source=source, max_bytes=CHECKPOINT_MAX_BYTES)
    fields = cast("Mapping[str, Any]", outer if isinstance(outer, Mapping) else {})
    body, key, signature = (fields.get(name) for name in ("body", "key", "signature"))
    if not (
        isinstance(body, bytes)
        and isinstance(key, bytes)
        and isinstance(signature, bytes)
        and set(fields) == {"body", "key", "signature"}
    ):
        raise DataError(f"{source} is no checkpoint")
    if key not in keys:
        shown = base64.b64encode(key).decode()
        raise DataError(
            f"{source} is signed by the unknown key ed25519:{shown}",
            hint="is it the checkpoint of another key server? --signing-key names its key",
        )
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(
            signature, _LABEL + encode_lp(body)
        )
    except (InvalidSignature, ValueError) as exc:
        raise DataError(f"{source}: the signature is wrong") from exc
    plain_body = decode_canonical(body, source=source, max_bytes=CHECKPOINT_MAX_BYTES)
    found = decode(Checkpoint, plain_body, source=source, error=DataError)
    if found.version != _VERSION:
        raise DataError(f"{source} has version {found.version}, not {_VERSION}")
    return found
