"""The deliberate way on with a store that came back older than its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

from tdxd.errors import DataError
from tdxd.owner.audit.checkpoint import Checkpoint
from tdxd.owner.audit.checkpoint_compare import rollback_record
from tdxd.owner.audit.verify import verify
from tdxd.owner.server.config import read_config
from tdxd.owner.store.changes import Transaction
from tdxd.owner.store.rows import PolicyRow
from tdxd.owner.store.seal import StoreIntegrityError
from tdxd.owner.store.store import Store

__all__ = ["accept_rollback"]

_LOST_POLICY = "# lost when the store came back from a backup: set it again\n"


def accept_rollback(
    directory: Path, store: Store, checkpoint: Checkpoint, now_s: int
) -> int:
    """Go on with a store that is behind a checkpoint; return the number of the record of it.

    The numbers of what is lost are not used again: records, revisions and policy versions go on
    after those of the checkpoint, and its collateral floors hold.

    Raises: DataError if the store is not behind it, StoreIntegrityError if more is wrong,
    ConfigError, HostError.
    """
    deployment = bytes.fromhex(read_config(directory).deployment)
    found = verify(store, checkpoint, deployment=deployment)
    if checkpoint.deployment != deployment or found.troubles != found.behind:
        raise StoreIntegrityError(
            f"{directory}: {found.troubles[0]}",
            hint="this is no mere rollback: restore a backup first",
        )
    if not found.behind:
        raise DataError(f"{directory} is not behind this checkpoint")
    with store.transaction() as change:
        seal, state = change.seal(), change.state()
        record = rollback_record(checkpoint, seal, state, now_s)
        change.overtake(checkpoint.revision)
        for name, mark in checkpoint.volumes.items():
            if state.policy_version(name) < mark.policy_version:
                _renumber(change, name, mark.policy_version + 1, now_s)
        change.raise_floors(checkpoint.floors)
        number = max(seal.seq, checkpoint.seq) + 1
        change.append(record, number)
    return number


def _renumber(change: Transaction, volume_id: str, version: int, now_s: int) -> None:
    """Give the policy that stands a version that none of the lost ones had."""
    row = change.policy(volume_id)
    text = row.text if row else _LOST_POLICY
    change.put_policy(
        PolicyRow(volume_id=volume_id, version=version, text=text, set_at_s=now_s)
    )
