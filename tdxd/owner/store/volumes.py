"""What the store holds of each volume or named secret, opened once, until the store changes.

Nothing that is not as it was sealed is used: such a volume opens for nobody, and its trouble says
which row is wrong. The unwrapped bundles stay in the memory of the key server, beside the
key-encryption key that opens them: keeping them gives nothing away that the process does not hold
anyway.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

from tdxd.core.policy import parse_policy
from tdxd.core.secret import Secret
from tdxd.errors import ConfigError, DataError
from tdxd.owner.appraisal.judge import Finding
from tdxd.owner.store.kek import Kek, unwrap
from tdxd.owner.store.store import GenerationRow, PolicyRow, SealedVolume, Store

__all__ = ["VolumeState", "Volumes"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VolumeState:
    """One volume or secret: its policy, and the bundles that this lets be served, if they open.

    `served` are their generations, the newest first; `present` all that the store has, the oldest
    first. `trouble` says why there are no bundles; where rows are not as they were sealed, it names
    them, and there is no policy either. `manifests` are (generation, SHA-256 of the manifest in
    hex) of all generations that the owner ever added.
    """

    revision: int
    finding: Finding
    policy_version: int
    served: tuple[int, ...] = ()
    bundles: tuple[Secret, ...] = ()
    trouble: str = ""
    present: tuple[int, ...] = ()
    manifests: frozenset[tuple[int, str]] = frozenset()

    @property
    def generation(self) -> int:
        """The newest that may be served, 0 for none."""
        return self.served[0] if self.served else 0


class Volumes:
    """A view of the store for the server; safe to use from several threads."""

    def __init__(self, store: Store, kek: Kek) -> None:
        self._store = store
        self._kek = kek
        self._lock = threading.Lock()
        self._revision = 0
        self._states: dict[str, VolumeState] = {}
        self._ids: frozenset[str] | None = None

    def state(self, volume_id: str) -> VolumeState:
        """Return the state of a volume, of some revision: the newest that this process has seen.

        A decision by it stands only if the transaction that records it finds that revision.

        Raises: StoreIntegrityError, HostError, BusyError.
        """
        with self._lock:
            found = self._states.get(volume_id)
            if found is None:
                found = self._load(volume_id, self._store.sealed_volume(volume_id))
                self._at(found.revision)
                if (
                    found.finding.known
                ):  # anybody may ask for any id: only ours are kept
                    self._states[volume_id] = found
            return found

    def renew(self, revision: int) -> None:
        """Forget what is not of this revision of the store."""
        with self._lock:
            self._at(revision)

    def _at(self, revision: int) -> None:
        """Keep what is of one revision: parts of two would say what the store never said."""
        if revision != self._revision:
            self._revision, self._states, self._ids = revision, {}, None

    def knows(self, volume_id: str, generation: int, manifest_sha256: bytes) -> bool:
        """Say whether the owner ever added this generation with this manifest.

        Removed ones count: a guest that served one has its event in its log until it boots again.

        Raises: StoreIntegrityError, HostError, BusyError.
        """
        if volume_id not in self._sealed_ids():
            return False
        return (generation, manifest_sha256.hex()) in self.state(volume_id).manifests

    def _sealed_ids(self) -> frozenset[str]:
        """Return all ids that ever had a generation; a log may name thousands of others."""
        with self._lock:
            if self._ids is None:
                seal, state = self._store.sealed()
                self._at(seal.revision)
                self._ids = frozenset(state.generations)
            return self._ids

    def _load(self, volume_id: str, held: SealedVolume) -> VolumeState:
        row = held.policy
        version = row.version if row else 0
        present = [one for one in held.generations if not one.removed_at_s]
        if held.trouble:
            return VolumeState(
                revision=held.revision,
                finding=Finding(known=True, policy=None, policy_trouble=held.trouble),
                policy_version=version,
                trouble=held.trouble,
            )
        finding = _finding(volume_id, row, known=bool(present))
        numbers = tuple(one.generation for one in present)
        served: tuple[int, ...] = ()
        if finding.policy is not None:
            served = finding.policy.release.generations.of(numbers)
        rows = {one.generation: one for one in present}
        if served and rows[served[0]].kind == "secret":
            served = served[:1]  # an older content is of no use beside a newer one
        bundles, trouble = self._open([rows[number] for number in served])
        return VolumeState(
            revision=held.revision,
            finding=finding,
            policy_version=version,
            served=served,
            bundles=bundles,
            trouble=trouble,
            present=numbers,
            manifests=frozenset(
                (one.generation, one.manifest_sha256)
                for one in held.generations
                if one.kind != "secret"  # no guest extends RTMR3 by one
            ),
        )

    def _open(self, rows: Sequence[GenerationRow]) -> tuple[tuple[Secret, ...], str]:
        """Open all or none."""
        bundles = []
        for row in rows:
            try:
                opened = unwrap(self._kek, row.wrapped, row.volume_id, row.generation)
            except DataError as exc:
                return (), exc.message
            with opened.secret:
                bundles.append(Secret(opened.encode()))
        return tuple(bundles), ""


def _finding(volume_id: str, row: PolicyRow | None, *, known: bool) -> Finding:
    if row is None:
        return Finding(known=known, policy=None)
    try:
        policy = parse_policy(row.text, source=f"policy of {volume_id}")
    except ConfigError as exc:
        return Finding(known=known, policy=None, policy_trouble=exc.message)
    return Finding(known=known, policy=policy)
