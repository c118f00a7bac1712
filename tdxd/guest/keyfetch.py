"""Fetches key bundles: challenge, fresh key, quote, release, and the proof of the answer.

The servers are asked in order under one pin. What an answer says is believed only if a pinned
Ed25519 key signed it over this very request; TLS is there for the privacy of metadata.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import trio

from tdxd.core import hpke
from tdxd.core import keyrelease as protocol
from tdxd.core.config import Address, KeyReleaseConfig, parse_address
from tdxd.core.named_secret import (
    NamedSecret,
    ReleasedBundle,
    parse_released_bundle,
)
from tdxd.core.secret import Secret
from tdxd.errors import (
    BadBundleError,
    DeniedError,
    EvidenceError,
    HostError,
    KeyReleaseError,
    LocalProtocolError,
    RemoteProtocolError,
    TdxdError,
    UnreachableError,
)
from tdxd.guest.answer import Verdict, parse_answer, parse_challenge
from tdxd.guest.leased import AnyLeased, Leased, LeasedSecret
from tdxd.guest.runtime_record import RuntimeRecord
from tdxd.host.ports import Host, KeyServer
from tdxd.host.rpc import GrpcKeyServer

__all__ = ["Connect", "Fetched", "fetch_bundles"]

Connect = Callable[[Address, bytes], KeyServer]
"""Opens a server by its address and the PEM of the CA that it must prove itself to."""
Fetched = dict[str, AnyLeased | TdxdError]


async def fetch_bundles(
    volume_ids: Sequence[str],
    *,
    config: KeyReleaseConfig,
    host: Host,
    record: RuntimeRecord,
    ca_pem: bytes | None = None,
    connect: Connect = GrpcKeyServer,
) -> Fetched:
    """Ask for the bundles of some volumes and secrets; return a bundle or an error for each id.

    `ca_pem` is the content of `config.ca` where that was measured with the configuration;
    `None`: it is read now.

    An answer that proves itself is final, denials included; a server that does not answer, or
    whose answer does not prove itself, leaves the question to the next one. One quote per server
    asked. The caller wipes the bundles.
    """
    ids = tuple(sorted(set(volume_ids), key=str.encode))
    try:
        ca_pem = ca_pem or _read_ca(config.ca)
    except HostError as exc:
        return dict.fromkeys(ids, exc)
    failures: list[TdxdError] = []
    for name in config.servers:
        address = parse_address(name)
        try:
            exchange = _Exchange(str(address), ids, config, host, record)
            return await _ask(connect(address, ca_pem), exchange, config.timeout_s)
        except (KeyReleaseError, RemoteProtocolError) as exc:
            failures.append(exc)
        except (EvidenceError, LocalProtocolError, HostError) as exc:
            return dict.fromkeys(ids, exc)  # ours: another server would not help
    return dict.fromkeys(ids, _summary(config.servers, failures))


async def _ask(server: KeyServer, exchange: _Exchange, timeout_s: float) -> Fetched:
    """Run one exchange with one server, within a time on the monotonic clock."""
    try:
        with trio.fail_after(timeout_s) as scope:
            return await exchange.run(server, scope)
    except trio.TooSlowError as exc:
        text = f"key server {exchange.server} did not answer within {timeout_s:g} s"
        raise UnreachableError(text) from exc
    finally:
        with trio.CancelScope(shield=True):
            await server.aclose()


class _Exchange:
    """One challenge and one release."""

    def __init__(
        self,
        server: str,
        ids: tuple[str, ...],
        config: KeyReleaseConfig,
        host: Host,
        record: RuntimeRecord,
    ) -> None:
        self.server = server
        self._ids = ids
        self._pins = config.accepted_signing_keys()
        self._host, self._record = host, record
        self._sent_s = 0.0

    async def run(self, server: KeyServer, scope: trio.CancelScope) -> Fetched:
        challenge = parse_challenge(await server.challenge())
        pin_id = self._pinned(challenge.signing_key_sha256)
        if len(challenge.token) != protocol.TOKEN_BYTES:
            size = f"{len(challenge.token)} bytes, not {protocol.TOKEN_BYTES}"
            text = f"token of key server {self.server} has {size}"
            raise RemoteProtocolError(text)
        with _fresh_key(self._host) as key:
            async with self._record.held() as runtime_log:
                event_log = await trio.to_thread.run_sync(self._host.tsm.event_log)
                evidence = protocol.Evidence(
                    token=challenge.token,
                    public_key=key.public,
                    volume_ids=self._ids,
                    quote=b"",
                    event_log=event_log,
                    runtime_log=runtime_log,
                )
                request = await self._request(evidence, pin_id, scope)
            self._sent_s = self._host.boottime_s()
            answer = await server.release(request)
            return self._open(answer, protocol.transcript_hash(request), key)

    def _pinned(self, key_id: bytes) -> bytes:
        known = {protocol.signing_key_id(pin) for pin in self._pins}
        if key_id not in known:
            text = (
                f"key server {self.server} signs with the key sha256:{key_id.hex()}, "
                f"which is not pinned ({_pin_names(self._pins)})"
            )
            raise BadBundleError(text, hint=_PIN_HINT)
        return key_id

    async def _request(
        self, evidence: protocol.Evidence, pin_id: bytes, scope: trio.CancelScope
    ) -> bytes:
        """Get the quote and encode the request; the server's deadline waits meanwhile."""
        protocol.check_evidence(evidence, error=LocalProtocolError)
        wanted = protocol.report_data(
            token=evidence.token,
            public_key=evidence.public_key,
            volume_ids=evidence.volume_ids,
            signing_key_sha256=pin_id,
            event_log=evidence.event_log,
            runtime_log=evidence.runtime_log,
        )
        left_s = scope.deadline - trio.current_time()
        scope.deadline = float("inf")  # the kernel has a deadline of its own, 30 s
        quote = await trio.to_thread.run_sync(self._host.tsm.quote, wanted)
        scope.deadline = trio.current_time() + left_s
        return _encode_request(evidence, quote)

    def _open(self, answer: bytes, request_sha384: bytes, key: hpke.KeyPair) -> Fetched:
        """Check who signed, what was asked and what was sealed; in this order."""
        parsed = parse_answer(answer)
        signed = tuple(verdict.signed for verdict in parsed.verdicts)
        pin = protocol.signed_by(self._pins, parsed.signature, request_sha384, signed)
        if pin is None:
            text = (
                f"answer of key server {self.server} to this request is not signed "
                f"by a pinned key ({_pin_names(self._pins)})"
            )
            raise BadBundleError(text, hint=_PIN_HINT)
        answered = tuple(verdict.signed.volume_id for verdict in parsed.verdicts)
        if answered != self._ids:
            text = (
                f"key server {self.server} answered for {', '.join(answered) or 'nothing'}, "
                f"asked for {', '.join(self._ids)}"
            )
            raise BadBundleError(text)
        opened: Fetched = {}
        for verdict in parsed.verdicts:
            volume_id = verdict.signed.volume_id
            try:
                opened[volume_id] = self._leased(verdict, request_sha384, key)
            except KeyReleaseError as exc:
                opened[volume_id] = exc
        return opened

    def _leased(
        self, verdict: Verdict, request_sha384: bytes, key: hpke.KeyPair
    ) -> AnyLeased:
        """Open one verdict.

        Raises: DeniedError, KeyReleaseError for a passing trouble of the server, BadBundleError.
        """
        signed = verdict.signed
        if signed.status != protocol.Status.RELEASED:
            raise _denial(verdict)
        what = f"bundle of volume {signed.volume_id!r} generation {signed.generation}"
        info = protocol.sealed_info(request_sha384, signed.volume_id, signed.generation)
        plain = hpke.open_sealed(
            signed.sealed_bundle, key.private, info, error=BadBundleError, what=what
        )
        released = protocol.parse_released(plain, error=BadBundleError)
        bundles = _bundles(released, signed, what)
        return _of_one_kind(bundles, released.lease_s, self._sent_s, what)


