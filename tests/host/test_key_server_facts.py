"""How far a conversation with a key server goes, and the words for where it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tdxd.core import keyrelease
from tdxd.core.config import Address, parse_signing_key
from tdxd.guest.answer import parse_challenge
from tdxd.host import key_server_facts
from tdxd.host.key_server_facts import KeyServerFacts, ask_key_server
from tests.certificates import self_signed
from tests.keyserver import Owner, opened_owner, serving


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    with opened_owner(tmp_path_factory.mktemp("owner")) as made:
        yield made


def ask(
    owner: Owner, address: Address | None = None, ca: bytes = b""
) -> KeyServerFacts:
    pinned = ca or Path(owner.pin.ca).read_bytes()
    return ask_key_server(address or owner.address, pinned)


def test_a_good_server_answers_with_its_key(owner: Owner) -> None:
    found = ask(owner)
    assert (found.step, found.problem) == ("answered", None)
    assert found.server == str(owner.address)
    key_id = parse_challenge(found.challenge).signing_key_sha256
    assert key_id == keyrelease.signing_key_id(parse_signing_key(owner.pin.signing_key))


def test_a_clock_is_compared_where_the_server_tells_its_own() -> None:
    told = [("other", "x"), (keyrelease.CLOCK_KEY, "1000")]
    assert key_server_facts.ahead(told, 1600.0) == 600.0
    assert key_server_facts.ahead([], 1600.0) is None
    for nonsense in ("", "x", b"\xff", "9" * 5000):
        assert key_server_facts.ahead([(keyrelease.CLOCK_KEY, nonsense)], 0.0) is None


def test_a_server_of_another_ca_is_named(owner: Owner) -> None:
    other = self_signed("127.0.0.1")[1]
    found = ask(owner, ca=other)
    assert found.step == "certificate"
    assert found.problem is not None
    assert "self-signed" in found.problem.message or "issuer" in found.problem.message
    assert "server-ca.pem" in found.problem.hint


def test_a_file_that_is_no_ca_is_named(owner: Owner) -> None:
    for junk in (b"no PEM", b"\xff\xfe"):
        found = ask(owner, ca=junk)
        assert found.step == "certificate"
        assert found.problem is not None
        assert "key_release.ca holds no certificate" in found.problem.message


def test_a_certificate_of_another_name_is_named(owner: Owner) -> None:
    with serving(owner.service, owner.server_tls(["keys.example"])) as address:
        found = ask(owner, address)
    assert found.step == "certificate"
    assert found.problem is not None
    assert "another name" in found.problem.hint


def test_where_nobody_listens_is_told(owner: Owner) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    found = ask(owner, Address("127.0.0.1", port))
    assert found.step == "connection"
    assert found.problem is not None
    assert f"127.0.0.1 port {port}: Connection refused" in found.problem.message
    assert "tdx-keyd" in found.problem.hint


def test_a_network_that_is_down_is_told(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_route(_sock: socket.socket, _where: object) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    monkeypatch.setattr(socket.socket, "connect", no_route)
    found = ask(owner)
    assert found.step == "connection"
    assert found.problem is not None
    assert "Network is unreachable" in found.problem.message
    assert "ip route" in found.problem.hint


def test_a_firewall_that_swallows_everything_is_told(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallow(_sock: socket.socket, _where: object) -> None:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket.socket, "connect", swallow)
    found = ask(owner)
    assert found.step == "connection"
    assert found.problem is not None
    assert "timed out" in found.problem.message
    assert "firewall" in found.problem.hint


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid"])
def test_a_name_that_nobody_knows_is_told(owner: Owner, host: str) -> None:
    found = ask(owner, Address(host, 1))
    assert found.step == "name"
    assert found.problem is not None
    assert host in found.problem.message
    assert "resolv.conf" in found.problem.hint


@contextlib.contextmanager
def stranger(says: bytes) -> Iterator[Address]:
    """Listen, say something to whoever comes, and then nothing until the end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = threading.Event()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(says)
                    done.wait(30)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address("127.0.0.1", listener.getsockname()[1])
        finally:
            done.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_what_speaks_no_tls_is_told_in_time(
    owner: Owner, says: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_server_facts, "_STEP_S", 0.5)
    began_s = time.monotonic()
    with stranger(says) as address:
        found = ask(owner, address)
    assert time.monotonic() - began_s < 5
    assert found.step == "certificate"
    assert found.problem is not None
    assert "no TLS" in found.problem.message


class Failing:
    """Answers nothing that a key server would."""

    def challenge(self, _request: bytes, _peer: str) -> bytes:
        raise RuntimeError("broken")

    release = challenge


def test_a_server_that_is_no_key_server_is_told(owner: Owner) -> None:
    with serving(Failing(), owner.server_tls()) as address:
        found = ask(owner, address)
    assert found.step == "challenge"
    assert found.problem is not None
    assert "INTERNAL" in found.problem.message
