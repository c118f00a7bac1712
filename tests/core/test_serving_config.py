"""The table `[serving]`, and the flags that a model server's version knows."""

from __future__ import annotations

import dataclasses

import pytest

from tdxd.core.config import Config, ServingConfig, parse_config
from tdxd.core.server_flags import check_flags, parse_version
from tdxd.errors import ConfigError

BASE = """
[key_release]
servers = ["keys:1"]
ca = "/ca"
signing_key = "ed25519:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
[[volume]]
id = "m"
image = "/m.img"
"""
OURS = (
    "TensorFlow ModelServer: 2.19.0+tdx-model-server.0.1.0\nTensorFlow Library: 2.21.0"
)
THEIRS = "TensorFlow ModelServer: {}-rc2+dev.sha.fd28f31\nTensorFlow Library: 2.11.0"


def parsed(text: str) -> Config:
    return parse_config([("t", BASE + text)])


def serving(text: str) -> ServingConfig:
    made = parsed("[serving]\n" + text).serving
    assert made is not None
    return made


def test_models_and_batching_are_read() -> None:
    made = serving(
        """
        rest_listen = "[::]:8501"
        client_ca = "volume"
        [serving.batching]
        max_batch_size = 8
        timeout_s = 0.005
        allowed_batch_sizes = [4, 8]
        [[serving.model]]
        name = "digits"
        policy = "specific"
        versions = [1, 3]
        labels = { stable = 1, canary = 3 }
        """
    )
    assert made.batching is not None
    assert made.batching.allowed_batch_sizes == (4, 8)
    assert made.versions_of("digits").labels == {"stable": 1, "canary": 3}
    assert made.versions_of("other").policy == "latest"


REFUSED = {
    'rest_listen = "8501"': "not HOST:PORT",
    'client_ca = "/etc/ca.pem"': "expected one of 'volume', 'secret'",
    'strategy = "blue-green"': "expected one of 'side-by-side', 'replace-in-place'",
    'tls_secret = "web"\ntls_volume = "m"': "tls_volume 'm' and tls_secret 'web' are both",
    'tls_secret = "../web"': "'../web'",
    'tls_secret = "web"\nclient_ca = "volume"': "set client_ca to 'secret'",
    'client_ca = "secret"': "'secret' and client_ca_secret need each other",
    'client_ca_secret = "ca"': "'secret' and client_ca_secret need each other",
    'client_ca = "volume"\nclient_ca_secret = "ca"': "need each other",
    "max_request_bytes = 0": "max_request_bytes 0 is not greater than 0",
    "client_requests_per_s = 0": "client_requests_per_s 0 is not greater",
    "monitoring = true": "monitoring needs rest_listen",
    'read_paths = ["/"]': "'/' is not an absolute path below /",
    'extra_flags = ["--port 8500"]': "'--port 8500' is not --name=value",
    'extra_flags = ["--port=8500"]': "'--port=8500' is set by tdxd itself",
    'extra_flags = ["--ssl_config_file="]': "is set by tdxd itself",
    'extra_flags = ["--enable_profiler=true"]': "is set by tdxd itself",
    "[serving.batching]\nmax_batch_size = 0": "max_batch_size 0 is not greater",
    "[serving.batching]\nallowed_batch_sizes = [4, 2]": "are not ascending",
    "[serving.batching]\nallowed_batch_sizes = [4]": "not with max_batch_size",
    '[[serving.model]]\nname = "a"\npolicy = "specific"': "which needs some",
    '[[serving.model]]\nname = "a"\nversions = [1]': "for policy 'specific'",
    '[[serving.model]]\nname = "a"\n[[serving.model]]\nname = "a"': "stands twice",
    '[[serving.model]]\nname = "a"\npolicy = "specific"\nversions = [1]\nlabels = {x = 2}': (
        "label 'x' is for version 2, not served"
    ),
}


def test_certificates_may_be_secrets() -> None:
    """With several volumes, too, none of which has a certificate then."""
    other = '[[volume]]\nid = "other"\nimage = "/o.img"\n'
    made = parsed(
        other
        + """
        [serving]
        tls_secret = "web"
        client_ca = "secret"
        client_ca_secret = "clients"
        """
    )
    assert made.tls_volume is None
    assert made.serving is not None
    assert (made.serving.tls_secret, made.serving.client_ca_secret) == (
        "web",
        "clients",
    )


def test_where_certificates_are_from_makes_no_other_front() -> None:
    """But whether clients need one does."""
    one, two, open_to_all = (
        serving('client_ca = "volume"'),
        serving('tls_secret = "s"\nclient_ca = "secret"\nclient_ca_secret = "ca"'),
        serving(""),
    )
    assert one.of_front() == two.of_front() != open_to_all.of_front()


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="serving") as caught:
        serving(text)
    assert REFUSED[text] in caught.value.message


def test_every_key_belongs_to_the_server_the_front_or_neither() -> None:
    """So that a reload of it starts another process, where that is needed."""
    of_server, of_front = ServingConfig().of_server(), ServingConfig().of_front()
    neither = {
        "ready_timeout_s",
        "drain_timeout_s",
        "strategy",
        "tls_volume",
        "tls_secret",
        "client_ca_secret",
    }
    names = {field.name for field in dataclasses.fields(ServingConfig)}
    assert {*of_server, *of_front} - {"rest"} == names - neither


def test_a_version_is_read_as_the_program_says_it() -> None:
    ours, theirs = parse_version(OURS), parse_version(THEIRS.format("2.11.1"))
    assert ours is not None
    assert theirs is not None
    assert (ours.kind, ours.number, ours.usable) == ("drop-in", (2, 19), True)
    assert (theirs.kind, theirs.number, theirs.usable) == ("tensorflow", (2, 11), True)
    old = parse_version(THEIRS.format("2.6.2"))
    assert old is not None
    assert not old.usable
    assert parse_version("GNU bash, version 5.2.15") is None


UNKNOWN = {
    ("2.11.0", "--mixed_precision=bfloat16"): "it came with 2.15",
    ("2.18.0", "--enable_serialization_as_tensor_content=true"): "it came with 2.19",
    ("2.19.0", "--tensorflow_intra_op_paralelism=2"): "did you mean --tensorflow_intra",
    ("2.19.0", "--zzz=1"): "leave it out",
}


@pytest.mark.parametrize(("number", "flag"), UNKNOWN)
def test_a_flag_that_a_version_does_not_have_is_named(number: str, flag: str) -> None:
    version = parse_version(THEIRS.format(number))
    assert version is not None
    with pytest.raises(ConfigError, match="does not know") as caught:
        check_flags(("--num_load_threads=1", flag), version)
    assert flag in caught.value.message
    assert UNKNOWN[number, flag] in caught.value.hint


def test_newer_versions_know_the_newer_flags() -> None:
    version = parse_version(THEIRS.format("2.19.1"))
    assert version is not None
    check_flags(("--mixed_precision=bfloat16",), version)
