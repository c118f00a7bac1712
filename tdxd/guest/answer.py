"""Takes the key server's two answers apart; nothing here is believed before its signature is."""

from __future__ import annotations

import dataclasses

from tdxd.core import keyrelease as protocol
from tdxd.core.showing import shown
from tdxd.errors import RemoteProtocolError

__all__ = ["Answer", "Challenge", "Verdict", "parse_answer", "parse_challenge"]

_TEXT_MAX = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """A token, and the SHA-256 of the raw key with which this server says it signs."""

    token: bytes
    signing_key_sha256: bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One verdict; `denial_id`, `reason` and `hint` are not covered by the signature."""

    signed: protocol.VerdictFields
    denial_id: str
    reason: str
    hint: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The verdicts and the signature over them, not yet checked."""

    verdicts: tuple[Verdict, ...]
    signature: bytes


def parse_challenge(data: bytes) -> Challenge:
    """Parse an encoded `ChallengeResponse`.

    Raises: RemoteProtocolError.
    """
    from google.protobuf.message import DecodeError

    from tdxd.proto import keyrelease_pb2

    try:
        message = keyrelease_pb2.ChallengeResponse.FromString(data)
    except DecodeError as exc:
        raise RemoteProtocolError("key server's challenge is malformed") from exc
    return Challenge(token=message.token, signing_key_sha256=message.signing_key_sha256)


def parse_answer(data: bytes) -> Answer:
    """Parse an encoded `ReleaseResponse`; texts become one printable line each.

    Raises: RemoteProtocolError.
    """
    from google.protobuf.message import DecodeError

    from tdxd.proto import keyrelease_pb2

    try:
        message = keyrelease_pb2.ReleaseResponse.FromString(data)
    except DecodeError as exc:
        raise RemoteProtocolError("key server's answer is malformed") from exc
    statuses = {int(status) for status in protocol.Status}
    for item in message.verdicts:
        if item.status not in statuses:
            raise RemoteProtocolError(f"key server's verdict {item.status} is unknown")
    return Answer(
        verdicts=tuple(
            Verdict(
                signed=protocol.VerdictFields(
                    volume_id=item.volume_id,
                    generation=item.generation,
                    status=item.status,
                    sealed_bundle=item.sealed_bundle,
                ),
                denial_id=shown(item.denial_id, _TEXT_MAX),
                reason=shown(item.reason, _TEXT_MAX),
                hint=shown(item.hint, _TEXT_MAX),
            )
            for item in message.verdicts
        ),
        signature=message.signature,
    )
