"""The `[audit]` table of `keyd.toml`: where checkpoints go, and who hears of denials."""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.parse

__all__ = ["AuditConfig"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AuditConfig:
    """Checkpoints and hooks; commands are argv lists, never given to a shell."""

    checkpoint_file: str | None = None
    """Where the newest checkpoint is kept: on another machine's disk, or it proves nothing when the
    whole store is put back. `serve` refuses a store that is behind it."""
    checkpoint_command: tuple[str, ...] = ()
    """Gets each checkpoint on standard input."""
    checkpoint_url: str | None = None
    """Gets each checkpoint by POST."""
    checkpoint_records: int = 100
    """One is exported after this many new audit records at the latest."""
    checkpoint_s: float = 60.0
    """And this long after a new record at the latest."""
    on_denial_command: tuple[str, ...] = ()
    """Gets each denial as JSON on standard input."""
    on_denial_url: str | None = None
    """Gets each denial as JSON by POST."""
    hook_timeout_s: float = 10.0
    """For each command and each POST."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_url", "on_denial_url"):
            url = getattr(self, name)
            if url is not None and not _is_url(url):
                raise ValueError(f"{name} {url!r} is not an http or https address")
        for name in ("checkpoint_command", "on_denial_command"):
            argv = getattr(self, name)
            if argv and not os.path.isabs(argv[0]):
                raise ValueError(f"{name}: {argv[0]!r} is not an absolute path")
        if self.checkpoint_file is not None and not os.path.isabs(self.checkpoint_file):
            raise ValueError(
                f"checkpoint_file {self.checkpoint_file!r} is not an absolute path"
            )
        for name in ("checkpoint_records", "checkpoint_s", "hook_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be greater than 0")

    @property
    def exports(self) -> bool:
        """Whether checkpoints go anywhere."""
        return bool(
            self.checkpoint_file or self.checkpoint_command or self.checkpoint_url
        )

    @property
    def hooks(self) -> bool:
        """Whether anybody hears of denials."""
        return bool(self.on_denial_command or self.on_denial_url)


def _is_url(text: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(text)
        host, _port = parts.hostname, parts.port
    except ValueError:  # brackets without an address, a port that is no number
        return False
    return bool(host) and bool(re.fullmatch(r"https?://[!-.0-~]+(/[!-~]*)?", text))
