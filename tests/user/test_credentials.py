"""Client certificates: files, and servers that want them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization

from tdxd.errors import DataError, HostError, UnavailableError
from tdxd.user.credentials import read_identity
from tdxd.user.endpoint import Endpoint
from tdxd.user.infer import Model, predict
from tests.certificates import self_signed
from tests.user.double import running_double

X: dict[str | None, Any] = {"x": np.array([[1.5]], np.float32)}


@pytest.fixture
def files(tmp_path):
    """Write a key and its certificate, apart (client.key, client.crt) and in one file."""
    both, public = self_signed("client")
    (tmp_path / "both.pem").write_bytes(both)
    (tmp_path / "client.crt").write_bytes(public)
    (tmp_path / "client.key").write_bytes(both.removesuffix(public))
    return tmp_path


def test_one_file_or_two(files):
    both = read_identity(str(files / "both.pem"))
    apart = read_identity(str(files / "client.crt"), str(files / "client.key"))
    assert both == apart
    assert apart.chain_pem == (files / "client.crt").read_bytes()
    assert b"PRIVATE" not in apart.chain_pem
    assert "PRIVATE" not in repr(apart)
    endpoint = Endpoint(address="a:1", ca_pem=b"x", identity=apart)
    assert "PRIVATE" not in repr(endpoint)


def test_files_that_do_not_fit(files):
    certificate = str(files / "client.crt")
    with pytest.raises(HostError, match="No such file"):
        read_identity(certificate, str(files / "none"))
    with pytest.raises(DataError, match="no private key in it"):
        read_identity(certificate)
    with pytest.raises(DataError, match="no certificate in it"):
        read_identity(str(files / "client.key"))
    other, _public = self_signed("client")
    (files / "other.key").write_bytes(other)
    with pytest.raises(DataError, match="not the private key to the certificate"):
        read_identity(certificate, str(files / "other.key"))


def test_an_error_about_a_key_does_not_quote_it(files):
    text = (files / "client.key").read_text().splitlines()
    broken = "\n".join([text[0], "SECRETSECRET", text[-1], ""])
    (files / "broken.key").write_text(broken)
    with pytest.raises(DataError, match="not a private key") as caught:
        read_identity(str(files / "client.crt"), str(files / "broken.key"))
    assert "SECRET" not in f"{caught.value} {caught.value.hint}"
    assert caught.value.__cause__ is None


def test_a_key_with_a_passphrase(files):
    key = serialization.load_pem_private_key((files / "client.key").read_bytes(), None)
    for form in ("PKCS8", "TraditionalOpenSSL"):
        text = key.private_bytes(
            serialization.Encoding.PEM,
            getattr(serialization.PrivateFormat, form),
            serialization.BestAvailableEncryption(b"1234"),
        )
        (files / "closed.key").write_bytes(text)
        with pytest.raises(DataError, match="has a passphrase"):
            read_identity(str(files / "client.crt"), str(files / "closed.key"))


def test_mutual_tls(files):
    identity = read_identity(str(files / "both.pem"))
    stranger_pem, _public = self_signed("stranger")
    (files / "stranger.pem").write_bytes(stranger_pem)
    stranger = read_identity(str(files / "stranger.pem"))
    public = (files / "client.crt").read_bytes()
    with running_double(files, client_ca_pem=public) as double:
        ca_pem = double.ca.read_bytes()

        def ask(identity):
            endpoint = Endpoint(
                address=double.address, ca_pem=ca_pem, identity=identity
            )
            return predict(endpoint, Model(name="double"), X)

        assert ask(identity).outputs["y"].tolist() == [[3.0]]
        for one, words in ((None, "want its clients to"), (stranger, "believe the")):
            with pytest.raises(UnavailableError, match="the server hung up") as caught:
                ask(one)
            assert words in caught.value.hint
        assert len(double.requests) == 1


def test_without_tls(tmp_path):
    with running_double(tmp_path, tls=False) as double:
        endpoint = Endpoint(address=double.address, ca_pem=None)
        assert endpoint.channel_kind == "insecure"
        assert predict(endpoint, Model(name="double"), X).outputs["y"].size == 1
