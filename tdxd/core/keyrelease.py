"""The key release protocol as pure functions: what is hashed, sealed and signed, byte by byte.

Nothing here does I/O, reads a clock or draws randomness: keys, nonces and times are passed in.
The encodings stand in docs/protocol.md; the messages themselves in proto/keyrelease.proto.
LP(x) is x after its length as 4 bytes big-endian; a list is its count, then LP of each item.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import hashlib
from collections.abc import Sequence

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from tdxd.core.decode import decode, decode_canonical, encode_canonical
from tdxd.core.volume_id import GENERATIONS_MAX, check_volume_id
from tdxd.errors import DataError, ProtocolError, RemoteProtocolError, TdxdError

__all__ = [
    "ANSWER_MAX_BYTES",
    "CHALLENGE_PATH",
    "CLOCK_KEY",
    "LEASE_MAX_S",
    "NONCE_BYTES",
    "PASSING_REASONS",
    "RELEASE_PATH",
    "REQUEST_MAX_BYTES",
    "SIGNATURE_BYTES",
    "TOKEN_BYTES",
    "TOKEN_KEY_BYTES",
    "TOKEN_LIFETIME_MAX_S",
    "Evidence",
    "Released",
    "Status",
    "TokenClaims",
    "VerdictFields",
    "answer_bytes",
    "check_evidence",
    "decode_token",
    "encode_list",
    "encode_lp",
    "encode_released",
    "encode_token",
    "log_digest",
    "parse_released",
    "report_data",
    "sealed_info",
    "sign_answer",
    "signed_by",
    "signing_key_id",
    "token_key_id",
    "transcript_hash",
]

CHALLENGE_PATH = "/tdxd.keyrelease.v1.KeyRelease/Challenge"
RELEASE_PATH = "/tdxd.keyrelease.v1.KeyRelease/Release"
CLOCK_KEY = "tdxd-time"
"""Trailing metadata of a challenge: the server's clock, unix seconds, for `doctor` alone."""

QUOTE_MAX_BYTES = 16 * 1024
"""libtdx_attest caps its answers at 16 KiB; real quotes have about 5 KiB."""
EVENT_LOG_MAX_BYTES = 1024 * 1024
RUNTIME_LOG_MAX_BYTES = 256 * 1024
VOLUMES_MAX = 64
REQUEST_MAX_BYTES = 1_400_000
"""Cap of one encoded request: the sum of the caps of its fields, rounded up."""
ANSWER_MAX_BYTES = 5 * 1024 * 1024
"""Room for a named secret of the largest size for each id."""

NONCE_BYTES = 32
SIGNATURE_BYTES = 64
TOKEN_KEY_BYTES = 32
TOKEN_LIFETIME_MAX_S = 120
_KEY_ID_BYTES = 8
_IV_BYTES = 12
_DEPLOYMENT_BYTES = 16
_TOKEN_PLAIN_BYTES = NONCE_BYTES + 8 + _DEPLOYMENT_BYTES
TOKEN_BYTES = _KEY_ID_BYTES + _IV_BYTES + _TOKEN_PLAIN_BYTES + 16

LEASE_MAX_S = 30 * 86400
_RELEASED_MAX_BYTES = 72 * 1024
"""A named secret of 64 KiB with its manifest, or the bundles of all generations of a volume."""

_REPORT_DATA_LABEL = b"tdxd/key-release/v1"
_ANSWER_LABEL = b"tdxd/key-release-answer/v1"
_TOKEN_LABEL = b"tdxd/token/v1"


def encode_lp(data: bytes) -> bytes:
    """Put the length, 4 bytes big-endian, in front of some bytes."""
    return len(data).to_bytes(4, "big") + data


def encode_list(items: Sequence[str]) -> bytes:
    """Encode ids: their count, 4 bytes big-endian, then LP of each."""
    return len(items).to_bytes(4, "big") + b"".join(
        encode_lp(item.encode()) for item in items
    )


def transcript_hash(request: bytes) -> bytes:
    """Return the SHA-384 of an encoded `ReleaseRequest` exactly as sent: 48 bytes."""
    return hashlib.sha384(request).digest()


# --- evidence -----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """The fields of a `ReleaseRequest`."""

    token: bytes
    public_key: bytes
    volume_ids: tuple[str, ...]
    quote: bytes
    event_log: bytes
    runtime_log: bytes


