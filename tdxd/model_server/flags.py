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
    "model_config_file_poll_wait_seconds": _Flag(kind="int", default="0"),
    "allow_version_labels_for_unavailable_models": _Flag(kind="bool", default="false"),
    "file_system_poll_wait_seconds": _Flag(kind="int", default="1"),
    "max_num_load_retries": _Flag(kind="int", default="5"),
    "load_retry_interval_micros": _Flag(kind="int", default="60000000"),
    "grpc_channel_arguments": _Flag(kind="str", default=""),
    "grpc_max_threads": _Flag(kind="int", default="0"),
    "enable_grpc_healthcheck_service": _Flag(kind="bool", default="false"),
    "rest_api_port": _Flag(kind="int", default="0"),
    "rest_api_unix": _Flag(kind="str", default=""),  # not the original's
    "rest_api_num_threads": _Flag(kind="int", default="0"),
    "rest_api_timeout_in_ms": _Flag(kind="int", default="30000"),
    "monitoring_config_file": _Flag(kind="str", default=""),
    "enable_batching": _Flag(kind="bool", default="false"),
    "batching_parameters_file": _Flag(kind="str", default=""),
    "enable_per_model_batching_parameters": _Flag(kind="bool", default="false"),
    "enable_signature_method_name_check": _Flag(kind="bool", default="false"),
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
    "per_process_gpu_memory_fraction": _ignored("str", "0"),
    "prefer_tflite_model": _ignored("bool", "false"),
    # These would promise a server, a check or a numeric behaviour that is not there.
    "ssl_config_file": _refused("str", ""),
    "tensorflow_session_config_file": _refused("str", ""),
    "platform_config_file": _refused("str", ""),
    "mixed_precision": _refused("str", ""),
    "use_alts_credentials": _refused("bool", "false"),
    "remove_unused_fields_from_bundle_metagraph": _ignored("bool", "true"),
}
_REFUSED_HINTS = {
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
    config_poll_wait_s: int
    """Seconds between looks at the file of models; 0: look once."""
    poll_wait_s: int
    """Seconds between looks at the directories; 0: look once; negative: never."""
    spread_labels: bool
    """Whether a reload may give a label to a version that is not available."""
    load_retries: int
    load_retry_interval_s: float
    channel_arguments: tuple[tuple[str, int | str], ...]
    grpc_max_threads: int
    health_service: bool
    rest_port: int
    rest_unix: str
    rest_threads: int
    rest_timeout_s: float
    monitoring_config_file: str
    batching: bool
    batching_parameters_file: str
    batching_per_model: bool
    check_method: bool
    """Whether Classify and Regress want signatures that name them as their method."""
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
    def is_set(name: str) -> bool:
        return values[name] == "true"

    both = int(values["tensorflow_session_parallelism"])
    return Flags(
        port=int(values["port"]),
        grpc_socket_path=values["grpc_socket_path"],
        model_name=values["model_name"],
        model_base_path=values["model_base_path"],
        model_config_file=values["model_config_file"],
        config_poll_wait_s=int(values["model_config_file_poll_wait_seconds"]),
        spread_labels=is_set("allow_version_labels_for_unavailable_models"),
        poll_wait_s=int(values["file_system_poll_wait_seconds"]),
        load_retries=int(values["max_num_load_retries"]),
        load_retry_interval_s=int(values["load_retry_interval_micros"]) / 1e6,
        channel_arguments=_channel_arguments(values["grpc_channel_arguments"]),
        grpc_max_threads=int(values["grpc_max_threads"]),
        health_service=is_set("enable_grpc_healthcheck_service"),
        rest_port=int(values["rest_api_port"]),
        rest_unix=values["rest_api_unix"],
        rest_threads=int(values["rest_api_num_threads"]),
        rest_timeout_s=int(values["rest_api_timeout_in_ms"]) / 1e3,
        monitoring_config_file=values["monitoring_config_file"],
        batching=is_set("enable_batching"),
        batching_parameters_file=values["batching_parameters_file"],
        batching_per_model=is_set("enable_per_model_batching_parameters"),
        check_method=is_set("enable_signature_method_name_check"),
        intra_op_threads=int(values["tensorflow_intra_op_parallelism"]) or both,
        inter_op_threads=int(values["tensorflow_inter_op_parallelism"]) or both,
        saved_model_tags=frozenset(values["saved_model_tags"].split(",")),
        warmup_rounds=_warmup_rounds(values),
        respond_with_content=is_set("enable_serialization_as_tensor_content"),
        version=is_set("version"),
        help=is_set("help"),
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
    for name, port in (("port", flags.port), ("rest_api_port", flags.rest_port)):
        if not 0 <= port <= 65535:
            raise StartError(f"--{name}={port}: expected 0 to 65535")
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
    counts = (
        flags.load_retries,
        flags.load_retry_interval_s,
        flags.grpc_max_threads,
        flags.rest_threads,
        flags.config_poll_wait_s,
    )
    if min(counts) < 0:
        raise StartError("a count, an interval or a number of threads is negative")
    if flags.rest_timeout_s <= 0:
        raise StartError("--rest_api_timeout_in_ms: expected 1 or more")
    if flags.monitoring_config_file and not (flags.rest_port or flags.rest_unix):
        raise StartError(
            "--monitoring_config_file without --rest_api_port: nowhere to show metrics",
            hint="add --rest_api_port=8501",
        )
    for given, name in (
        (flags.batching_parameters_file, "batching_parameters_file"),
        (flags.batching_per_model, "enable_per_model_batching_parameters"),
    ):
        if given and not flags.batching:
            text = f"--{name} is set without setting --enable_batching to true."
            raise StartError(text)


def usage() -> str:
    """Return the text of `--help`."""
    lines = ["usage: tdx-model-server [--name=value …]", ""]
    lines += ["A drop-in for tensorflow_model_server. Flags with their defaults:"]
    remarks = {"ignored": "  (no effect)", "refused": "  (not supported)"}
    for name, flag in _FLAGS.items():
        lines.append(f"  --{name}={flag.default}{remarks.get(flag.does, '')}")
    return "\n".join(lines)
