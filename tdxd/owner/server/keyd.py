"""The key server: two unary calls, raw bytes in and out, no session between them.

Every decision is in the audit log before its answer leaves. The answer is signed as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import structlog
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey
from google.protobuf.message import DecodeError

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.check import Check
from tdxd.core.secret import Secret
from tdxd.errors import RemoteProtocolError
from tdxd.owner.appraisal.judge import Judge, Judgement, judge_volume, reason_of
from tdxd.owner.audit.record import bounded
from tdxd.owner.server.signing_keys import SigningKey
from tdxd.owner.server.token_keys import TokenKeys
from tdxd.owner.store.store import AuditRecord, Store, Transaction
from tdxd.owner.store.volumes import Volumes, VolumeState
from tdxd.proto import keyrelease_pb2

__all__ = ["Keyd", "Signer"]

_log: structlog.stdlib.BoundLogger = structlog.get_logger()

_HINTS = {
    "token-expired": "the quote took too long; the next attempt asks for a new token",
    "collateral-unavailable": "the key server has no valid collateral for this platform",
    "quota": "the volume's releases of this hour are used up",
    "no-generation": "the store has none that the policy lets be served",
    "no-policy": "the owner has set no policy: tdx-keyd policy set",
    "unknown-volume": "the owner has added no such volume or secret: tdx-keyd add, or secret put",
    "simulated": "the policy does not say simulated = true",
}
_OTHER_HINT = "the owner sees every check with: tdx-keyd explain"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Signer:
    """A key that may sign answers, and the judge of evidence that names it."""

    key: SigningKey
    judge: Judge


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """The outcome for one volume, before it is sealed and signed."""

    volume_id: str
    state: VolumeState
    checks: tuple[Check, ...]
    reason: str
    denial_id: str

    @property
    def lease_s(self) -> int:
        """What the policy says, 0 for no lease."""
        policy = self.state.finding.policy
        return (policy.release.lease_s or 0) if policy else 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the records of one request share."""

    request_id: str
    request_sha384: str
    peer: str
    at_s: int


class Keyd:
    """Answers challenges and releases; safe to use from several threads.

    The first of `signers` is named in challenges; whoever was told another of them is answered by
    that one.
    """

    def __init__(
        self,
        *,
        store: Store,
        volumes: Volumes,
        signers: Sequence[Signer],
        token_keys: TokenKeys,
        deployment: bytes,
        token_lifetime_s: int,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
        on_records: Callable[[Sequence[AuditRecord]], None],
    ) -> None:
        self._store = store
        self._volumes = volumes
        self._signers = tuple(signers)
        self._token_keys = token_keys
        self._deployment = deployment
        self._token_lifetime_s = token_lifetime_s
        self._clock = clock
        self._random_bytes = random_bytes
        self._on_records = on_records

    def challenge(self, _request: bytes, _peer: str) -> bytes:
        """Answer a `ChallengeRequest`.

        Raises: TdxdError.
        """
        key = self._token_keys.sealing()
        claims = protocol.TokenClaims(
            nonce=self._random_bytes(protocol.NONCE_BYTES),
            expiry_s=int(self._clock()) + self._token_lifetime_s,
            deployment=self._deployment,
        )
        response = keyrelease_pb2.ChallengeResponse(
            token=protocol.encode_token(claims, key=key, iv=self._random_bytes(12)),
            signing_key_sha256=self._signers[0].key.key_id,
        )
        return response.SerializeToString()

    def release(self, request: bytes, peer: str) -> bytes:
        """Answer a `ReleaseRequest`, given exactly as it was received.

        Raises: RemoteProtocolError for a malformed one, TdxdError.
        """
        evidence, public_key = _parse_request(request)
        signer = self._signer(evidence)
        request_sha384 = protocol.transcript_hash(request)
        decisions = self._decide(evidence, signer.judge, request_sha384, peer)
        return _answer(request_sha384, public_key, signer.key, decisions)

    def _signer(self, evidence: protocol.Evidence) -> Signer:
        """Return the signer that the evidence names, as it seems; the judge finds out."""
        for signer in self._signers[1:]:
            named = protocol.report_data(
                token=evidence.token,
                public_key=evidence.public_key,
                volume_ids=evidence.volume_ids,
                signing_key_sha256=signer.key.key_id,
                event_log=evidence.event_log,
                runtime_log=evidence.runtime_log,
            )
            if named in evidence.quote:
                return signer
        return self._signers[0]

    def _decide(
        self,
        evidence: protocol.Evidence,
        judge: Judge,
        request_sha384: bytes,
        peer: str,
    ) -> tuple[_Decision, ...]:
        """Judge every volume and write the audit records."""
        self._token_keys.learn(evidence.token)
        now_s = self._clock()
        judgement = judge.judge(evidence, now_s)
        asked = _Asked(
            request_id=self._random_bytes(8).hex(),
            request_sha384=request_sha384.hex(),
            peer=peer,
            at_s=int(now_s),
        )
        ids = evidence.volume_ids
        if reason_of(judgement.checks) in ("", "quote"):
            final, records = self._decided(ids, judgement, asked)
        else:  # no volume is looked at: one decision, and one record, for however many
            checks = (*judgement.checks, _volumes_asked(ids))
            judgement = dataclasses.replace(judgement, checks=checks)
            (one,), records = self._decided(ids[:1], judgement, asked)
            final = tuple(dataclasses.replace(one, volume_id=name) for name in ids)
        self._on_records(records)
        for item in final[: len(records)]:
            _log_decision(item, judgement, peer)
        return final

    def _decided(
        self, volume_ids: Sequence[str], judgement: Judgement, asked: _Asked
    ) -> tuple[tuple[_Decision, ...], list[AuditRecord]]:
        """Decide by the state of the store that the records are written on."""
        while True:
            judged = [self._one(volume_id, judgement) for volume_id in volume_ids]
            with self._store.transaction() as change:
                revision = change.seal().revision
                if all(item.state.revision == revision for item in judged):
                    final = tuple(
                        _within_quota(item, judgement.nonce, asked.at_s, change)
                        for item in judged
                    )
                    records = [_record(item, judgement, asked) for item in final]
                    change.record(records)
                    return final, records
            self._volumes.renew(revision)

    def _one(self, volume_id: str, judgement: Judgement) -> _Decision:
        state = self._volumes.state(volume_id)
        if state.trouble and not reason_of(judgement.checks):
            checks = (*judgement.checks, _sealed_check(state))
        else:
            checks = judge_volume(
                volume_id, judgement, state.finding, self._volumes.knows
            )
        if not reason_of(checks):
            checks = (*checks, *_generations_checks(state))
        reason = reason_of(checks)
        if not reason and (judgement.verified is None or not state.bundles):
            checks = (*checks, _sealed_check(state))
            reason = reason_of(checks)
        return _Decision(
            volume_id=volume_id,
            state=state,
            checks=checks,
            reason=reason,
            denial_id=self._random_bytes(8).hex(),
        )