def check_evidence(
    evidence: Evidence, *, error: type[ProtocolError] = RemoteProtocolError
) -> None:
    """Check sizes, and that the ids are well formed, unique and sorted bytewise.

    The size of the public key is checked where it is parsed (`core.hpke`).

    Raises: `error`, naming the field and the size.
    """
    ids = evidence.volume_ids
    if len(evidence.token) != TOKEN_BYTES:
        raise error(f"token has {len(evidence.token)} bytes, not {TOKEN_BYTES}")
    for name, data, cap in (
        ("quote", evidence.quote, QUOTE_MAX_BYTES),
        ("event log", evidence.event_log, EVENT_LOG_MAX_BYTES),
        ("runtime log", evidence.runtime_log, RUNTIME_LOG_MAX_BYTES),
    ):
        if len(data) > cap:
            raise error(f"{name} has {len(data)} bytes, more than {cap}")
    if not 1 <= len(ids) <= VOLUMES_MAX:
        raise error(f"{len(ids)} volume ids, not 1 to {VOLUMES_MAX}")
    try:
        for volume_id in ids:
            check_volume_id(volume_id)
    except ValueError as exc:
        raise error(str(exc)) from exc
    if list(ids) != sorted(set(ids), key=str.encode):
        raise error("volume ids are not unique and sorted bytewise")


def signing_key_id(raw_public_key: bytes) -> bytes:
    """Return the SHA-256 of a raw Ed25519 public key: 32 bytes."""
    return hashlib.sha256(raw_public_key).digest()


def report_data(
    *,
    token: bytes,
    public_key: bytes,
    volume_ids: Sequence[str],
    signing_key_sha256: bytes,
    event_log: bytes,
    runtime_log: bytes,
) -> bytes:
    """Return the 64 bytes that a quote must carry: all of a request but the quote itself."""
    return hashlib.sha512(
        encode_lp(_REPORT_DATA_LABEL)
        + encode_lp(token)
        + encode_lp(public_key)
        + encode_list(volume_ids)
        + encode_lp(signing_key_sha256)
        + encode_lp(log_digest(event_log))
        + encode_lp(log_digest(runtime_log))
    ).digest()


@functools.lru_cache(maxsize=4)
def log_digest(log: bytes) -> bytes:
    """Return the SHA-384 of a log: 48 bytes. Kept: guests of one image all send the same log."""
    return hashlib.sha384(log).digest()


# --- challenge tokens ---------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TokenClaims:
    """What a token says to the server that made it, or to any replica of it.

    `nonce` has 32 bytes, `deployment` 16; `expiry_s` is unix time on the server's clock.
    """

    nonce: bytes
    expiry_s: int
    deployment: bytes


def token_key_id(key: bytes) -> bytes:
    """Return the 8 bytes by which a token names its key."""
    return hashlib.sha256(encode_lp(_TOKEN_LABEL) + key).digest()[:_KEY_ID_BYTES]


def encode_token(claims: TokenClaims, *, key: bytes, iv: bytes) -> bytes:
    """Seal a token: key id (8, in clear) || IV (12) || AES-256-GCM of 56 bytes || tag (16).

    The plaintext is nonce (32) || expiry (8, big-endian) || deployment (16); label and key id
    are the associated data. `iv` must never repeat under one key: 12 random bytes.
    """
    key_id = token_key_id(key)
    plain = claims.nonce + claims.expiry_s.to_bytes(8, "big") + claims.deployment
    assert len(plain) == _TOKEN_PLAIN_BYTES
    assert len(iv) == _IV_BYTES
    sealed = AESGCM(key).encrypt(iv, plain, encode_lp(_TOKEN_LABEL) + key_id)
    return key_id + iv + sealed


def decode_token(token: bytes, *, keys: Sequence[bytes]) -> TokenClaims:
    """Open a token that one of `keys` sealed; says nothing about its expiry or deployment.

    Raises: RemoteProtocolError.
    """
    if len(token) != TOKEN_BYTES:
        raise RemoteProtocolError(f"token has {len(token)} bytes, not {TOKEN_BYTES}")
    key_id, iv = token[:_KEY_ID_BYTES], token[_KEY_ID_BYTES:][:_IV_BYTES]
    key = next((item for item in keys if token_key_id(item) == key_id), None)
    if key is None:
        raise RemoteProtocolError(f"token names the unknown key {key_id.hex()}")
    sealed = token[_KEY_ID_BYTES + _IV_BYTES :]
    try:
        plain = AESGCM(key).decrypt(iv, sealed, encode_lp(_TOKEN_LABEL) + key_id)
    except InvalidTag as exc:
        raise RemoteProtocolError("token is not one of this deployment's") from exc
    return TokenClaims(
        nonce=plain[:NONCE_BYTES],
        expiry_s=int.from_bytes(plain[NONCE_BYTES:][:8], "big"),
        deployment=plain[NONCE_BYTES + 8 :],
    )


