"""Changes of a store: what one transaction may do, kept in step with the seal.

A change starts from the sealed state, never from the rows: what somebody put into the tables past
tdx-keyd is not sealed by the next honest change.
"""

from __future__ import annotations

import dataclasses
import hmac
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from tdxd.errors import DataError
from tdxd.owner.audit.record import AuditRecord, chain_hash, encode_record
from tdxd.owner.store.check import policy_trouble, row_troubles, stored_ids
from tdxd.owner.store.key import StoreKey
from tdxd.owner.store.rows import (
    GenerationRow,
    PolicyRow,
    Row,
    TokenKeyRow,
    authentic,
    read_generations,
    read_policy,
    read_token_keys,
    row_mac,
)
from tdxd.owner.store.schema import GENERATIONS, META, POLICIES, TOKEN_KEYS
from tdxd.owner.store.seal import Seal, SealedState, StoreIntegrityError
from tdxd.owner.store.state import State

__all__ = ["Transaction"]

_QUOTA_WINDOW_S = 3600
_APPEND = "INSERT INTO audit (seq, record, hash, denial_id) VALUES (?, ?, ?, ?)"
_FORGET = "DELETE FROM nonces WHERE at_s <= ?"
_USED = "SELECT count(*), coalesce(sum(nonce = ?), 0) FROM nonces WHERE volume_id = ?"
_SPEND = "INSERT INTO nonces (volume_id, nonce, at_s) VALUES (?, ?, ?)"


