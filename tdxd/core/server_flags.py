"""Which model server a program is, and which flags it knows.

TensorFlow Serving takes an unknown flag for a reason to print its usage and go on with defaults,
which listen on all interfaces: so no flag reaches it that its version does not have.

Source: tensorflow_serving/model_servers/main.cc of 2.11 to 2.19, and its release notes.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Final, Literal

from tdxd.errors import ConfigError

__all__ = [
    "OLDEST",
    "ServerVersion",
    "check_extra_flag",
    "check_flags",
    "parse_version",
]

OLDEST: Final = (2, 11)
"""The first version of TensorFlow Serving that has all flags that are needed."""

_OURS: Final = frozenset(
    (
        "port",
        "grpc_socket_path",
        "grpc_channel_arguments",
        "rest_api_port",
        "rest_api_unix",
        "model_name",
        "model_base_path",
        "model_config_file",
        "model_config_file_poll_wait_seconds",
        "file_system_poll_wait_seconds",
        "ssl_config_file",
        "use_alts_credentials",
        "batching_parameters_file",
        "monitoring_config_file",
        "enable_profiler",
        "version",
        "help",
    )
)
"""Set from other keys, or fixed: what listens where, and who may call it, is not for a flag."""

_SINCE: Final[dict[str, tuple[int, int]]] = {
    "enable_grpc_healthcheck_service": (2, 15),
    "mixed_precision": (2, 15),
    "enable_serialization_as_tensor_content": (2, 19),
}
_SINCE_OLDEST: Final = (
    "allow_version_labels_for_unavailable_models",
    "enable_batching",
    "enable_model_warmup",
    "enable_per_model_batching_parameters",
    "enable_signature_method_name_check",
    "flush_filesystem_caches",
    "grpc_max_threads",
    "load_retry_interval_micros",
    "max_num_load_retries",
    "num_load_threads",
    "num_request_iterations_for_warmup",
    "num_unload_threads",
    "per_process_gpu_memory_fraction",
    "platform_config_file",
    "prefer_tflite_model",
    "remove_unused_fields_from_bundle_metagraph",
    "rest_api_num_threads",
    "rest_api_timeout_in_ms",
    "saved_model_tags",
    "tensorflow_inter_op_parallelism",
    "tensorflow_intra_op_parallelism",
    "tensorflow_session_config_file",
    "tensorflow_session_parallelism",
    *_OURS,
)
_FLAG = re.compile(r"--([a-z][a-z0-9_]*)=\S*")
_VERSION = re.compile(
    r"^TensorFlow ModelServer: (\d{1,4})\.(\d{1,4})(\S*)", re.MULTILINE
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerVersion:
    """What a program said of itself: the drop-in answers in TensorFlow Serving's form."""

    kind: Literal["tensorflow", "drop-in"]
    number: tuple[int, int]

    @property
    def usable(self) -> bool:
        """Whether it has the flags that are needed."""
        return self.kind == "drop-in" or self.number >= OLDEST

    def __str__(self) -> str:
        name = "TensorFlow Serving" if self.kind == "tensorflow" else "the drop-in"
        return f"{name} {self.number[0]}.{self.number[1]}"


def parse_version(text: str) -> ServerVersion | None:
    """Parse what `--version` prints; `None` if this is no model server."""
    found = _VERSION.search(text)
    if found is None:
        return None
    kind: Literal["tensorflow", "drop-in"] = (
        "drop-in" if "tdx-model-server" in found[3] else "tensorflow"
    )
    return ServerVersion(kind=kind, number=(int(found[1]), int(found[2])))


def check_extra_flag(flag: str) -> None:
    """Check the form of a configured flag, and that it is not one that tdxd sets itself.

    Raises: ValueError, naming it.
    """
    found = _FLAG.fullmatch(flag)
    if found is None:
        msg = f"extra_flags: {flag!r} is not --name=value"
        raise ValueError(msg)
    if found[1] in _OURS:
        msg = f"extra_flags: {flag!r} is set by tdxd itself"
        raise ValueError(msg)


def check_flags(flags: tuple[str, ...], version: ServerVersion) -> None:
    """Check that a server of this version knows all flags; the drop-in checks its own.

    Raises: ConfigError, naming the first that it does not, with a hint.
    """
    if version.kind == "drop-in":
        return
    known = [
        *_SINCE_OLDEST,
        *(n for n, since in _SINCE.items() if since <= version.number),
    ]
    for flag in flags:
        name = flag.removeprefix("--").partition("=")[0]
        if name in known:
            continue
        if name in _SINCE:
            hint = "it came with {}.{}".format(*_SINCE[name])
        else:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{near[0]}=…?" if near else "leave it out"
        msg = f"serving.extra_flags: {version} does not know {flag}"
        raise ConfigError(msg, hint=hint)
