"""One named secret as the daemon has it: its content in sealed memory, and what came before."""

from __future__ import annotations

import hashlib
import os

from tdxd.core.named_secret import SECRET_CONTENT_MAX_BYTES
from tdxd.errors import StaleSecretError
from tdxd.guest.handover import HandedSecret
from tdxd.guest.leased import Lease, LeasedSecret
from tdxd.host import clock
from tdxd.host.sealed_memory import is_sealed, read_sealed, sealed_memory

__all__ = ["HeldSecret"]


class HeldSecret:
    """Generation and digest are of the newest content that ever came, also once it is forgotten.

    So no older one takes its place. `sha256` is in hex, of the content; `since` is for people.
    """

    def __init__(self, secret_id: str) -> None:
        self.id = secret_id
        self.generation = 0
        self.content = ""
        self.sha256 = ""
        self.since = ""
        self.lease: Lease | None = None
        self._fd = -1

    def __repr__(self) -> str:
        there = "there" if self.there else "not there"
        return f"HeldSecret({self.id}@{self.generation}, {there})"

    @property
    def there(self) -> bool:
        """Whether there is a content, which is not said to be one that may be used still."""
        return self._fd >= 0

    def read(self) -> bytes | None:
        """Return the content.

        Raises: HostError.
        """
        if not self.there:
            return None
        return read_sealed(self._fd, SECRET_CONTENT_MAX_BYTES)

    def take(self, leased: LeasedSecret) -> bool:
        """Hold what was released, with its lease; say whether it is news. The caller wipes it.

        Raises: StaleSecretError for an older generation, or the same with another content;
        HostError.
        """
        manifest, data = leased.bundle.manifest, leased.bundle.secret.reveal()
        digest, number = hashlib.sha256(data).hexdigest(), manifest.generation
        if number < self.generation:
            self._refuse(f"generation {number}, older than {self.generation}, which")
        if number == self.generation and digest != self.sha256:
            self._refuse(f"generation {number} with another content than")
        news = number > self.generation or not self.there
        if news:
            fd = sealed_memory(f"tdxd:secret:{self.id}", data)
            self.forget()
            self._fd, self.generation, self.sha256 = fd, number, digest
            self.content, self.since = manifest.content, clock.wall_clock()
        self.lease = leased.lease()
        return news

    def _refuse(self, what: str) -> None:
        text = f"secret {self.id}: the key server releases {what} this guest had"
        hint = "give the content again: tdx-keyd secret put makes a newer generation"
        raise StaleSecretError(text, hint=hint)

    def forget(self) -> None:
        """Let the content go; harmless when repeated."""
        if self.there:
            os.close(self._fd)
        self._fd, self.lease = -1, None

    # --- over an exec ---

    def hand_over(self) -> HandedSecret:
        """Return what the program after this one needs: the content goes by its descriptor."""
        return HandedSecret(
            secret_id=self.id,
            generation=self.generation,
            content=self.content,
            sha256=self.sha256,
            since=self.since,
            fd=self._fd,
            lease=self.lease,
        )

    @classmethod
    def adopt(cls, handed: HandedSecret) -> HeldSecret:
        """Go on with what the program before this one had, if it is what it says.

        Raises: HostError.
        """
        held = cls(handed.secret_id)
        held.generation, held.sha256 = handed.generation, handed.sha256
        held.content, held.since = handed.content, handed.since
        if handed.fd >= 0:
            held._fd, held.lease = handed.fd, handed.lease
            data = held.read() or b"" if is_sealed(handed.fd) else b""
            if hashlib.sha256(data).hexdigest() != handed.sha256:
                held.forget()
        return held