def _generations_checks(state: VolumeState) -> tuple[Check, ...]:
    """Say which generations are released, where that is not simply the newest one."""
    policy = state.finding.policy
    if policy is None or (state.served == state.present[-1:] and state.served):
        return ()
    held = ", ".join(str(one) for one in reversed(state.present)) or "none"
    released = ", ".join(str(one) for one in state.served)
    return (
        Check(
            name="generations",
            expected=str(policy.release.generations),
            actual=released or f"none of those in the store: {held}",
            ok=bool(state.served),
        ),
    )


def _volumes_asked(volume_ids: Sequence[str]) -> Check:
    text = ", ".join(volume_ids)
    return Check(name="volumes", expected="any", actual=text, ok=True)


def _answer(
    request_sha384: bytes,
    public_key: MLKEM768X25519PublicKey,
    signing_key: SigningKey,
    decisions: Sequence[_Decision],
) -> bytes:
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
        signing_key.private, request_sha384, signed
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


def _sealed_check(state: VolumeState) -> Check:
    """Fail a volume whose rows in the store are not as they were sealed."""
    wanted = "policy and secret as they were sealed"
    return Check(
        name="secret", expected=wanted, actual=state.trouble or "none", ok=False
    )


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
    reason = reason_of((check,))
    return dataclasses.replace(item, checks=(*item.checks, check), reason=reason)


def _sealed(
    item: _Decision, request_sha384: bytes, public_key: MLKEM768X25519PublicKey
) -> protocol.VerdictFields:
    bundles = item.state.bundles
    if item.reason or not bundles:
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
        sealed_bundle=hpke.seal(_released(item, bundles), public_key, info),
    )


def _released(item: _Decision, bundles: Sequence[Secret]) -> bytes:
    newest, *older = (one.reveal() for one in bundles)
    return protocol.encode_released(newest, item.lease_s, older)


def _record(item: _Decision, judgement: Judgement, asked: _Asked) -> AuditRecord:
    quote, digests = judgement.quote, judgement.digests
    nonce = judgement.nonce
    return AuditRecord(
        at_s=asked.at_s,
        request_id=asked.request_id,
        denial_id=item.denial_id if item.reason else None,
        volume_id=item.volume_id,
        generation=0 if item.reason else item.state.generation,
        decision="denied" if item.reason else "released",
        reason=item.reason,
        peer=asked.peer,
        simulated=_simulated(judgement),
        policy_version=item.state.policy_version,
        report_data=quote.report_data.hex() if quote else "",
        checks=bounded(item.checks),
        request_sha384=asked.request_sha384,
        quote_sha256=digests.quote_sha256 if digests else "",
        event_log_sha384=digests.event_log_sha384 if digests else "",
        runtime_log_sha384=digests.runtime_log_sha384 if digests else "",
        nonce_sha256=hashlib.sha256(nonce).hexdigest() if nonce else "",
        lease_s=0 if item.reason else item.lease_s,
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
