"""Floors: what was once seen of Intel never goes back, not over a restart and not by a PCCS.

An old set that has not expired yet would hide the newest TCB recovery and the newest revocations.
Intel's CRL numbers do not help: they have all been 1 for years. So the time of issue has a floor
as well, with some slack: sets are renewed one by one, each with the lists of its day, and the older
of two must last while its source is down.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Protocol

from tdxd.core.check import Check
from tdxd.core.showing import when
from tdxd.owner.collateral.prepared import Prepared

__all__ = ["Floors", "StoreFloors", "floor_check", "floor_values"]

_TIME = "-time/"
_ROOT_DIGITS = 16


class Floors(Protocol):
    """Where floors are kept; a name that was never raised has none."""

    def get(self) -> Mapping[str, int]:
        """Return all floors."""
        ...

    def raise_to(self, values: Mapping[str, int]) -> None:
        """Raise each named floor to at least its value; none ever goes down."""
        ...


class _Raising(Protocol):
    def raise_floors(self, floors: Mapping[str, int], /) -> None: ...


class _FloorStore(Protocol):
    def floors(self) -> Mapping[str, int]: ...
    def transaction(self) -> contextlib.AbstractContextManager[_Raising]: ...


class StoreFloors:
    """Floors in the key server's store, shared by all its processes."""

    def __init__(self, store: _FloorStore) -> None:
        self._store = store

    def get(self) -> Mapping[str, int]:
        """Return all floors.

        Raises: HostError, BusyError.
        """
        return self._store.floors()

    def raise_to(self, values: Mapping[str, int]) -> None:
        """Raise each named floor to at least its value; writes only if one goes up.

        Raises: HostError, BusyError.
        """
        held = self.get()
        higher = {
            name: value
            for name, value in values.items()
            if name not in held or value > held[name]
        }
        if higher:
            with self._store.transaction() as change:
                change.raise_floors(higher)


def floor_values(prepared: Prepared, root_key_sha384: str, ca: str) -> dict[str, int]:
    """Return the floors that this set would raise, by name.

    Names end with the root's key, so that a simulated root never touches Intel's floors.
    """
    root = root_key_sha384[:_ROOT_DIGITS]
    return {
        f"tcb-evaluation/{root}/{prepared.fmspc}": prepared.tcb_evaluation,
        f"qe-evaluation/{root}": prepared.qe_evaluation,
        f"pck-crl/{root}/{ca}": prepared.pck_crl_number,
        f"root-crl/{root}": prepared.root_crl_number,
        f"pck-crl-time/{root}/{ca}": prepared.issued["pck_crl"],
        f"root-crl-time/{root}": prepared.issued["root_ca_crl"],
    }


def floor_check(
    values: Mapping[str, int], floors: Mapping[str, int], *, crl_rollback_s: float
) -> Check:
    """Compare a set with the floors; a floor that does not exist yet is met."""
    least = {
        name: floors.get(name, 0) - (crl_rollback_s if _TIME in name else 0)
        for name in values
    }
    below = [name for name, value in values.items() if value < least[name]]
    shown = below or [name for name in values if _TIME not in name]
    return Check(
        name="collateral_floor",
        expected=", ".join(_shown(name, ">= ", int(least[name])) for name in shown),
        actual=", ".join(_shown(name, "", values[name]) for name in shown),
        ok=not below,
    )


def _shown(name: str, relation: str, value: int) -> str:
    number = when(max(value, 0)) if _TIME in name else str(max(value, 0))
    return f"{name.partition('/')[0]} {relation}{number}"
