"""The server certificate: names, rights, and that a TLS client can pin it."""

from __future__ import annotations

import socket
import ssl
import threading

import pytest
from cryptography import x509

from tdxd.errors import UsageError
from tdxd.owner.sealing.certs import make_server_certificate


def names(*hosts: str) -> list[str]:
    _private, public = make_server_certificate(hosts)
    certificate = x509.load_pem_x509_certificate(public)
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(one.value) for one in found.value]


def test_host_names_and_addresses_become_alternative_names():
    given = (
        "model.example.com",
        "*.example.com",
        "localhost",
        "192.0.2.1",
        "2001:db8::1",
    )
    assert names(*given) == list(given)


def test_names_in_other_scripts_are_encoded():
    assert names("bücher.example") == ["xn--bcher-kva.example"]


@pytest.mark.parametrize(
    "name",
    [
        *("", "a b", "a..b", "-a", "a-", "a_b", "*", "a.*.b", "x\0y", "a/b"),
        *("a" * 64, "a." * 127 + "aa", "https://x", "host:8500"),
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UsageError, match="neither a host name nor an IP address"):
        make_server_certificate((name,))


@pytest.mark.parametrize("host", ["model.example.com", "127.0.0.1"])
def test_a_client_that_pins_it_connects(tmp_path, host):
    private, public = make_server_certificate(("model.example.com", "127.0.0.1"))
    (tmp_path / "server.pem").write_bytes(private)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / "server.pem")
    client = ssl.create_default_context(cadata=public.decode())
    one, other = socket.socketpair()

    def serve() -> None:
        with server.wrap_socket(one, server_side=True) as made:
            made.sendall(b"hello")

    thread = threading.Thread(target=serve)
    thread.start()
    with client.wrap_socket(other, server_hostname=host) as made:
        assert made.recv(5) == b"hello"
    thread.join()


def test_it_never_expires():
    _private, public = make_server_certificate(("x",))
    certificate = x509.load_pem_x509_certificate(public)
    assert certificate.not_valid_before_utc.year == 1970
    assert certificate.not_valid_after_utc.year == 9999
