"""The command line of `tensorflow_model_server`, of which every flag is known here.

A flag has an effect, or has none here and is harmless (a line in the log says so), or would
promise what this server does not do, and is refused. Two deliberate differences to the original,
which prints `unknown argument` and goes on with defaults: an unknown flag ends the program, and
so does anything that is not `--name=value`. The exit code of every failed start is 255, as there.

Source: tensorflow_serving/model_servers/main.cc of 2.19.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Literal

from tdxd.errors import ServeError

__all__ = ["Flags", "StartError", "parse_flags", "usage"]


class StartError(ServeError):
    """The server cannot start; exit code 255, as `tensorflow_model_server` ends."""

    code = "serve-start"
    exit_code = 255


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Flag:
    kind: Literal["bool", "int", "str"]
    default: str
    does: Literal["acts", "moot", "ignored", "refused"] = "acts"


def _ignored(kind: Literal["bool", "int", "str"], default: str) -> _Flag:
    return _Flag(kind=kind, default=default, does="ignored")


def _refused(kind: Literal["bool", "int", "str"], default: str) -> _Flag:
    return _Flag(kind=kind, default=default, does="refused")


_FLAGS: Mapping[str, _Flag] = {
    "port": _Flag(kind="int", default="8500"),
    "grpc_socket_path": _Flag(kind="str", default=""),
    "model_name": _Flag(kind="str", default="default"),
    "model_base_path": _Flag(kind="str", default=""),
    "model_config_file": _Flag(kind="str", default=""),
    "file_system_poll_wait_seconds": _Flag(kind="int", default="1"),
    "max_num_load_retries": _Flag(kind="int", default="5"),
    "load_retry_interval_micros": _Flag(kind="int", default="60000000"),
    "grpc_channel_arguments": _Flag(kind="str", default=""),
    "grpc_max_threads": _Flag(kind="int", default="0"),
    "tensorflow_session_parallelism": _Flag(kind="int", default="0"),
    "tensorflow_intra_op_parallelism": _Flag(kind="int", default="0"),
    "tensorflow_inter_op_parallelism": _Flag(kind="int", default="0"),
    "saved_model_tags": _Flag(kind="str", default="serve"),
    "enable_model_warmup": _Flag(kind="bool", default="true"),
    "num_request_iterations_for_warmup": _Flag(kind="int", default="0"),
    "enable_serialization_as_tensor_content": _Flag(kind="bool", default="false"),
    "version": _Flag(kind="bool", default="false"),
    "help": _Flag(kind="bool", default="false"),
    # What these ask for holds anyway: a thread of its own loads, and there is no profiler.
    "num_load_threads": _Flag(kind="int", default="0", does="moot"),
    "num_unload_threads": _Flag(kind="int", default="0", does="moot"),
    "enable_profiler": _Flag(kind="bool", default="true", does="moot"),
    "flush_filesystem_caches": _Flag(kind="bool", default="true", does="moot"),
    "enable_batching": _ignored("bool", "false"),  # each request runs by itself
    "rest_api_num_threads": _ignored("int", "0"),
    "rest_api_timeout_in_ms": _ignored("int", "30000"),
    "allow_version_labels_for_unavailable_models": _ignored("bool", "false"),
    "per_process_gpu_memory_fraction": _ignored("str", "0"),
    "enable_signature_method_name_check": _ignored("bool", "false"),
    "prefer_tflite_model": _ignored("bool", "false"),
    # These would promise a server, a check or a numeric behaviour that is not there.
    "rest_api_port": _refused("int", "0"),
    "ssl_config_file": _refused("str", ""),
    "monitoring_config_file": _refused("str", ""),
    "model_config_file_poll_wait_seconds": _refused("int", "0"),
    "batching_parameters_file": _refused("str", ""),
    "enable_per_model_batching_parameters": _refused("bool", "false"),
    "enable_grpc_healthcheck_service": _refused("bool", "false"),
    "tensorflow_session_config_file": _refused("str", ""),
    "platform_config_file": _refused("str", ""),
    "mixed_precision": _refused("str", ""),
    "use_alts_credentials": _refused("bool", "false"),
    "remove_unused_fields_from_bundle_metagraph": _ignored("bool", "true"),
}
_REFUSED_HINTS = {
    "rest_api_port": "REST is not there yet; use gRPC, and --rest_api_port=0",
    "ssl_config_file": "this server has no TLS: put tdxd's front before it",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags that have an effect. `notes` are lines for the log."""

    port: int
    grpc_socket_path: str
    model_name: str
    model_base_path: str
    model_config_file: str
    poll_wait_s: int
    """Seconds between looks at the directories; 0: look once; negative: never."""
    load_retries: int
    load_retry_interval_s: float
    channel_arguments: tuple[tuple[str, int | str], ...]
    grpc_max_threads: int
    intra_op_threads: int
    inter_op_threads: int
    saved_model_tags: frozenset[str]
    warmup_rounds: int
    """How often each request of a warm-up file is executed; 0: not at all."""
    respond_with_content: bool
    version: bool
    help: bool
    notes: tuple[str, ...]


