"""The front's certificates: from the volume or the secrets that the configuration names."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

from tdxd.core.config import Config
from tdxd.errors import DataError, NotReadyError
from tdxd.guest.handover import ServedVolume
from tdxd.guest.volume_reader import VolumeReader
from tdxd.host import content, haproxy

__all__ = [
    "CertificateSources",
    "Certificates",
    "NoSecrets",
    "Secrets",
    "certificates_key",
    "volume_is_there",
]

_HINT = "the front needs a certificate with its unencrypted private key, as PEM"


class Secrets(Protocol):
    """The named secrets that are here."""

    def pem(self, secret_id: str) -> bytes | None:
        """Return the content of one; `None` while it is not here."""
        ...

    def tag(self, secret_id: str) -> str | None:
        """Return "ID@generation", which changes with the content; `None` while it is not here."""
        ...


class NoSecrets:
    """None at all."""

    def pem(self, secret_id: str) -> bytes | None:
        """Return nothing."""
        del secret_id
        return None

    def tag(self, secret_id: str) -> str | None:
        """Return nothing."""
        del secret_id
        return None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """The front's own with its private key, and that of its clients' authority, as PEM.

    Each `…_source` names the generation of the volume or the secret that it is from.
    """

    server: bytes = dataclasses.field(repr=False)
    client_ca: bytes | None = dataclasses.field(default=None, repr=False)
    server_source: str = ""
    client_ca_source: str = ""

    @property
    def sources(self) -> tuple[str, ...]:
        """Where they are from, the server's first."""
        named = (self.server_source, self.client_ca_source)
        return tuple(one for one in named if one)

    def check(self) -> None:
        """Check them before HAProxy does, whose words would not name the source.

        Raises: DataError.
        """
        from tdxd.core import endpoint_proof, tls_pem  # load cryptography

        _check(tls_pem.server_certificate, self.server, self.server_source)
        _check(endpoint_proof.key_digest_of_pem, self.server, self.server_source)
        if self.client_ca is not None:
            _check(tls_pem.authorities, self.client_ca, self.client_ca_source)

    def fit_a_command(self) -> bool:
        """Say whether each is short enough to be given to a running front."""
        from tdxd.core.tls_pem import blocks  # loads cryptography

        sizes = [len(blocks(pem)) for pem in (self.server, self.client_ca or b"")]
        return max(sizes) <= haproxy.PAYLOAD_MAX_BYTES

    @contextlib.contextmanager
    def in_memory(self) -> Iterator[tuple[int, int | None]]:
        """Return descriptors of memory files with both, for a child to inherit."""
        with _memory("tdxd:certificate", self.server) as server_fd:
            if self.client_ca is None:
                yield server_fd, None
                return
            with _memory("tdxd:client-ca", self.client_ca) as client_ca_fd:
                yield server_fd, client_ca_fd


class CertificateSources:
    """Finds the front's certificates, by a configuration and the volumes that are mounted."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets, self._reader = secrets, VolumeReader()

    def key(self, config: Config, volumes: tuple[ServedVolume, ...]) -> str | None:
        """Return a key that differs when the front needs other certificates.

        `None` while there are none to give it.
        """
        serving = config.serving
        if serving is None:
            return None
        sources = [self._source(config, volumes, serving.tls_secret)]
        if serving.client_ca is not None:
            sources.append(self._source(config, volumes, serving.client_ca_secret))
        there = [one for one in sources if one is not None]
        return certificates_key(there) if len(there) == len(sources) else None

    async def read(
        self, config: Config, volumes: tuple[ServedVolume, ...]
    ) -> Certificates:
        """Return them.

        Raises: NotReadyError if what supplies them is not there; MissingError, StalledError,
        HostError.
        """
        serving = config.serving
        assert serving is not None, "without it there is no front"
        client_ca, ca_source = None, ""
        if serving.client_ca is not None:
            client_ca, ca_source = await self._read(
                config, volumes, serving.client_ca_secret, content.read_client_ca
            )
        server, source = await self._read(
            config, volumes, serving.tls_secret, content.read_certificate
        )
        return Certificates(
            server=server,
            client_ca=client_ca,
            server_source=source,
            client_ca_source=ca_source,
        )

    def revoked(
        self,
        config: Config,
        sources: tuple[str, ...],
        volumes: frozenset[tuple[str, int | None]],
    ) -> bool:
        """Say whether one of these must not be used any longer.

        That is, its volume is among these, or the secret was taken away. One that is no longer
        configured is replaced instead.
        """
        gone = {_of_volume(name, generation) for name, generation in volumes}
        serving = config.serving
        if serving is not None:
            for secret in (serving.tls_secret, serving.client_ca_secret):
                if secret is not None and self._secrets.tag(secret) is None:
                    gone |= {one for one in sources if _is_of_secret(one, secret)}
        return not gone.isdisjoint(sources)

    def _source(
        self, config: Config, volumes: tuple[ServedVolume, ...], secret: str | None
    ) -> str | None:
        if secret is not None:
            tag = self._secrets.tag(secret)
            return None if tag is None else f"secret {tag}"
        volume = _tls_volume(config, volumes)
        return None if volume is None else _of_volume(*_named(volume))

    async def _read(
        self,
        config: Config,
        volumes: tuple[ServedVolume, ...],
        secret: str | None,
        read: Callable[[str], bytes],
    ) -> tuple[bytes, str]:
        """Return the content of a secret, or what the volume of the certificate has instead."""
        source = self._source(config, volumes, secret)
        if secret is not None:
            pem = self._secrets.pem(secret)
            if pem is None or source is None:
                raise NotReadyError(
                    f"secret {secret}, which the front needs, is not here yet",
                    hint="tdxctl status says why",
                )
            return pem, source
        volume = _tls_volume(config, volumes)
        if volume is None or source is None:
            raise _no_volume(config.tls_volume)
        point = volume.mount_point
        return await self._reader.read(point, partial(read, point)), source


def certificates_key(sources: Iterable[str]) -> str:
    """Return the key of certificates from these sources."""
    return ", ".join(sources)


def volume_is_there(config: Config, volumes: tuple[ServedVolume, ...]) -> bool:
    """Say whether the volume of the certificate, if there is to be one, is mounted."""
    return config.tls_volume is None or _tls_volume(config, volumes) is not None


def _tls_volume(
    config: Config, volumes: tuple[ServedVolume, ...]
) -> ServedVolume | None:
    return next((one for one in volumes if one.volume_id == config.tls_volume), None)


def _no_volume(volume_id: str | None) -> NotReadyError:
    if volume_id is None:
        return NotReadyError(
            "no volume supplies the front's certificate",
            hint="name one in serving.tls_volume, or a secret in serving.tls_secret",
        )
    return NotReadyError(
        f"volume {volume_id}, which holds the certificate, is not mounted"
    )


def _named(volume: ServedVolume) -> tuple[str, int]:
    return volume.volume_id, volume.generation


def _of_volume(volume_id: str, generation: int | None) -> str:
    return f"volume {volume_id}@{generation}"


def _is_of_secret(source: str, secret: str) -> bool:
    return source.startswith(f"secret {secret}@")


def _check(check: Callable[[bytes], object], pem: bytes, source: str) -> None:
    try:
        check(pem)
    except DataError as exc:
        named = f"{source}: {exc.message}" if source else exc.message
        raise DataError(named, hint=_HINT) from None


@contextlib.contextmanager
def _memory(name: str, pem: bytes) -> Iterator[int]:
    fd = haproxy.secret_memfd(name, pem)
    try:
        yield fd
    finally:
        os.close(fd)
