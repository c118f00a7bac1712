"""What a mounted volume offers: models, and the front's certificate."""

from __future__ import annotations

import dataclasses
import os

from tdxd.errors import HostError, MissingError, NotReadyError

__all__ = ["Model", "models_in", "read_certificate", "read_client_ca"]

_CERTIFICATE = "tls/server.pem"
_CLIENT_CA = "tls/client-ca.pem"
_CERTIFICATE_MAX_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A model of a volume: its name and its version numbers, ascending."""

    name: str
    versions: tuple[int, ...]


def models_in(mount_point: str) -> tuple[Model, ...]:
    """Return the models below `models/`, by name.

    Raises: NotReadyError for a model without a version directory (TensorFlow Serving would
    wait for one for ever), or a volume without models.
    """
    directory = os.path.join(mount_point, "models")
    try:
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    except OSError as exc:
        raise HostError.of("list", directory, exc) from exc
    if not names:
        raise NotReadyError(
            f"volume at {mount_point} holds no model", hint="seal models/NAME/VERSION/…"
        )
    return tuple(_model(directory, name) for name in names)


def _model(directory: str, name: str) -> Model:
    path = os.path.join(directory, name)
    versions = sorted(
        int(entry.name)
        for entry in os.scandir(path)
        if entry.is_dir() and entry.name.isascii() and entry.name.isdigit()
    )
    if not versions:
        raise NotReadyError(
            f"model {name!r} in {directory} has no version directory",
            hint=f"seal it as models/{name}/1/saved_model.pb",
        )
    return Model(name=name, versions=tuple(versions))


def read_certificate(mount_point: str) -> bytes:
    """Return the PEM of the front's certificate chain and private key; it is secret.

    Raises: MissingError if the volume has none.
    """
    hint = "make one with tdx-seal cert, or name another volume in serving.tls_volume"
    return _read_pem(mount_point, _CERTIFICATE, hint)


def read_client_ca(mount_point: str) -> bytes:
    """Return the PEM of the certificates that sign those of clients.

    Raises: MissingError if the volume has none.
    """
    hint = "seal it beside tls/server.pem, or leave serving.client_ca out"
    return _read_pem(mount_point, _CLIENT_CA, hint)


def _read_pem(mount_point: str, name: str, hint: str) -> bytes:
    path = os.path.join(mount_point, name)
    try:
        with open(path, "rb") as file:
            return file.read(_CERTIFICATE_MAX_BYTES)
    except FileNotFoundError as exc:
        text = f"volume at {mount_point} has no {name}"
        raise MissingError(text, hint=hint) from exc
    except OSError as exc:
        raise HostError.of("read", path, exc) from exc