def _bundles(
    released: protocol.Released, signed: protocol.VerdictFields, what: str
) -> list[ReleasedBundle]:
    """Read the bundles of one verdict: the first is its generation's, the others older and older.

    Raises: BadBundleError; then all that were read are wiped.
    """
    made: list[ReleasedBundle] = []
    try:
        for data in (released.bundle, *released.older):
            bundle = parse_released_bundle(data, source=what, error=BadBundleError)
            made.append(bundle)
            found = (bundle.manifest.volume_id, bundle.manifest.generation)
            fits = found[1] == signed.generation
            if len(made) > 1:
                fits = found[1] < made[-2].manifest.generation
            if found[0] != signed.volume_id or not fits:
                text = f"{what} holds volume {found[0]!r} generation {found[1]}"
                raise BadBundleError(text)
    except BadBundleError:
        for one in made:
            one.secret.wipe()
        raise
    return made


def _of_one_kind(
    bundles: Sequence[ReleasedBundle], lease_s: int, sent_s: float, what: str
) -> AnyLeased:
    """Make what was released of its bundles: those of a volume, or one secret alone.

    Raises: BadBundleError; then all are wiped.
    """
    secrets = [one for one in bundles if isinstance(one, NamedSecret)]
    volumes = [one for one in bundles if not isinstance(one, NamedSecret)]
    if not secrets:
        newest, *older = volumes
        return Leased(bundle=newest, older=tuple(older), lease_s=lease_s, sent_s=sent_s)
    if len(bundles) == 1:
        return LeasedSecret(bundle=secrets[0], lease_s=lease_s, sent_s=sent_s)
    for one in bundles:
        one.secret.wipe()
    raise BadBundleError(f"{what} comes with others, but a secret comes alone")


