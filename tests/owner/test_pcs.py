"""Fetching collateral from a PCS or PCCS, within bounds."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import socket
import ssl
import threading
import time
from email.message import Message

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from tdxd.errors import ConfigError, DataError, UnavailableError
from tdxd.owner import authority
from tdxd.owner.collateral import pcs
from tdxd.owner.collateral.config import CollateralConfig
from tdxd.owner.collateral.pcs import PcsSource, fetch_collateral
from tdxd.owner.collateral.prepared import prepare
from tdxd.sim.pccs import PccsServer
from tdxd.sim.platform import SimPlatform
from tests.collateral import NOW


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


@pytest.fixture
def pccs(platform):
    server = PccsServer(platform, "127.0.0.1", 0, now_s=lambda: NOW)
    with contextlib.closing(server):
        yield server


def test_fetched_from_a_pccs_is_what_the_platform_signed(platform, pccs):
    got = fetch_collateral(PcsSource(url=pccs.url), platform.fmspc, "platform")
    assert json.loads(got) == json.loads(platform.collateral_json(NOW)) | {
        "root_ca_crl": json.loads(got)["root_ca_crl"],
        "pck_crl": json.loads(got)["pck_crl"],
        "tcb_info_signature": json.loads(got)["tcb_info_signature"],
        "qe_identity_signature": json.loads(got)["qe_identity_signature"],
    }
    assert all(check.ok for check in prepare(got).signers)


def test_unknown_family_is_named(platform, pccs):
    with pytest.raises(UnavailableError, match="HTTP status 404"):
        fetch_collateral(PcsSource(url=pccs.url), "0" * 12, "platform")


@pytest.mark.parametrize(
    ("fmspc", "ca"),
    [("00sim", "platform"), ("../../etc/pa", "platform"), ("0" * 12, "root")],
)
def test_odd_questions_are_never_sent(fmspc, ca):
    with pytest.raises(DataError, match="no collateral for"):
        fetch_collateral(PcsSource(url="http://127.0.0.1:1"), fmspc, ca)


def test_nobody_listens():
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1"):
        fetch_collateral(PcsSource(url="http://127.0.0.1:1"), "0" * 12, "platform")


def test_root_crl_address():
    assert PcsSource(url=pcs.INTEL_PCS_URL).root_crl() == pcs.INTEL_ROOT_CRL_URL
    assert PcsSource(url="http://p/").root_crl() == (
        "http://p/sgx/certification/v4/rootcacrl"
    )
    assert PcsSource(url="http://p", root_crl_url="http://q").root_crl() == "http://q"


@contextlib.contextmanager
def http_answer(status=200, body=b"{}", headers=None, pause=None, tls=None):
    """A server with one answer for everything; `asked` holds the paths."""
    ended = threading.Event()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if pause is not None:
                ended.wait(pause)
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *args):
            pass  # a client that does not trust us goes away

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        scheme = "http" if tls is None else "https"
        url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
        yield type("Url", (str,), {"asked": asked})(url)
    finally:
        ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"status": 500}, UnavailableError, "HTTP status 500"),
        (
            {"status": 302, "headers": {"Location": "http://127.0.0.1:1/"}},
            UnavailableError,
            "HTTP status 302",
        ),
        ({"body": b"x" * (1024 * 1024 + 1)}, DataError, "more than 1048576 bytes"),
        ({}, DataError, "tcbInfo is malformed"),
        ({"headers": {"Content-Encoding": "gzip"}}, DataError, "encoding 'gzip'"),
        ({"headers": {"Content-Length": "7"}}, UnavailableError, "5 bytes are missing"),
        ({"headers": {"X": "y" * 70000}}, UnavailableError, "header line"),
        ({"headers": {f"X-{n}": "y" for n in range(150)}}, UnavailableError, "headers"),
        ({"status": 404}, UnavailableError, "HTTP status 404"),
    ],
)
def test_bad_answers_are_named(given, error, message):
    with http_answer(**given) as url, pytest.raises(error) as caught:
        fetch_collateral(PcsSource(url=url), "0" * 12, "platform")
    assert message in caught.value.message


def test_slow_answers_are_given_up():
    with (
        http_answer(pause=5) as url,
        pytest.raises(UnavailableError, match="takes too long"),
    ):
        fetch_collateral(PcsSource(url=url, timeout_s=0.3), "0" * 12, "platform")


def test_signed_part_keeps_its_exact_text():
    body = b' {"tcbInfo": {"b":1, "a" : "\\u00e4"} , "signature":"0aFF"}\n'
    assert pcs._signed(body, "tcbInfo") == ('{"b":1, "a" : "\\u00e4"}', "0aFF")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"signature":"00","tcbInfo":{}}',
        b'{"tcbInfo":{},"signature":"zz"}',
        b'{"tcbInfo":{},"signature":"00"} x',
        b'{"tcbInfo":{},"more":1,"signature":"00"}',
        b'{"tcbInfo":' + b"[" * 100_000,
        b"\xff",
    ],
)
def test_signed_part_of_another_shape(body):
    with pytest.raises(DataError, match="tcbInfo is malformed"):
        pcs._signed(body, "tcbInfo")


def test_crl_as_pem_and_hex_and_der(platform):
    der = bytes.fromhex(json.loads(platform.collateral_json(NOW))["root_ca_crl"])
    pem = x509.load_der_x509_crl(der).public_bytes(Encoding.PEM)
    for form in (der, pem, der.hex().encode(), der.hex().upper().encode() + b"\n"):
        assert pcs._der(form, "CRL") == der


@pytest.mark.parametrize("junk", [b"", b"zz", b"-----BEGIN X509 CRL-----", b"\xff\xff"])
def test_crl_in_no_known_form(junk):
    if junk:
        with pytest.raises(DataError, match="CRL is neither DER, PEM nor hex"):
            pcs._der(junk, "CRL")
    else:
        assert pcs._der(junk, "CRL") == b""  # refused when it is parsed


def test_missing_chain_header_is_named():
    with pytest.raises(DataError, match="TCB-Info-Issuer-Chain is missing") as caught:
        pcs._chain(Message(), pcs._TCB_CHAIN)
    assert "API version 4" in caught.value.hint


@pytest.mark.parametrize("value", ["", "junk", "-----BEGIN%20CERTIFICATE-----" * 2000])
def test_chain_header_with_something_else(value):
    headers = Message()
    headers["TCB-Info-Issuer-Chain"] = value
    with pytest.raises(DataError, match="holds no certificates"):
        pcs._chain(headers, pcs._TCB_CHAIN)


# --- dialects -----------------------------------------------------------------


@pytest.mark.parametrize("dialect", ["pccs", "old-pccs", "pcs"])
def test_each_kind_of_service_gives_the_same(platform, dialect):
    server = PccsServer(platform, "127.0.0.1", 0, now_s=lambda: NOW, dialect=dialect)
    with contextlib.closing(server):
        got = fetch_collateral(PcsSource(url=server.url), platform.fmspc, "platform")
    signed = json.loads(platform.collateral_json(NOW))
    fields = json.loads(got)
    assert fields["tcb_info"] == signed["tcb_info"]
    assert fields["tcb_info_issuer_chain"] == signed["tcb_info_issuer_chain"]
    assert prepare(got).ok


@pytest.mark.parametrize(
    "path",
    ["/", "/sgx/certification/v4", "/sgx/certification/v4/", "/tdx/certification/v4/"],
)
def test_address_as_intels_own_client_has_it(platform, pccs, path):
    source = PcsSource(url=pccs.url + path)
    assert source.base() == pccs.url
    assert prepare(fetch_collateral(source, platform.fmspc, "platform")).ok


def test_address_below_a_path(platform):
    assert (
        PcsSource(url="https://h/pccs/sgx/certification/v4/").base() == "https://h/pccs"
    )
    assert PcsSource(url="https://h/pccs/").base() == "https://h/pccs"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("/tdx/certification/v4/tcb", "tcbInfo is malformed"),
        ("/tdx/certification/v4/qe/identity", "enclaveIdentity is malformed"),
        ("/sgx/certification/v4/pckcrl", "PCK CRL is neither"),
        ("/sgx/certification/v4/rootcacrl", "root CA CRL is neither"),
    ],
)
def test_each_part_of_a_wrong_shape_is_named(platform, part, message):
    def change(path, right):
        html = b"<html>please log in</html>"
        return dataclasses.replace(right, body=html) if path == part else right

    server = PccsServer(platform, "127.0.0.1", 0, now_s=lambda: NOW, change=change)
    with contextlib.closing(server), pytest.raises(DataError, match=message):
        fetch_collateral(PcsSource(url=server.url), platform.fmspc, "platform")


# --- time ---------------------------------------------------------------------


@pytest.mark.parametrize("part", ["tcb", "rootcacrl"])
def test_a_byte_now_and_then_is_no_progress(platform, part):
    """Each read is quick, headers and body; still the whole has to end in time."""

    def change(path, right):
        slow = path.endswith("/" + part)
        return dataclasses.replace(right, drip_s=0.05) if slow else right

    server = PccsServer(platform, "127.0.0.1", 0, now_s=lambda: NOW, change=change)
    began = time.monotonic()
    with (
        contextlib.closing(server),
        pytest.raises(UnavailableError, match="takes too long"),
    ):
        fetch_collateral(
            PcsSource(url=server.url, timeout_s=0.5), platform.fmspc, "platform"
        )
    assert time.monotonic() - began < 5


def test_time_is_for_all_requests_together(platform):
    """Four answers of 0.3 s each do not fit into 0.5 s."""

    def change(_path, right):
        time.sleep(0.3)
        return right

    server = PccsServer(platform, "127.0.0.1", 0, now_s=lambda: NOW, change=change)
    with (
        contextlib.closing(server),
        pytest.raises(UnavailableError, match=r"takes too long|no time left"),
    ):
        fetch_collateral(
            PcsSource(url=server.url, timeout_s=0.5), platform.fmspc, "platform"
        )


def test_a_listener_that_never_speaks():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for url in (f"http://127.0.0.1:{port}", f"https://127.0.0.1:{port}"):
            with pytest.raises(UnavailableError, match="takes too long"):
                fetch_collateral(
                    PcsSource(url=url, timeout_s=0.2), "0" * 12, "platform"
                )


def test_no_thread_is_left_behind(platform, pccs):
    before = threading.active_count()
    for _ in range(3):
        fetch_collateral(PcsSource(url=pccs.url), platform.fmspc, "platform")
    assert threading.active_count() <= before + 4  # the server's own, one a connection
    assert not [
        one for one in threading.enumerate() if isinstance(one, threading.Timer)
    ]


def test_a_redirect_is_not_followed(platform, pccs):
    header = {
        "Location": pccs.url + f"/tdx/certification/v4/tcb?fmspc={platform.fmspc}"
    }
    with (
        http_answer(status=302, headers=header) as url,
        pytest.raises(UnavailableError) as caught,
    ):
        fetch_collateral(PcsSource(url=url), platform.fmspc, "platform")
    assert "name the final address" in caught.value.hint
    assert len(url.asked) == 1


def test_no_proxy_from_the_environment(platform, pccs, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert fetch_collateral(PcsSource(url=pccs.url), platform.fmspc, "platform")


# --- TLS ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority_files(tmp_path_factory):
    """A CA file, and a server's TLS context under it."""
    directory = tmp_path_factory.mktemp("tls")
    ca_key, ca = authority.make_authority("test")
    key, certificate = authority.issue_server(ca_key, ca, ("127.0.0.1",))
    (directory / "ca.pem").write_bytes(ca.public_bytes(Encoding.PEM))
    pair = authority.key_pem(key) + certificate.public_bytes(Encoding.PEM)
    (directory / "server.pem").write_bytes(pair)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.pem")
    return directory / "ca.pem", context


