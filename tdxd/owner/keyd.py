"""The key server: two unary calls, raw bytes in and out, no session between them.

Every decision is in the audit log before its answer leaves. The answer is signed as a whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey
from google.protobuf.message import DecodeError

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.policy import Check
from tdxd.errors import RemoteProtocolError, TdxdError
from tdxd.owner.judge import Judge, Judgement, judge_volume, reason_of
from tdxd.owner.store import AuditRecord, Store, Transaction
from tdxd.owner.volumes import Volumes, VolumeState
from tdxd.proto import keyrelease_pb2

if TYPE_CHECKING:
    import grpc

__all__ = ["Keyd", "KeydSecrets"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_HINTS = {
    "token-expired": "the quote took too long; the next attempt asks for a new token",
    "collateral-unavailable": "the key server has no valid collateral for this platform",
    "quota": "the volume's releases of this hour are used up",
    "no-policy": "the owner has set no policy: tdx-keyd policy set",
    "unknown-volume": "the owner has added no such volume: tdx-keyd add",
    "simulated": "the policy does not say simulated = true",
}
_OTHER_HINT = "the owner sees every check with: tdx-keyd explain"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class KeydSecrets:
    """The keys of a running server: `token_keys` of 32 bytes each, the first seals."""

    signing: Ed25519PrivateKey
    token_keys: tuple[bytes, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """The outcome for one volume, before it is sealed and signed."""

    volume_id: str
    state: VolumeState
    checks: tuple[Check, ...]
    denial_id: str

    @property
    def reason(self) -> str:
        return reason_of(self.checks)


class Keyd:
    """Answers challenges and releases; safe to use from several threads."""

    def __init__(
        self,
        *,
        store: Store,
        volumes: Volumes,
        judge: Judge,
        secrets: KeydSecrets,
        deployment: bytes,
        token_lifetime_s: int,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._volumes = volumes
        self._judge = judge
        self._secrets = secrets
        self._deployment = deployment
        self._token_lifetime_s = token_lifetime_s
        self._clock = clock
        self._random_bytes = random_bytes
        public = secrets.signing.public_key().public_bytes_raw()
        self._signing_key_id = protocol.signing_key_id(public)

    def challenge(self, _request: bytes, _context: grpc.ServicerContext) -> bytes:
        """Answer a `ChallengeRequest`."""
        claims = protocol.TokenClaims(
            nonce=self._random_bytes(protocol.NONCE_BYTES),
            expiry_s=int(self._clock()) + self._token_lifetime_s,
            deployment=self._deployment,
        )
        token = protocol.encode_token(
            claims, key=self._secrets.token_keys[0], iv=self._random_bytes(12)
        )
        response = keyrelease_pb2.ChallengeResponse(
            token=token, signing_key_sha256=self._signing_key_id
        )
        return response.SerializeToString()

    def release(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        """Answer a `ReleaseRequest`, given exactly as it was received."""
        import grpc

        peer = context.peer()
        try:
            evidence, public_key = _parse_request(request)
        except RemoteProtocolError as exc:
            _log.warning("request.malformed", peer=peer, error=exc.message)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, exc.message)
        try:
            decisions = self._decide(evidence, peer)
        except TdxdError as exc:  # no audit record, no answer
            _log.error("request.failed", peer=peer, error=exc.message, hint=exc.hint)
            context.abort(grpc.StatusCode.UNAVAILABLE, "the key server's store fails")
        return self._answer(request, public_key, decisions)

    def _decide(self, evidence: protocol.Evidence, peer: str) -> tuple[_Decision, ...]:
        """Judge every volume and write the audit records."""
        now_s = self._clock()
        judgement = self._judge.judge(evidence, now_s)
        judged = [self._one(volume_id, judgement) for volume_id in evidence.volume_ids]
        with self._store.transaction() as change:
            final = tuple(
                _within_quota(item, judgement.nonce, int(now_s), change)
                for item in judged
            )
            request_id = self._random_bytes(8).hex()
            change.record(
                [
                    _record(item, judgement, request_id, peer, int(now_s))
                    for item in final
                ]
            )
        for item in final:
            _log_decision(item, judgement, peer)
        return final

    def _one(self, volume_id: str, judgement: Judgement) -> _Decision:
        state = self._volumes.state(volume_id)
        checks = judge_volume(volume_id, judgement, state.finding)
        if not reason_of(checks) and (
            judgement.verified is None or state.bundle is None
        ):
            trouble = Check(
                name="secret", expected="opens", actual=state.trouble, ok=False
            )
            checks = (*checks, trouble)
        return _Decision(
            volume_id=volume_id,
            state=state,
            checks=checks,
            denial_id=self._random_bytes(8).hex(),
        )

    def _answer(
        self,
        request: bytes,
        public_key: MLKEM768X25519PublicKey,
        decisions: Sequence[_Decision],
    ) -> bytes:
        request_sha384 = protocol.transcript_hash(request)
        response = keyrelease_pb2.ReleaseResponse()
        signed = []
        for item in decisions:
            fields = _sealed(item, request_sha384, public_key)
            signed.append(fields)
            verdict = response.verdicts.add(
                volume_id=fields.volume_id,
                generation=fields.generation,
                status=keyrelease_pb2.Status.ValueType(fields.status),
                sealed_bundle=fields.sealed_bundle,
            )
            if item.reason:
                verdict.denial_id = item.denial_id
                verdict.reason = item.reason
                verdict.hint = _HINTS.get(item.reason, _OTHER_HINT)
        response.signature = protocol.sign_answer(
            self._secrets.signing, request_sha384, signed
        )
        return response.SerializeToString()


def _parse_request(
    request: bytes,
) -> tuple[protocol.Evidence, MLKEM768X25519PublicKey]:
    """Decode a request and check its sizes and its public key.

    Raises: RemoteProtocolError.
    """
    if len(request) > protocol.REQUEST_MAX_BYTES:
        raise RemoteProtocolError(f"request has {len(request)} bytes")
    try:
        message = keyrelease_pb2.ReleaseRequest.FromString(request)
    except DecodeError as exc:
        raise RemoteProtocolError("request is not a ReleaseRequest") from exc
    evidence = protocol.Evidence(
        token=message.token,
        public_key=message.public_key,
        volume_ids=tuple(message.volume_ids),
        quote=message.quote,
        event_log=message.event_log,
        runtime_log=message.runtime_log,
    )
    protocol.check_evidence(evidence)
    return evidence, hpke.parse_public_key(evidence.public_key)


def _within_quota(
    item: _Decision, nonce: bytes, now_s: int, change: Transaction
) -> _Decision:
    """Count a release against its policy's hourly limit, if it has one."""
    policy = item.state.finding.policy
    limit = policy.release.max_per_hour if policy else None
    if item.reason or limit is None:
        return item
    used = change.spend(item.volume_id, nonce, now_s, limit)
    check = Check(
        name="quota",
        expected=f"at most {limit} releases per hour",
        actual=f"{limit} before this one" if used is None else f"{used} with this one",
        ok=used is not None,
    )
    return dataclasses.replace(item, checks=(*item.checks, check))