def _denial(verdict: Verdict) -> KeyReleaseError:
    volume_id = verdict.signed.volume_id
    if verdict.reason in protocol.PASSING_REASONS:
        text = f"key server cannot judge volume {volume_id!r} now: {verdict.reason}"
        return KeyReleaseError(
            f"{text} (denial {verdict.denial_id})", hint=verdict.hint
        )
    text = f"key server denies volume {volume_id!r}: {verdict.reason}"
    return DeniedError(f"{text} (denial {verdict.denial_id})", hint=verdict.hint)


@contextlib.contextmanager
def _fresh_key(host: Host) -> Iterator[hpke.KeyPair]:
    """Make a key pair for one attempt; the seed is wiped at once, the pair dropped at the end."""
    with Secret(host.random_bytes(hpke.SEED_BYTES)) as seed:
        pair = hpke.key_pair(seed)
    yield pair


def _encode_request(evidence: protocol.Evidence, quote: bytes) -> bytes:
    from tdxd.proto import keyrelease_pb2

    request = keyrelease_pb2.ReleaseRequest(
        token=evidence.token,
        public_key=evidence.public_key,
        volume_ids=evidence.volume_ids,
        quote=quote,
        event_log=evidence.event_log,
        runtime_log=evidence.runtime_log,
    )
    return request.SerializeToString()


_PIN_HINT = "compare key_release.signing_key with the line that `tdx-keyd init` printed"


def _pin_names(pins: Sequence[bytes]) -> str:
    return ", ".join(f"sha256:{protocol.signing_key_id(pin).hex()}" for pin in pins)


def _read_ca(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as exc:
        hint = "key_release.ca is the PEM file of the key server's CA"
        raise HostError.of("read", path, exc, hint=hint) from exc


def _summary(servers: Sequence[str], failures: Sequence[TdxdError]) -> TdxdError:
    """Return the gravest failure: an answer that lied, a refusal, else nobody answered."""
    for kind in (BadBundleError, DeniedError, RemoteProtocolError):
        for failure in failures:
            if isinstance(failure, kind):
                return failure
    if len(failures) == 1:
        return failures[0]
    tried = "; ".join(failure.message for failure in failures)
    text = f"none of the key servers {', '.join(servers)} answered: {tried}"
    return UnreachableError(text, hint=failures[-1].hint)
