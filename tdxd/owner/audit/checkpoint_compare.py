"""Compares a store with a checkpoint, and keeps the record of what an owner gave up.

A store is behind a checkpoint if something that the checkpoint has is not in it: then it came back
from a backup, or a copy of it went on alone. An owner who cannot bring the newer one back says so,
and a record of the log says it for ever (`rollback`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from tdxd.core.check import Check
from tdxd.owner.audit.checkpoint import Checkpoint
from tdxd.owner.audit.record import GENESIS, AuditRecord
from tdxd.owner.store.seal import Seal
from tdxd.owner.store.state import State

__all__ = ["ROLLBACK", "behind_checkpoint", "rollback_record"]

ROLLBACK = "rollback"
"""The `decision` of the record by which an owner gives up what a checkpoint has more."""
_HASH = "SELECT hash FROM audit WHERE seq = ?"


def behind_checkpoint(
    sqlite: sqlite3.Connection,
    checkpoint: Checkpoint,
    seal: Seal,
    state: State,
    rollbacks: list[AuditRecord],
    deployment: bytes,
) -> Iterator[str]:
    """Say in which respects a store is behind a checkpoint, or no successor of it."""
    if checkpoint.deployment != deployment:
        yield f"the checkpoint is of the deployment {checkpoint.deployment.hex()}"
        return
    made = checkpoint.made_at
    if seal.seq < checkpoint.seq:
        yield (
            f"the audit log ends at record {seal.seq}, the checkpoint of {made} has "
            f"{checkpoint.seq}"
        )
    elif not _passed(sqlite, checkpoint) and not _given_up(checkpoint, rollbacks):
        yield (
            f"audit record {checkpoint.seq} is another one than that of the checkpoint of "
            f"{made}"
        )
    if seal.revision < checkpoint.revision:
        yield (
            f"the store is at revision {seal.revision}, the checkpoint of {made} at "
            f"{checkpoint.revision}"
        )
    elif (
        seal.revision == checkpoint.revision
        and seal.state_sha256 != checkpoint.state_sha256
    ):
        yield f"revision {seal.revision} is another one than that of the checkpoint"
    yield from _volumes_behind(checkpoint, seal, state)


def _passed(sqlite: sqlite3.Connection, checkpoint: Checkpoint) -> bool:
    """Say whether the chain goes through the checkpoint's head."""
    if checkpoint.seq == 0:
        return checkpoint.head == GENESIS
    row = sqlite.execute(_HASH, (checkpoint.seq,)).fetchone()
    return row is not None and row[0] == checkpoint.head


def _given_up(checkpoint: Checkpoint, rollbacks: list[AuditRecord]) -> bool:
    """Say whether the owner has given up the history that a checkpoint belongs to."""
    return any(
        checkpoint.head.hex() == one.report_data
        or _lost(one)[0] < checkpoint.seq <= _lost(one)[1]
        for one in rollbacks
    )


def _lost(record: AuditRecord) -> tuple[int, int]:
    """Return the record that the store ended with, and that of the checkpoint."""
    seen = {one.name: one for one in record.checks}["audit_records"]
    return int(seen.actual), int(seen.expected)


def _volumes_behind(checkpoint: Checkpoint, seal: Seal, state: State) -> Iterator[str]:
    for name, mark in sorted(checkpoint.volumes.items()):
        version = state.policy_version(name)
        if version < mark.policy_version:
            yield (
                f"policy of volume {name!r} is version {version}, the checkpoint has "
                f"{mark.policy_version}"
            )
        # A later revision may have removed the generation: the seal vouches for that.
        current = state.current(name)
        if current < mark.generation and seal.revision <= checkpoint.revision:
            yield (
                f"the newest generation of volume {name!r} is {current}, the checkpoint has "
                f"{mark.generation}"
            )
    for name, floor in sorted(checkpoint.floors.items()):
        if state.floors.get(name, 0) < floor:
            yield (
                f"collateral floor {name} is {state.floors.get(name, 0)}, the checkpoint has "
                f"{floor}"
            )


def rollback_record(
    checkpoint: Checkpoint, seal: Seal, state: State, now_s: int
) -> AuditRecord:
    """Make the record by which an owner accepts that a store is older than its checkpoint."""
    pairs = [
        ("audit_records", checkpoint.seq, seal.seq),
        ("revision", checkpoint.revision, seal.revision),
    ]
    for name, mark in sorted(checkpoint.volumes.items()):
        pairs += [
            (f"generation of {name}", mark.generation, state.current(name)),
            (f"policy of {name}", mark.policy_version, state.policy_version(name)),
        ]
    pairs += [
        (f"floor {name}", value, state.floors.get(name, 0))
        for name, value in sorted(checkpoint.floors.items())
    ]
    return AuditRecord(
        at_s=now_s,
        request_id="",
        denial_id=None,
        volume_id="",
        generation=0,
        decision=ROLLBACK,
        reason="accepted by the owner",
        peer="",
        simulated=False,
        policy_version=0,
        report_data=checkpoint.head.hex(),
        checks=tuple(
            Check(
                name=name,
                expected=str(wanted),
                actual=str(actual),
                ok=actual >= wanted,
            )
            for name, wanted, actual in pairs
        ),
    )
