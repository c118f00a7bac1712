"""Asks a model server for the state of a model: `ModelService.GetModelStatus`.

Its health service answers SERVING whatever its models do, so only this call tells readiness.
Source: tensorflow_serving/apis/get_model_status.proto.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from tdxd.errors import UnreachableError
from tdxd.host import tf_messages

__all__ = ["ModelStatusClient", "VersionStatus"]

AVAILABLE = 30
END = 50
"""ModelVersionStatus.State: usable; unloaded, or failed to load."""
_CALL_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class VersionStatus:
    """The state of one version; `error` is the server's own text of a failed load."""

    version: int
    state: int
    error: str

    @property
    def available(self) -> bool:
        """Whether requests are answered."""
        return self.state == AVAILABLE and not self.error

    @property
    def pending(self) -> bool:
        """Whether it is on its way to be available."""
        return self.state < AVAILABLE

    @property
    def failed(self) -> bool:
        """Whether it will not become available by itself."""
        return self.state == END and bool(self.error)


class ModelStatusClient:
    """A channel to one model server's unix socket; gRPC is loaded at the first question."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._channel: Any = None

    async def versions(self, model: str) -> tuple[VersionStatus, ...]:
        """Return the states of a model's versions.

        Raises: UnreachableError while the server does not listen or knows no such model.
        """
        if not _listens(self._path):
            raise UnreachableError(f"no model server listens at {self._path}")
        from tdxd.host import rpc

        if self._channel is None:
            self._channel = rpc.unix_channel(self._path)
        messages = tf_messages.model_status()
        request = messages.GetModelStatusRequest()
        request.model_spec.name = model
        answer = await rpc.unary_call(
            self._channel,
            tf_messages.STATUS_METHOD,
            request.SerializeToString(),
            timeout_s=_CALL_TIMEOUT_S,
        )
        response = messages.GetModelStatusResponse.FromString(answer)
        return tuple(
            VersionStatus(
                version=item.version,
                state=item.state,
                error=item.status.error_message if item.status.error_code else "",
            )
            for item in response.model_version_status
        )

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()


def _listens(path: str) -> bool:
    """Say whether there is a socket: cheap, for a large server takes a minute to make it."""
    return os.path.exists(path)
