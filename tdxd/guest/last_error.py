"""The last error of something, kept for people after it has passed."""

from __future__ import annotations

import dataclasses

from tdxd.errors import TdxdError
from tdxd.host import clock

__all__ = ["LastError"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LastError:
    """What an error said, and when by the wall clock."""

    time: str
    code: str
    message: str
    hint: str

    @classmethod
    def of(cls, error: TdxdError) -> LastError:
        """Keep an error's words."""
        return cls(
            time=clock.wall_clock(),
            code=error.code,
            message=error.message,
            hint=error.hint,
        )
