"""What `status` says of this guest's protection."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from tdxd.core.protection import Observed, judge
from tdxd.guest.config_files import LoadedConfig
from tdxd.host.exposure import observe

__all__ = ["Lookout", "shown"]

_AGAIN_S = 30.0
"""A look takes some milliseconds in which nothing else is done."""


class Lookout:
    """Looks at the machine when it is asked, and not again for half a minute."""

    def __init__(
        self,
        look: Callable[[], Observed] = observe,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look, self._now_s = look, now_s
        self._seen: tuple[float, Observed] | None = None

    def observed(self) -> Observed:
        """Return what was seen at most half a minute ago."""
        now_s = self._now_s()
        if self._seen is None or now_s - self._seen[0] >= _AGAIN_S:
            self._seen = (now_s, self._look())
        return self._seen[1]


_THIS_MACHINE = Lookout()


def shown(
    loaded: LoadedConfig, lookout: Lookout = _THIS_MACHINE
) -> list[dict[str, Any]]:
    """Return each matter as plain values, judged by the configuration of now."""
    found = judge(lookout.observed(), loaded.config, loaded.trust)
    return [dataclasses.asdict(one) for one in found]
