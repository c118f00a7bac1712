"""Which models to serve: `--model_name` and `--model_base_path`, or a ModelServerConfig text.

Source: tensorflow_serving/config/model_server_config.proto; the refusals are those of
model_servers/server_core.cc.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from tdxd.host import tf_messages
from tdxd.model_server.flags import StartError
from tdxd.model_server.versions import Policy

__all__ = ["ModelConfig", "parse_model_config", "read_model_list"]

_LATEST = Policy()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model: its directory holds a directory for each version, named by its number."""

    name: str
    base_path: str
    policy: Policy = _LATEST
    labels: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise StartError("a model has no name")
        if not os.path.isabs(self.base_path):
            text = f"Expected model {self.name} to have an absolute path or URI"
            raise StartError(f"{text}; got base_path()={self.base_path}")


def parse_model_config(text: str, *, source: str) -> tuple[ModelConfig, ...]:
    """Parse a ModelServerConfig in protobuf's text format.

    Raises: StartError for bad text, a custom config, duplicate names, relative paths, and
    platforms other than TensorFlow.
    """
    from google.protobuf import text_format

    config = tf_messages.model_server_config().ModelServerConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as exc:
        what = "Error parsing text-format tensorflow.serving.ModelServerConfig"
        raise StartError(f"{what}: {source}: {exc}") from exc
    if config.WhichOneof("config") != "model_config_list":
        raise StartError(f"{source}: no model_config_list")
    return read_model_list(config.model_config_list)


def read_model_list(message: Any) -> tuple[ModelConfig, ...]:
    """Read a ModelConfigList message.

    Raises: StartError for duplicate names, relative paths, other platforms than TensorFlow.
    """
    models = tuple(_model(one) for one in message.config)
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            text = f"Illegal to list model {name} multiple times in config list"
            raise StartError(text)
    return models


def _model(message: Any) -> ModelConfig:
    platform = message.model_platform
    if not platform:
        raise StartError(
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            "ModelServerConfig::model_platform.",
            hint=f'model {message.name}: write model_platform: "tensorflow"',
        )
    if platform != "tensorflow":
        raise StartError(
            f"Model {message.name} requests unsupported platform {platform}",
            hint='write model_platform: "tensorflow"; it is the only one',
        )
    return ModelConfig(
        name=message.name,
        base_path=message.base_path,
        policy=_policy(message.model_version_policy),
        labels=dict(message.version_labels),
    )


def _policy(message: Any) -> Policy:
    kind = message.WhichOneof("policy_choice")
    if kind == "all":
        return Policy(kind="all")
    if kind == "specific":
        return Policy(kind="specific", versions=frozenset(message.specific.versions))
    return Policy(count=max(message.latest.num_versions, 1))