def test_https_under_the_configured_ca(authority_files):
    ca, context = authority_files
    with (
        http_answer(tls=context) as url,
        pytest.raises(DataError, match="tcbInfo is malformed"),  # so it was read
    ):
        fetch_collateral(PcsSource(url=url, tls_ca=ca), "0" * 12, "platform")
    assert url.asked


def test_https_of_an_unknown_ca(authority_files):
    with (
        http_answer(tls=authority_files[1]) as url,
        pytest.raises(UnavailableError, match="certificate verify failed"),
    ):
        fetch_collateral(PcsSource(url=url), "0" * 12, "platform")
    assert not url.asked


def test_https_of_another_name(authority_files):
    ca, context = authority_files
    with (
        http_answer(tls=context) as url,
        pytest.raises(UnavailableError, match="certificate verify failed"),
    ):
        fetch_collateral(
            PcsSource(url=url.replace("127.0.0.1", "localhost"), tls_ca=ca),
            "0" * 12,
            "platform",
        )


def test_ca_file_that_is_none(tmp_path):
    for path in (tmp_path / "no.pem", tmp_path):
        with pytest.raises(ConfigError, match="tls_ca"):
            PcsSource(url="https://h", tls_ca=path).tls()


# --- the configured addresses -------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://api.trustedservices.intel.com",
        "http://certificates.trustedservices.intel.com/x.der",
        "https://user:secret@h/",
        "https://h:port/",
        "https://h:99999/",
        "https://h/?x=1",
        "https://h/#x",
        "https://b\u00fccher.example/",
        "ftp://h/",
        "//h",
    ],
)
def test_addresses_that_are_refused(url):
    with pytest.raises(ValueError, match="url"):
        CollateralConfig(url=url)
    with pytest.raises(ValueError, match="root_crl_url"):
        CollateralConfig(root_crl_url=url)