# --- what is sealed -----------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Released:
    """What the HPKE ciphertext of a verdict holds; the bundles in it are secret.

    After `lease_s` seconds without another release the guest closes the volume; 0: it never has to.
    `older` are the bundles of older generations that may be served, too, newest first.
    """

    bundle: bytes
    lease_s: int
    older: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if len(self.older) >= GENERATIONS_MAX:
            raise ValueError(f"older has {len(self.older)} bundles")
        if not 0 <= self.lease_s <= LEASE_MAX_S:
            raise ValueError(f"lease_s {self.lease_s} is not 0 to {LEASE_MAX_S}")


def encode_released(bundle: bytes, lease_s: int, older: Sequence[bytes] = ()) -> bytes:
    """Encode encoded bundles and their lease as canonical msgpack; the result is secret.

    Without older ones their key is left out.
    """
    assert 0 <= lease_s <= LEASE_MAX_S
    assert len(older) < GENERATIONS_MAX
    fields: dict[str, object] = {"bundle": bundle, "lease_s": lease_s}
    return encode_canonical({**fields, "older": list(older)} if older else fields)


def parse_released(plain: bytes, *, error: type[TdxdError]) -> Released:
    """Decode what `encode_released` made, at most 72 KiB.

    Raises: `error`; no message shows a byte of the bundle.
    """
    source = "released bundle"
    # The decoder's text, and so its traceback, may show what a field holds: it is dropped.
    with contextlib.suppress(DataError):
        value = decode_canonical(plain, source=source, max_bytes=_RELEASED_MAX_BYTES)
        found = decode(Released, value, source=source, error=DataError)
        one_form = encode_released(found.bundle, found.lease_s, found.older)
        if one_form == plain:  # it is not where an empty list stands for none
            return found
    hint = "do guest and key server have the same version?"
    text = "what the key server sealed is not a bundle and its lease"
    raise error(text, hint=hint)


# --- the answer ---------------------------------------------------------------


class Status(enum.IntEnum):
    """The verdict on one volume; the numbers of the enum in keyrelease.proto."""

    RELEASED = 1
    DENIED = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VerdictFields:
    """The signed part of one verdict."""

    volume_id: str
    generation: int
    status: int
    sealed_bundle: bytes


PASSING_REASONS = frozenset({"token-expired", "collateral-unavailable", "quota"})
"""Reasons of a denial that pass by themselves: tried again after a backoff, with a new challenge.

Reasons are not signed, so a relay can turn one kind of denial into the other; that decides only
when the guest asks again.
"""


def sealed_info(request_sha384: bytes, volume_id: str, generation: int) -> bytes:
    """Return the HPKE info of one bundle: SHA-384(request) || LP(id) || generation (8)."""
    return (
        request_sha384 + encode_lp(volume_id.encode()) + generation.to_bytes(8, "big")
    )


def answer_bytes(request_sha384: bytes, verdicts: Sequence[VerdictFields]) -> bytes:
    """Return what the server signs.

    LP(label) || SHA-384(request) || for each verdict LP(id), generation (8 bytes big-endian),
    status (1 byte), LP(sealed bundle). The number of verdicts is that of the request's ids.
    """
    return (
        encode_lp(_ANSWER_LABEL)
        + request_sha384
        + b"".join(
            encode_lp(item.volume_id.encode())
            + item.generation.to_bytes(8, "big")
            + item.status.to_bytes(1, "big")
            + encode_lp(item.sealed_bundle)
            for item in verdicts
        )
    )


def sign_answer(
    key: Ed25519PrivateKey, request_sha384: bytes, verdicts: Sequence[VerdictFields]
) -> bytes:
    """Sign an answer: Ed25519 (RFC 8032), 64 bytes."""
    return key.sign(answer_bytes(request_sha384, verdicts))


def signed_by(
    pins: Sequence[bytes],
    signature: bytes,
    request_sha384: bytes,
    verdicts: Sequence[VerdictFields],
) -> bytes | None:
    """Return the raw public key among `pins` that signed the answer, or None."""
    message = answer_bytes(request_sha384, verdicts)
    for pin in pins:
        try:
            Ed25519PublicKey.from_public_bytes(pin).verify(signature, message)
        except InvalidSignature:
            continue
        return pin
    return None