def _sealed(
    item: _Decision, request_sha384: bytes, public_key: MLKEM768X25519PublicKey
) -> protocol.VerdictFields:
    bundle = item.state.bundle
    if item.reason or bundle is None:
        return protocol.VerdictFields(
            volume_id=item.volume_id,
            generation=0,
            status=protocol.Status.DENIED,
            sealed_bundle=b"",
        )
    generation = item.state.generation
    info = protocol.sealed_info(request_sha384, item.volume_id, generation)
    return protocol.VerdictFields(
        volume_id=item.volume_id,
        generation=generation,
        status=protocol.Status.RELEASED,
        sealed_bundle=hpke.seal(bundle.reveal(), public_key, info),
    )


def _record(
    item: _Decision, judgement: Judgement, request_id: str, peer: str, now_s: int
) -> AuditRecord:
    quote = judgement.quote
    return AuditRecord(
        at_s=now_s,
        request_id=request_id,
        denial_id=item.denial_id if item.reason else None,
        volume_id=item.volume_id,
        generation=0 if item.reason else item.state.generation,
        decision="denied" if item.reason else "released",
        reason=item.reason,
        peer=peer,
        simulated=_simulated(judgement),
        policy_version=item.state.policy_version,
        report_data=quote.report_data.hex() if quote else "",
        checks=item.checks,
    )


def _simulated(judgement: Judgement) -> bool:
    return judgement.verified is not None and judgement.verified.simulated


def _log_decision(item: _Decision, judgement: Judgement, peer: str) -> None:
    simulated = _simulated(judgement)
    if item.reason:
        _log.warning(
            "key.denied",
            volume=item.volume_id,
            reason=item.reason,
            denial=item.denial_id,
            peer=peer,
            simulated=simulated,
        )
    else:
        _log.info(
            "key.released",
            volume=item.volume_id,
            generation=item.state.generation,
            peer=peer,
            simulated=simulated,
        )
