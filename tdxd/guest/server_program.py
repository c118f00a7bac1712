"""Which program serves the models: it is asked who it is before it is trusted with flags."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys

import trio

from tdxd.core.server_flags import OLDEST, ServerVersion, parse_version
from tdxd.core.serving_config import ServingConfig
from tdxd.errors import ConfigError, NotReadyError
from tdxd.guest import isolation
from tdxd.host.ports import ChildSpec, Host

__all__ = ["ServerProgram", "ServerPrograms", "server_command"]

_ASK_S = 60.0
"""Generous: a program of 2 GB with a cold page cache."""
_MAX_LINES = 100


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerProgram:
    """A model server: where it is, and what it said of itself."""

    path: str
    version: ServerVersion


class ServerPrograms:
    """Finds the model server; a program is asked once, until its file changes."""

    def __init__(self, host: Host, runtime_dir: str) -> None:
        self._host, self._runtime_dir = host, runtime_dir
        self._known: dict[tuple[str, int, int], ServerVersion] = {}

    async def choose(self, config: ServingConfig) -> ServerProgram:
        """Return the first candidate that is new enough.

        Raises: ConfigError if there is none, NotReadyError if one does not answer.
        """
        for path in _candidates(config):
            version = await self._version(path, config)
            if version.usable:
                return ServerProgram(path=path, version=version)
            if config.command is not None:
                oldest = "{}.{}".format(*OLDEST)
                raise ConfigError(
                    f"serving.command {path} is {version}, older than {oldest}",
                    hint="tdx-model-server serves the same models",
                )
        raise _none()

    async def _version(self, path: str, config: ServingConfig) -> ServerVersion:
        key = _identity(path)
        if key not in self._known:
            lines = await self._ask(path, config)
            version = parse_version("\n".join(lines))
            if version is None:
                said = next((line for line in lines if line.strip()), "nothing")
                raise NotReadyError(
                    f"{path} is no model server: to --version it said {said[:200]!r}",
                    hint="serving.command names tensorflow_model_server or tdx-model-server",
                )
            self._known[key] = version
        return self._known[key]

    async def _ask(self, path: str, config: ServingConfig) -> list[str]:
        """Run it with `--version`, as unprivileged and confined as when it serves."""
        cell = self._host.children.make_cell(hide=self._runtime_dir, binds=[])
        spec = ChildSpec(
            name="model-server-version",
            argv=(path, "--version"),
            user=config.user,
            cell=cell,
            confinement=isolation.of_server(config, path),
        )
        child = self._host.children.spawn(spec)
        lines: list[str] = []
        try:
            with trio.move_on_after(_ASK_S):
                async for line in child.lines():
                    if len(lines) < _MAX_LINES:
                        lines.append(line)
        finally:
            with trio.CancelScope(shield=True):
                await child.stop(0)
            cell.close()
        return lines


def server_command(config: ServingConfig) -> tuple[str, ...]:
    """Return the configured model server, else the installed one, else the drop-in.

    Raises: ConfigError if there is none.
    """
    return (_candidates(config)[0],)


def _candidates(config: ServingConfig) -> list[str]:
    if config.command is not None:
        return [config.command]
    beside = os.path.join(os.path.dirname(sys.executable), "tdx-model-server")
    names = ("tensorflow_model_server", "tdx-model-server", beside)
    found = [path for path in map(shutil.which, names) if path is not None]
    if not found:
        raise _none()
    return found


def _none() -> ConfigError:
    return ConfigError(
        "no model server is installed",
        hint="install tensorflow_model_server or tdxd[model-server], or set serving.command",
    )


def _identity(path: str) -> tuple[str, int, int]:
    """Tell a program from another one that took its place."""
    try:
        seen = os.stat(shutil.which(path) or path)
    except OSError:
        return path, 0, 0
    return path, seen.st_ino, seen.st_mtime_ns
