"""What the store holds of each volume, opened once and kept until the store changes.

The unwrapped bundles stay in the memory of the key server, beside the key-encryption key that opens
them: keeping them gives nothing away that the process does not hold anyway.
"""

from __future__ import annotations

import dataclasses
import threading

from tdxd.core.hpke import KeyPair
from tdxd.core.policy import parse_policy
from tdxd.core.secret import Secret
from tdxd.errors import ConfigError, DataError
from tdxd.owner.judge import Finding
from tdxd.owner.kek import unwrap
from tdxd.owner.store import PolicyRow, Store

__all__ = ["VolumeState", "Volumes"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VolumeState:
    """One volume: its policy, and the newest generation's bundle, encoded, if it opens.

    `trouble` says why there is no bundle.
    """

    finding: Finding
    policy_version: int
    generation: int
    bundle: Secret | None
    trouble: str = ""


class Volumes:
    """A view of the store for the server; safe to use from several threads."""

    def __init__(self, store: Store, kek: KeyPair) -> None:
        self._store = store
        self._kek = kek
        self._lock = threading.Lock()
        self._revision = -1
        self._states: dict[str, VolumeState] = {}

    def state(self, volume_id: str) -> VolumeState:
        """Return the state of a volume as the store says now.

        Raises: HostError, BusyError.
        """
        with self._lock:
            revision = self._store.revision()
            if revision != self._revision:
                self._states.clear()
                self._revision = revision
            if volume_id not in self._states:
                state = self._load(volume_id)
                if not state.finding.known:
                    return state  # anybody may ask for any id: only ours are kept
                self._states[volume_id] = state
            return self._states[volume_id]

    def _load(self, volume_id: str) -> VolumeState:
        generations = self._store.generations(volume_id)
        row = self._store.policy(volume_id)
        finding = _finding(volume_id, row, known=bool(generations))
        version = row.version if row else 0
        if not generations:
            return VolumeState(
                finding=finding, policy_version=version, generation=0, bundle=None
            )
        newest = generations[-1]
        bundle, trouble = None, ""
        try:
            opened = unwrap(self._kek, newest.wrapped, volume_id, newest.generation)
            with opened.secret:
                bundle = Secret(opened.encode())
        except DataError as exc:
            trouble = exc.message
        return VolumeState(
            finding=finding,
            policy_version=version,
            generation=newest.generation,
            bundle=bundle,
            trouble=trouble,
        )


def _finding(volume_id: str, row: PolicyRow | None, *, known: bool) -> Finding:
    if row is None:
        return Finding(known=known, policy=None)
    try:
        policy = parse_policy(row.text, source=f"policy of {volume_id}")
    except ConfigError as exc:
        return Finding(known=known, policy=None, policy_trouble=exc.message)
    return Finding(known=known, policy=policy)
