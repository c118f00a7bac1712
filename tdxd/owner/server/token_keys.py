"""The keys of challenge tokens: in the store, so that any replica opens what another sealed.

Each lies there sealed to the key-encryption key, and its row carries a MAC under it, so whoever
writes to the database can neither read one nor bring in one of their own. A new key is published
first and seals a little later, when every process has seen it; an old one goes when the last token
that it can have sealed has expired.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from tdxd.core import hpke
from tdxd.core.keyrelease import (
    TOKEN_KEY_BYTES,
    TOKEN_LIFETIME_MAX_S,
    encode_lp,
    token_key_id,
)
from tdxd.errors import DataError
from tdxd.owner.store.kek import read_public
from tdxd.owner.store.rows import TokenKeyRow
from tdxd.owner.store.store import Store

__all__ = [
    "PUBLISH_S",
    "RETAIN_S",
    "TokenKeys",
    "drop_before_s",
    "open_token_key",
    "rotate_token_key",
    "wrap_token_key",
]

REFRESH_S = 5
"""A process knows the keys of the store no later than this."""
PUBLISH_S = 3 * REFRESH_S
"""A key seals from this age on, unless there is no older one."""
RETAIN_S = PUBLISH_S + REFRESH_S + TOKEN_LIFETIME_MAX_S + 20
"""When the next key is this old, the last token of a key has expired; 20 s for clocks apart."""
_ASK_AGAIN_S = 1.0
_LABEL = b"tdxd/token-key/v1"

_log: structlog.stdlib.BoundLogger = structlog.get_logger()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class _Key:
    key: bytes
    key_id: bytes
    made_at_s: int


def wrap_token_key(public: bytes, key: bytes, made_at_s: int) -> TokenKeyRow:
    """Seal a token key to the public half of the key-encryption key, as a row of the store."""
    key_id = token_key_id(key)
    to = hpke.parse_public_key(public, error=DataError)
    wrapped = hpke.seal(key, to, _info(key_id, made_at_s))
    return TokenKeyRow(key_id=key_id, wrapped=wrapped, made_at_s=made_at_s)


def open_token_key(kek: hpke.KeyPair, row: TokenKeyRow) -> bytes:
    """Open what `wrap_token_key` made, for the very id and time that it was made for.

    Raises: DataError.
    """
    what = f"token key {row.key_id.hex()}"
    info = _info(row.key_id, row.made_at_s)
    key = hpke.open_sealed(row.wrapped, kek.private, info, error=DataError, what=what)
    if len(key) != TOKEN_KEY_BYTES or token_key_id(key) != row.key_id:
        raise DataError(f"{what} holds another key")
    return key


def drop_before_s(made_at_s: Sequence[int], now_s: float) -> int:
    """Return the time before which keys can go: those made at `made_at_s` are all there are."""
    ripe = [made for made in made_at_s if made <= now_s - RETAIN_S]
    return max(ripe, default=0)


def rotate_token_key(
    directory: Path,
    store: Store,
    now_s: int,
    random_bytes: Callable[[int], bytes],
) -> bytes:
    """Make a new key, and drop those that no token can name any more; return its id.

    Raises: HostError, ConfigError, BusyError.
    """
    return _add(
        store,
        read_public(directory, store.kek()),
        random_bytes(TOKEN_KEY_BYTES),
        now_s,
        [row.made_at_s for row in store.token_keys()],
    )


def _add(
    store: Store, public: bytes, key: bytes, now_s: int, made_at_s: Sequence[int]
) -> bytes:
    row = wrap_token_key(public, key, now_s)
    before_s = drop_before_s(made_at_s, now_s)
    with store.transaction() as change:
        change.add_token_key(row)
        change.drop_token_keys(before_s)
    return row.key_id


def _info(key_id: bytes, made_at_s: int) -> bytes:
    return encode_lp(_LABEL) + encode_lp(key_id) + made_at_s.to_bytes(8, "big")


class TokenKeys:
    """The keys as one process knows them; safe to use from several threads."""

    def __init__(
        self,
        store: Store,
        kek: hpke.KeyPair,
        *,
        rotate_s: float,
        clock: Callable[[], float],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._kek = kek
        self._rotate_s = rotate_s
        self._clock = clock
        self._random_bytes = random_bytes
        self._lock = threading.Lock()
        self._keys: tuple[_Key, ...] = ()  # oldest first
        self._read_at_s = float("-inf")

    def opening(self) -> tuple[bytes, ...]:
        """Return the keys that open tokens, newest first."""
        return tuple(item.key for item in reversed(self._keys))

    def sealing(self) -> bytes:
        """Return the key to seal with now; makes a new one when it is time.

        Raises: HostError, BusyError.
        """
        now_s = self._clock()
        self._refresh(now_s, after_s=REFRESH_S)
        ripe = [one for one in self._keys if one.made_at_s <= now_s - PUBLISH_S]
        return (ripe[-1] if ripe else self._keys[0]).key

    def learn(self, token: bytes) -> None:
        """Look into the store again if this token names a key that is not known yet.

        At most once a second: anybody can invent a key's name.

        Raises: HostError, BusyError.
        """
        known = any(token.startswith(one.key_id) for one in self._keys)
        self._refresh(self._clock(), after_s=REFRESH_S if known else _ASK_AGAIN_S)

    def _refresh(self, now_s: float, *, after_s: float) -> None:
        with self._lock:
            if self._keys and 0 <= now_s - self._read_at_s < after_s:
                return
            self._read()
            newest_s = max((one.made_at_s for one in self._keys), default=None)
            if newest_s is None or newest_s <= now_s - self._rotate_s:
                self._rotate(now_s)
            self._read_at_s = now_s

    def _read(self) -> None:
        rows = sorted(self._store.token_keys(), key=lambda row: row.made_at_s)
        held = {one.key_id: one for one in self._keys}
        opened = [held.get(row.key_id) or self._open(row) for row in rows]
        self._keys = tuple(one for one in opened if one is not None)

    def _open(self, row: TokenKeyRow) -> _Key | None:
        try:
            key = open_token_key(self._kek, row)
        except DataError as exc:
            _log.error("token_key.unusable", key=row.key_id.hex(), error=exc.message)
            return None
        return _Key(key=key, key_id=row.key_id, made_at_s=row.made_at_s)

    def _rotate(self, now_s: float) -> None:
        key_id = _add(
            self._store,
            self._kek.public,
            self._random_bytes(TOKEN_KEY_BYTES),
            int(now_s),
            [one.made_at_s for one in self._keys],
        )
        _log.info("token_key.made", key=key_id.hex())
        self._read()