class Transaction:
    """One change of the store, valid inside `Store.transaction` only.

    Every method that changes something under the seal raises StoreIntegrityError if the seal, the
    state or a row that it starts from is not what tdx-keyd left, and ConfigError or HostError
    without the key-encryption key.
    """

    def __init__(
        self,
        connection: sa.Connection,
        sqlite: sqlite3.Connection,
        sealed: SealedState,
        key: StoreKey,
    ) -> None:
        self._connection = connection
        self._sqlite = sqlite
        self._sealed = sealed
        self._key = key
        self._seal: Seal | None = None
        self._state: State | None = None
        self._written: Seal | None = None

    def seal(self) -> Seal:
        """Return the seal as this transaction leaves it."""
        if self._seal is None:
            self._seal = self._sealed.read(self._key)
        return self._seal

    def _changing(self) -> State:
        """Return the state, which will be written."""
        if self._state is None:
            self._state = self._sealed.state(self.seal())
        return self._state

    def finish(self) -> None:
        """Write the seal; `Store.transaction` calls this before it commits."""
        if self._seal is not None:
            self._written = self._sealed.write(self._seal, self._state, self._key)

    def committed(self) -> None:
        """Remember what was written; `Store.transaction` calls this when it has committed."""
        if self._written is not None:
            self._sealed.committed(self._written)

    def make_seal(self) -> None:
        """Seal an empty store for the first time."""
        self._seal, self._state = Seal(), State()

    def set_meta(self, key: str, value: int) -> None:
        """Set one number of the `meta` table."""
        row = {"key": key, "value": value}
        self._connection.execute(META.insert().prefix_with("OR REPLACE"), row)

    # --- volumes and policies -------------------------------------------------

    def add_generation(self, row: GenerationRow) -> None:
        """Add a generation, also one that was removed, if its manifest is the same.

        Raises: DataError if this generation is there already, or was with another manifest; if
        the volume is of another kind.
        """
        held = self._changing().generations.setdefault(row.volume_id, {})
        self._same_kind(row)
        if row.generation in held:
            before = self._generation(row.volume_id, row.generation)
            same = before.manifest_sha256 == row.manifest_sha256
            if not before.removed_at_s or not same:
                other = " with another manifest" if before.removed_at_s else ""
                was = "was" if before.removed_at_s else "is"
                raise DataError(
                    f"volume {row.volume_id!r} generation {row.generation} {was} in the "
                    f"store{other}",
                    hint="seal again with a higher --generation",
                )
        self._put_generation(row)

    def next_generation(self, volume_id: str) -> int:
        """Return the number after all that an id ever had, removed ones included."""
        return max(self.state().generations.get(volume_id, {}), default=0) + 1

    def _same_kind(self, row: GenerationRow) -> None:
        """Refuse two kinds under one id: a guest's config names one, and refuses the other."""
        held = self._changing().generations[row.volume_id]
        for number in (number for number, (_, present) in held.items() if present):
            other = self._generation(row.volume_id, number)
            if (other.kind, other.content) != (row.kind, row.content):
                raise DataError(
                    f"{row.volume_id!r} generation {number} in the store is {_named(other)}, "
                    f"generation {row.generation} would be {_named(row)}",
                    hint="take another id for it, or remove what has this one first",
                )

    def _put_generation(self, row: GenerationRow) -> None:
        row = dataclasses.replace(row, mac=row_mac(self._key, row))
        self._replace(GENERATIONS, row)
        held = self._changing().generations[row.volume_id]
        held[row.generation] = (row.mac, not row.removed_at_s)

    def _generation(self, volume_id: str, generation: int) -> GenerationRow:
        """Return a generation's row as it was sealed."""
        query = sa.select(GENERATIONS).where(
            GENERATIONS.c.volume_id == volume_id,
            GENERATIONS.c.generation == generation,
        )
        found = self._connection.execute(query).mappings().first()
        what = f"volume {volume_id!r} generation {generation}"
        if found is None:
            raise StoreIntegrityError(f"{what} is missing in the database")
        row = GenerationRow(**found)
        self._check(what, row, self._changing().generations[volume_id][generation][0])
        return row

    def _check(self, what: str, row: Row, sealed_mac: bytes) -> None:
        if not authentic(self._key, row) or not hmac.compare_digest(
            row.mac, sealed_mac
        ):
            raise StoreIntegrityError(f"{what} is not what was sealed")

    def remove(self, volume_id: str, generation: int | None, now_s: int) -> int:
        """Remove one generation, or all of a volume; return how many generations went."""
        held = self._changing().generations.get(volume_id, {})
        chosen = (
            list(held) if generation is None else [generation] * (generation in held)
        )
        gone = 0
        for number in chosen:
            row = self._generation(volume_id, number)
            if not row.removed_at_s:
                at_s = max(1, now_s)
                row = dataclasses.replace(row, wrapped=b"", removed_at_s=at_s)
                self._put_generation(row)
                gone += 1
        return gone

    def set_policy(self, volume_id: str, text: str, now_s: int) -> int:
        """Set the policy of a volume; return its version."""
        version = self._changing().policy_version(volume_id) + 1
        self.put_policy(
            PolicyRow(volume_id=volume_id, version=version, text=text, set_at_s=now_s)
        )
        return version

    def policy(self, volume_id: str) -> PolicyRow | None:
        """Return the policy of a volume as it was sealed."""
        row = read_policy(self._sqlite, volume_id)
        trouble = policy_trouble(self._key, self.state(), volume_id, row)
        if trouble:
            raise StoreIntegrityError(trouble)
        return row

    def put_policy(self, row: PolicyRow) -> None:
        """Set the policy of a volume with a version of the caller's choice."""
        row = dataclasses.replace(row, mac=row_mac(self._key, row))
        self._replace(POLICIES, row)
        self._changing().policies[row.volume_id] = (row.version, row.mac)

    def _replace(self, table: sa.Table, row: Row) -> None:
        statement = table.insert().prefix_with("OR REPLACE")
        self._connection.execute(statement, dataclasses.asdict(row))

    # --- floors and token keys ------------------------------------------------

    def raise_floors(self, floors: Mapping[str, int]) -> None:
        """Raise the collateral floors: each is the greater of its old and its new value."""
        held = self._sealed.state(self.seal()) if self._state is None else self._state
        higher = {
            name: value
            for name, value in floors.items()
            if value > held.floors.get(name, -1)
        }
        if higher:
            self._changing().floors.update(higher)

    def add_token_key(self, row: TokenKeyRow) -> None:
        """Add a token key; its `mac` is made here.

        Raises: DataError if a key of this id is there.
        """
        name = row.key_id.hex()
        if name in self._changing().token_keys:
            raise DataError(f"token key {name} is in the store")
        self._put_token_key(row)

    def _put_token_key(self, row: TokenKeyRow) -> None:
        row = dataclasses.replace(row, mac=row_mac(self._key, row))
        self._replace(TOKEN_KEYS, row)
        self._changing().token_keys[row.key_id.hex()] = row.mac

    def drop_token_keys(self, before_s: int) -> int:
        """Remove the token keys that were made before a time; return how many went."""
        old = sa.select(TOKEN_KEYS).where(TOKEN_KEYS.c.made_at_s < before_s)
        rows = [TokenKeyRow(**row) for row in self._connection.execute(old).mappings()]
        for row in rows:
            name = row.key_id.hex()
            sealed = self._changing().token_keys.pop(name, b"")
            self._check(f"token key {name}", row, sealed)
            mine = TOKEN_KEYS.c.key_id == row.key_id
            self._connection.execute(TOKEN_KEYS.delete().where(mine))
        return len(rows)

    # --- all of it under another key ------------------------------------------

    def rows(self) -> tuple[Row, ...]:
        """Return every row under the seal, each as it was sealed."""
        state = self.state()
        for trouble in row_troubles(self._sqlite, self._key, state):
            raise StoreIntegrityError(trouble)
        found: list[Row] = []
        for name in stored_ids(self._sqlite, state):
            policy = read_policy(self._sqlite, name)
            found += [policy] if policy else []
            found += read_generations(self._sqlite, name)
        return (*found, *read_token_keys(self._sqlite))

    def remake(self, rows: Iterable[Row], key: StoreKey) -> None:
        """Put rows in place of those of the same names, under a key that seals from now on.

        They must be all that `rows` returns: what is left under the old key is a row edited.
        """
        self._changing()
        self._key = key
        for row in rows:
            if isinstance(row, PolicyRow):
                self.put_policy(row)
            elif isinstance(row, GenerationRow):
                self._put_generation(row)
            else:
                self._put_token_key(row)

    # --- releases -------------------------------------------------------------

    def spend(self, volume_id: str, nonce: bytes, now_s: int, limit: int) -> int | None:
        """Count a release against an hourly limit, each nonce once.

        Returns the releases counted in the last hour, or None if the limit is reached. No other
        process counts between the reading and the writing: the transaction is the only writer.
        """
        self._sqlite.execute(_FORGET, (now_s - _QUOTA_WINDOW_S,))
        found: Any = self._sqlite.execute(_USED, (nonce, volume_id)).fetchone()
        used: int = found[0]
        if found[1]:
            return used
        if used >= limit:
            return None
        self._sqlite.execute(_SPEND, (volume_id, nonce, now_s))
        return used + 1

    def record(self, records: Sequence[AuditRecord]) -> None:
        """Append audit records."""
        for item in records:
            self.append(item, self.seal().seq + 1)

    def append(self, record: AuditRecord, seq: int) -> None:
        """Append one record under a number; all but `record` want the next one."""
        seal = self.seal()
        data = encode_record(record, seq)
        head = chain_hash(seal.head, data)
        done = self._sqlite.execute(_APPEND, (seq, data, head, record.denial_id))
        if done.rowcount != 1:  # something in the database swallows it
            raise StoreIntegrityError(f"audit record {seq} was not written")
        self._seal = dataclasses.replace(seal, seq=seq, head=head)

    def mark_exported(self, exported: Seal, now_s: int) -> None:
        """Note which seal's checkpoint was exported."""
        self._seal = dataclasses.replace(
            self.seal(),
            exported_revision=exported.revision,
            exported_seq=exported.seq,
            exported_at_s=now_s,
        )

    def overtake(self, revision: int) -> None:
        """Count the revision up past one that is known elsewhere."""
        seal = self.seal()
        self._changing()
        self._seal = dataclasses.replace(seal, revision=max(seal.revision, revision))

    def state(self) -> State:
        """Return the state, to be looked at only."""
        return self._sealed.state(self.seal()) if self._state is None else self._state


def _named(row: GenerationRow) -> str:
    """Say what a row is, as in "is luks2", "is a secret (tls-pem)"."""
    return f"a secret ({row.content})" if row.content else row.kind
