"""The command line: what is understood, ignored, refused."""

from __future__ import annotations

import pytest

from tdxd.errors import TdxdError
from tdxd.model_server.flags import StartError, parse_flags, usage

BASE = "--model_base_path=/models/m"


def test_defaults_are_the_originals():
    flags = parse_flags([BASE])
    assert (flags.port, flags.model_name, flags.poll_wait_s) == (8500, "default", 1)
    assert (flags.load_retries, flags.load_retry_interval_s) == (5, 60.0)
    assert flags.saved_model_tags == {"serve"}
    assert flags.notes == ()


def test_the_daemons_command_line_is_understood_without_a_note():
    flags = parse_flags(
        [
            "--port=0",
            "--rest_api_port=0",
            "--grpc_socket_path=/run/tdxd/serve/a.sock",
            "--model_config_file=/run/tdxd/models.config",
            "--max_num_load_retries=1",
            "--load_retry_interval_micros=2000000",
            "--num_load_threads=1",
            "--grpc_channel_arguments=grpc.so_reuseport=0,grpc.primary_user_agent=x",
            "--enable_profiler=false",
        ]
    )
    assert flags.notes == ()
    assert flags.load_retry_interval_s == 2.0
    assert flags.channel_arguments == (
        ("grpc.so_reuseport", 0),
        ("grpc.primary_user_agent", "x"),
    )


@pytest.mark.parametrize(
    ("argument", "text", "hint"),
    [
        ("--prot=1", "unknown argument: --prot=1", "did you mean --port=…?"),
        ("--zzzzzz=1", "unknown argument: --zzzzzz=1", "see --help"),
        ("port=1", "unknown argument: port=1", "did you mean --port=…?"),
        ("--port", "--port has no value", "write --port=VALUE, with no space"),
        ("--port=x", "--port=x: expected a whole number", ""),
        ("--port=٣", "--port=٣: expected a whole number", ""),
        ("--port=99999", "--port=99999: expected 0 to 65535", ""),
        ("--version=yes", "--version=yes: expected true or false", ""),
        ("--rest_api_port=-1", "--rest_api_port=-1: expected 0 to 65535", ""),
        (
            "--rest_api_timeout_in_ms=0",
            "--rest_api_timeout_in_ms: expected 1 or more",
            "",
        ),
        (
            "--ssl_config_file=",
            "--ssl_config_file=: not supported by this server",
            "this server has no TLS: put tdxd's front before it",
        ),
        (
            "--monitoring_config_file=/x",
            "--monitoring_config_file without --rest_api_port: nowhere to show metrics",
            "add --rest_api_port=8501",
        ),
        (
            "--batching_parameters_file=/x",
            (
                "--batching_parameters_file is set without setting --enable_batching to "
                "true."
            ),
            "",
        ),
        (
            "--enable_per_model_batching_parameters",
            (
                "--enable_per_model_batching_parameters is set without setting "
                "--enable_batching to true."
            ),
            "",
        ),
        (
            "--mixed_precision=bfloat16",
            "--mixed_precision=bfloat16: not supported by this server",
            "leave the flag out",
        ),
        (
            "--grpc_channel_arguments=a",
            "--grpc_channel_arguments: 'a' has no value",
            "write name=value,name=value",
        ),
        (
            "--max_num_load_retries=-1",
            "a count, an interval or a number of threads is negative",
            "",
        ),
        (
            "--port=0",
            "--port=0 without --grpc_socket_path: nothing to listen on",
            "give one of them",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(argument, text, hint):
    with pytest.raises(StartError) as caught:
        parse_flags([BASE, argument])
    assert (caught.value.message, caught.value.hint) == (text, hint)
    assert caught.value.exit_code == 255


def test_something_to_serve_is_needed():
    with pytest.raises(StartError, match="model_base_path and --model_config_file"):
        parse_flags([])


def test_a_flag_without_effect_is_noted():
    flags = parse_flags([BASE, "--prefer_tflite_model"])
    assert flags.notes == ("--prefer_tflite_model=true has no effect in this server",)


def test_a_flag_without_effect_at_its_default_is_not_noted():
    assert parse_flags([BASE, "--prefer_tflite_model=false"]).notes == ()


@pytest.mark.parametrize(
    ("arguments", "rounds"),
    [
        ([], 1),
        (["--num_request_iterations_for_warmup=3"], 3),
        (["--enable_model_warmup=false"], 0),
        (["--enable_model_warmup=false", "--num_request_iterations_for_warmup=3"], 0),
    ],
)
def test_how_often_the_warm_up_runs(arguments, rounds):
    assert parse_flags([BASE, *arguments]).warmup_rounds == rounds


def test_session_parallelism_sets_both_pools():
    flags = parse_flags([BASE, "--tensorflow_session_parallelism=3"])
    assert (flags.intra_op_threads, flags.inter_op_threads) == (3, 3)


@pytest.mark.parametrize("flag", ["--help", "--version", "--version=true"])
def test_asking_needs_no_model(flag):
    flags = parse_flags([flag])
    assert flags.help or flags.version


def test_usage_shows_every_flag_with_its_default():
    text = usage()
    assert "  --port=8500\n" in text
    assert "  --ssl_config_file=  (not supported)\n" in text
    assert "  --prefer_tflite_model=false  (no effect)\n" in text


def test_start_errors_are_ours():
    assert issubclass(StartError, TdxdError)