def parse_flags(argv: Sequence[str]) -> Flags:
    """Parse `--name=value` arguments; a boolean's bare `--name` means true.

    Raises: StartError for an unknown flag, a bad value, a flag that is not supported, and a
    server that would listen nowhere.
    """
    given = dict(_split(argument) for argument in argv)
    notes = []
    for name, value in given.items():
        flag = _FLAGS[name]
        # An empty --ssl_config_file means plaintext in the original: fail closed here.
        if flag.does == "refused" and (value != flag.default or name.startswith("ssl")):
            raise StartError(
                f"--{name}={value}: not supported by this server",
                hint=_REFUSED_HINTS.get(name, "leave the flag out"),
            )
        if flag.does == "ignored" and value != flag.default:
            notes.append(f"--{name}={value} has no effect in this server")
    values = {name: given.get(name, flag.default) for name, flag in _FLAGS.items()}
    flags = _flags(values, tuple(notes))
    if not (flags.help or flags.version):
        _check(flags)
    return flags


def _flags(values: Mapping[str, str], notes: tuple[str, ...]) -> Flags:
    both = int(values["tensorflow_session_parallelism"])
    return Flags(
        port=int(values["port"]),
        grpc_socket_path=values["grpc_socket_path"],
        model_name=values["model_name"],
        model_base_path=values["model_base_path"],
        model_config_file=values["model_config_file"],
        poll_wait_s=int(values["file_system_poll_wait_seconds"]),
        load_retries=int(values["max_num_load_retries"]),
        load_retry_interval_s=int(values["load_retry_interval_micros"]) / 1e6,
        channel_arguments=_channel_arguments(values["grpc_channel_arguments"]),
        grpc_max_threads=int(values["grpc_max_threads"]),
        intra_op_threads=int(values["tensorflow_intra_op_parallelism"]) or both,
        inter_op_threads=int(values["tensorflow_inter_op_parallelism"]) or both,
        saved_model_tags=frozenset(values["saved_model_tags"].split(",")),
        warmup_rounds=_warmup_rounds(values),
        respond_with_content=values["enable_serialization_as_tensor_content"] == "true",
        version=values["version"] == "true",
        help=values["help"] == "true",
        notes=notes,
    )


def _warmup_rounds(values: Mapping[str, str]) -> int:
    """Return the rounds of the warm-up: one, if their number is left to the server."""
    if values["enable_model_warmup"] == "false":
        return 0
    return max(int(values["num_request_iterations_for_warmup"]), 1)


def _split(argument: str) -> tuple[str, str]:
    name, equals, value = argument.removeprefix("--").partition("=")
    flag = _FLAGS.get(name)
    if flag is None or not argument.startswith("--"):
        near = difflib.get_close_matches(name, list(_FLAGS), n=1)
        hint = f"did you mean --{near[0]}=…?" if near else "see --help"
        raise StartError(f"unknown argument: {argument}", hint=hint)
    if not equals:
        if flag.kind != "bool":
            raise StartError(
                f"--{name} has no value", hint=f"write --{name}=VALUE, with no space"
            )
        value = "true"
    if not _valid(flag, value):
        want = {"bool": "true or false", "int": "a whole number", "str": "text"}
        raise StartError(f"--{name}={value}: expected {want[flag.kind]}")
    return name, value


def _valid(flag: _Flag, value: str) -> bool:
    if flag.kind == "bool":
        return value in ("true", "false")
    if flag.kind == "int":
        digits = value.removeprefix("-")
        return digits.isascii() and digits.isdigit() and len(digits) < 16
    return True


def _channel_arguments(text: str) -> tuple[tuple[str, int | str], ...]:
    made: list[tuple[str, int | str]] = []
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise StartError(
                f"--grpc_channel_arguments: {item!r} has no value",
                hint="write name=value,name=value",
            )
        made.append((name, int(value) if value.lstrip("-").isdigit() else value))
    return tuple(made)


def _check(flags: Flags) -> None:
    if not 0 <= flags.port <= 65535:
        raise StartError(f"--port={flags.port}: expected 0 to 65535")
    if flags.port == 0 and not flags.grpc_socket_path:
        raise StartError(
            "--port=0 without --grpc_socket_path: nothing to listen on",
            hint="give one of them",
        )
    if not flags.model_config_file and not flags.model_base_path:
        raise StartError(
            "both --model_base_path and --model_config_file are empty",
            hint="--model_base_path=/models/NAME, which holds /models/NAME/1/saved_model.pb",
        )
    negative = flags.load_retries < 0 or flags.load_retry_interval_s < 0
    if negative or flags.grpc_max_threads < 0:
        raise StartError("a count, an interval or a number of threads is negative")


def usage() -> str:
    """Return the text of `--help`."""
    lines = ["usage: tdx-model-server [--name=value …]", ""]
    lines += ["A drop-in for tensorflow_model_server. Flags with their defaults:"]
    remarks = {"ignored": "  (no effect)", "refused": "  (not supported)"}
    for name, flag in _FLAGS.items():
        lines.append(f"  --{name}={flag.default}{remarks.get(flag.does, '')}")
    return "\n".join(lines)
