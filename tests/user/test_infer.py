"""Requests to a double over real TLS, and what failures become."""

from __future__ import annotations

import socket
import threading
from typing import Any

import numpy as np
import pytest

from tdxd.errors import (
    EX_DATAERR,
    EX_TEMPFAIL,
    EX_UNAVAILABLE,
    DataError,
    HostError,
    TdxdError,
    UsageError,
)
from tdxd.user.endpoint import MAX_MESSAGE_BYTES, Endpoint, read_ca
from tdxd.user.infer import Model, encode_request, predict
from tests.certificates import self_signed
from tests.user.double import running_double

X: dict[str | None, Any] = {"x": np.array([[1.5, 2.0]], np.float32)}


@pytest.fixture
def double(tmp_path):
    with running_double(tmp_path) as running:
        yield running


def endpoint_of(double, **options):
    return Endpoint(address=double.address, ca_pem=double.ca.read_bytes(), **options)


def test_an_answer_comes_back_as_arrays(double):
    got = predict(endpoint_of(double), Model(name="double", version=3), X)
    assert (got.model, got.version, got.signature) == ("double", 3, "serving_default")
    assert got.outputs["y"].tolist() == [[3.0, 4.0]]
    assert len(double.requests) == 1  # named arrays: nothing to ask before


def test_an_unnamed_input_takes_the_signatures_only_name(double):
    got = predict(endpoint_of(double), Model(name="double"), {None: [[2]]})
    assert got.outputs["y"].tolist() == [[4.0]]
    assert [type(one).__name__ for one in double.requests] == [
        "GetModelMetadataRequest",
        "PredictRequest",
    ]


def test_an_unknown_signature_is_told_with_those_there_are(double):
    model = Model(name="double", signature="x")
    with pytest.raises(DataError) as caught:
        predict(endpoint_of(double), model, {None: [1]})
    assert caught.value.hint == "it has: serving_default, two"


def failure(endpoint, model="double", given=X):
    with pytest.raises(TdxdError) as caught:
        predict(endpoint, Model(name=model), given)
    return caught.value


def test_unknown_model(double):
    error = failure(endpoint_of(double), "nope")
    assert "NOT_FOUND: Servable not found for request: Latest(nope)" in error.message
    assert error.exit_code == EX_UNAVAILABLE


def test_wrong_input(double):
    error = failure(endpoint_of(double), given={"q": X["x"]})
    assert "INVALID_ARGUMENT: no x" in error.message
    assert error.exit_code == EX_DATAERR


def test_no_answer_in_time(double):
    error = failure(endpoint_of(double, timeout_s=0.2), "slow")
    assert error.message.endswith("no answer within 0.2 s")
    assert error.exit_code == EX_TEMPFAIL


def test_refused_load_is_temporary(double):
    endpoint = endpoint_of(double)
    for _ in range(2):
        predict(endpoint, Model(name="busy"), X)
    assert failure(endpoint, "busy").exit_code == EX_TEMPFAIL


def test_nobody_listens(double):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    endpoint = Endpoint(address=f"localhost:{port}", ca_pem=double.ca.read_bytes())
    error = failure(endpoint)
    assert "no connection" in error.message
    assert error.exit_code == EX_UNAVAILABLE


def test_another_server_answers(double):
    _private, other = self_signed("localhost")
    error = failure(Endpoint(address=double.address, ca_pem=other))
    assert "certificate is not one that --ca vouches for" in error.message
    assert not double.requests


def test_a_certificate_of_another_name(tmp_path):
    with running_double(tmp_path, name="other.example") as double:
        error = failure(endpoint_of(double))
        assert error.message.endswith("certificate does not name 'localhost'")
        assert error.hint == "--server-name NAME, if another name is right"
        assert not double.requests
        named = endpoint_of(double, server_name="other.example")
        assert predict(named, Model(name="double"), X).outputs["y"].size == 2


def test_a_server_without_tls(double):
    def answer(listener):
        connection, _peer = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        error = failure(Endpoint(address=address, ca_pem=double.ca.read_bytes()))
        thread.join()
    assert "no TLS connection" in error.message


@pytest.mark.parametrize("address", ["localhost", ":1", "a:b:1", "localhost:99999"])
def test_bad_address(address):
    with pytest.raises(UsageError):
        Endpoint(address=address, ca_pem=b"")


def test_bad_timeout():
    with pytest.raises(UsageError, match="not greater than 0"):
        Endpoint(address="a:1", ca_pem=b"", timeout_s=0)


def test_a_private_key_beside_the_certificate_is_left_out(tmp_path):
    both, public = self_signed("localhost")
    path = tmp_path / "server.pem"
    path.write_bytes(both)
    assert read_ca(str(path)) == public


def test_a_file_without_certificate(tmp_path):
    path = tmp_path / "ca.pem"
    with pytest.raises(HostError):
        read_ca(str(path))
    path.write_text("hello")
    with pytest.raises(DataError, match="no certificate in it"):
        read_ca(str(path))


def test_a_request_that_is_too_long_is_not_sent():
    array = np.zeros(MAX_MESSAGE_BYTES + 1, np.uint8)
    with pytest.raises(DataError, match="at most"):
        encode_request(Model(name="m"), {"x": array})
