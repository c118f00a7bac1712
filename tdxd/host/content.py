"""What a mounted volume offers: models, and the front's certificate."""

from __future__ import annotations

import dataclasses
import os

from tdxd.errors import HostError, MissingError, NotReadyError
from tdxd.host.os_error import as_host_error

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
    wait for one for ever), or a volume without models; HostError.
    """
    directory = os.path.join(mount_point, "models")
    names = sorted(_directories(directory))
    if not names:
        raise NotReadyError(
            f"volume at {mount_point} holds no model", hint="seal models/NAME/VERSION/…"
        )
    return tuple(_model(directory, name) for name in names)


def _model(directory: str, name: str) -> Model:
    path = os.path.join(directory, name)
    versions = sorted(
        int(name) for name in _directories(path) if name.isascii() and name.isdigit()
    )
    if not versions:
        raise NotReadyError(
            f"model {name!r} in {directory} has no version directory",
            hint=f"seal it as models/{name}/1/saved_model.pb",
        )
    return Model(name=name, versions=tuple(versions))


def _directories(path: str) -> list[str]:
    """Return the names of those in a directory: a block of it may be wrong, or unreadable."""
    with as_host_error("list", path), os.scandir(path) as entries:
        return [entry.name for entry in entries if entry.is_dir()]


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
