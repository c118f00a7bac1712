"""What a store holds, in one value: the seal covers it, so no row can be older than another.

A row's own MAC shows that an owner made it once, not that it still stands: a policy of last year
has its MAC, too. So the state lists the MACs of the rows that stand, and the collateral floors.
Canonical msgpack: a map of `floors` {name: number}, `generations` {id: [[number, mac, present],
...]}, `policies` {id: [version, mac]} and `token_keys` {key id in hex: mac}.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tdxd.core.decode import decode_canonical, encode_canonical
from tdxd.errors import DataError

__all__ = ["State"]

_STATE_MAX_BYTES = 256 * 1024 * 1024


@dataclasses.dataclass(slots=True, kw_only=True)
class State:
    """The state as a transaction changes it.

    `policies` has version and MAC by volume id; `generations` by volume id and number the MAC and
    whether it is still there: removed ones stay listed.
    """

    policies: dict[str, tuple[int, bytes]] = dataclasses.field(default_factory=dict)
    generations: dict[str, dict[int, tuple[bytes, bool]]] = dataclasses.field(
        default_factory=dict
    )
    floors: dict[str, int] = dataclasses.field(default_factory=dict)
    token_keys: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def current(self, volume_id: str) -> int:
        """Return the newest generation of a volume that is not removed, 0 without one."""
        held = self.generations.get(volume_id, {})
        return max((number for number, one in held.items() if one[1]), default=0)

    def policy_version(self, volume_id: str) -> int:
        """Return the version of a volume's policy, 0 if none was ever set."""
        return self.policies.get(volume_id, (0, b""))[0]

    def encode(self) -> bytes:
        """Return the canonical bytes."""
        return encode_canonical(
            {
                "floors": self.floors,
                "generations": {
                    name: [[number, *held[number]] for number in sorted(held)]
                    for name, held in self.generations.items()
                },
                "policies": {name: list(pair) for name, pair in self.policies.items()},
                "token_keys": self.token_keys,
            }
        )

    @staticmethod
    def parse(body: bytes, *, source: str) -> State:
        """Decode what `encode` made; only for bytes that the seal covers.

        Raises: DataError.
        """
        found: Any = decode_canonical(body, source=source, max_bytes=_STATE_MAX_BYTES)
        try:
            return State(
                policies={
                    name: (one[0], one[1]) for name, one in found["policies"].items()
                },
                generations={
                    name: {number: (mac, present) for number, mac, present in held}
                    for name, held in found["generations"].items()
                },
                floors=found["floors"],
                token_keys=found["token_keys"],
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as exc:
            raise DataError(f"{source}: not a state of this version") from exc