def test_intel_over_https_is_the_default():
    assert CollateralConfig().url == "https://api.trustedservices.intel.com"
    assert CollateralConfig(url="http://pccs.local:8081").offline is False


@pytest.mark.parametrize(
    "wrong", [{"max_age_s": 0.0}, {"crl_rollback_s": -1.0}, {"refresh_s": 0.0}]
)
def test_times_that_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CollateralConfig(**wrong)


# --- any bytes ----------------------------------------------------------------


@given(st.binary(max_size=400))
def test_any_body_is_taken_apart_or_refused(body):
    for call in (lambda: pcs._signed(body, "tcbInfo"), lambda: pcs._der(body, "CRL")):
        with contextlib.suppress(DataError):
            call()


@given(st.text(max_size=80), st.text(st.characters(codec="ascii"), max_size=80))
def test_any_signed_text_comes_out_exactly(value, tail):
    document = json.dumps({"x": value, "y": [tail]})
    body = f'{{"tcbInfo":{document},"signature":"00ff"}}'.encode()
    assert pcs._signed(body, "tcbInfo") == (document, "00ff")


@given(st.text(max_size=200))
def test_any_header_is_a_chain_or_refused(value):
    headers = Message()
    headers["SGX-PCK-CRL-Issuer-Chain"] = value
    with contextlib.suppress(DataError):
        pcs._chain(headers, pcs._CRL_CHAIN)
