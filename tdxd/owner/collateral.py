"""Collateral made ready for dcap-qvl, and the cache of it.

dcap-qvl does not look at the role of the collateral's signer: any certificate below the root would
do, a platform's own PCK among them, and it reads PEM blocks of any label. So the signers' names
are checked here, and the chains are encoded anew from the very certificates that were checked.
Source of the signer's name: Intel DCAP quote verification library, TCBSigningChain.cpp.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
import threading
from collections.abc import Callable
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from tdxd.core.policy import Check
from tdxd.errors import DataError, UnavailableError

__all__ = ["CollateralCache", "FetchCollateral", "Prepared", "prepare"]

SIGNER_NAME = "Intel SGX TCB Signing"
_SIGNED_CHAINS = ("tcb_info_issuer_chain", "qe_identity_issuer_chain")
_CHAINS = (*_SIGNED_CHAINS, "pck_crl_issuer_chain")
_CACHE_MAX = 64
_RETRY_S = 30
"""After a failure, the same question is not asked again for this long."""

FetchCollateral = Callable[[str, str], str]
"""Fetches a set as JSON, by FMSPC (12 upper-case hex digits) and CA ("platform", "processor")."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A set of collateral, its signers checked; `parsed` is dcap-qvl's QuoteCollateralV3.

    It may be used before `expires_s` (unix time, the earliest nextUpdate in it).
    """

    parsed: Any
    signers: tuple[Check, ...]
    expires_s: int


def prepare(collateral_json: str) -> Prepared:
    """Check the signers' roles, encode the chains anew, drop a PCK chain, find the expiry.

    A wrong signer is no error here but a failed check, so that `explain` can show it.

    Raises: DataError for anything malformed.
    """
    import dcap_qvl

    try:
        fields = json.loads(collateral_json)
        fields.pop("pck_certificate_chain", None)
        signers = []
        for name in _CHAINS:
            chain = x509.load_pem_x509_certificates(fields[name].encode())
            fields[name] = "".join(
                one.public_bytes(Encoding.PEM).decode() for one in chain
            )
            if name in _SIGNED_CHAINS:
                signers.append(_signer(name, chain[0]))
        expires_s = _expires_s(fields)
        parsed = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(fields))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise DataError(f"collateral is malformed: {exc}") from exc
    return Prepared(parsed=parsed, signers=tuple(signers), expires_s=expires_s)


def _signer(chain_name: str, leaf: x509.Certificate) -> Check:
    names = [
        str(one.value)
        for one in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    ]
    return Check(
        name=chain_name.replace("_issuer_chain", "_signer"),
        expected=SIGNER_NAME,
        actual=", ".join(names) or "no common name",
        ok=names == [SIGNER_NAME],
    )


def _expires_s(fields: dict[str, str]) -> int:
    times = [
        dt.datetime.fromisoformat(json.loads(fields[name])["nextUpdate"])
        for name in ("tcb_info", "qe_identity")
    ]
    for name in ("root_ca_crl", "pck_crl"):
        crl = x509.load_der_x509_crl(bytes.fromhex(fields[name]))
        if crl.next_update_utc is None:
            raise ValueError(f"{name} has no nextUpdate")
        times.append(crl.next_update_utc)
    return min(int(time.timestamp()) for time in times)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    prepared: Prepared
    fetched_s: float


class CollateralCache:
    """Keeps each set until its nextUpdate, and looks for a newer one every `refresh_s`.

    While the service cannot be reached, a set that has not expired is used on. One fetch at a time;
    questions that the cache can answer never wait for it.
    """

    def __init__(self, fetch: FetchCollateral, *, refresh_s: float) -> None:
        self._fetch = fetch
        self._refresh_s = refresh_s
        self._entries: dict[tuple[str, str], _Entry] = {}
        self._failures: dict[tuple[str, str], tuple[float, UnavailableError]] = {}
        self._fetching = threading.Lock()

    def get(self, fmspc: str, ca: str, now_s: float) -> Prepared:
        """Return a set that has not expired.

        Raises: UnavailableError.
        """
        key = (fmspc, ca)
        entry = self._current(key, now_s)
        if entry is not None and now_s - entry.fetched_s < self._refresh_s:
            return entry.prepared
        if entry is not None and self._failed_lately(key, now_s):
            return entry.prepared
        with self._fetching:
            later = self._current(key, now_s)
            if later is not None and later is not entry:
                return later.prepared
            try:
                return self._refresh(key, now_s).prepared
            except UnavailableError:
                if entry is None:
                    raise
                return entry.prepared

    def _current(self, key: tuple[str, str], now_s: float) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None or entry.prepared.expires_s <= now_s:
            return None
        return entry

    def _failed_lately(self, key: tuple[str, str], now_s: float) -> bool:
        failed = self._failures.get(key)
        return failed is not None and 0 <= now_s - failed[0] < _RETRY_S

    def _refresh(self, key: tuple[str, str], now_s: float) -> _Entry:
        if self._failed_lately(key, now_s):
            raise self._failures[key][1]
        try:
            prepared = prepare(self._fetch(*key))
            if prepared.expires_s <= now_s:
                raise UnavailableError(f"collateral for FMSPC {key[0]} has expired")
        except (UnavailableError, DataError) as exc:
            failure = UnavailableError(exc.message)
            _keep(self._failures, key, (now_s, failure))
            raise failure from exc
        self._failures.pop(key, None)
        entry = _Entry(prepared=prepared, fetched_s=now_s)
        _keep(self._entries, key, entry)
        return entry


def _keep(cache: dict[tuple[str, str], Any], key: tuple[str, str], value: Any) -> None:
    """Add to a cache of bounded size: anybody may ask for any FMSPC."""
    cache.pop(key, None)
    while len(cache) >= _CACHE_MAX:
        cache.pop(next(iter(cache)))
    cache[key] = value
