"""Collateral: made ready, fetched over HTTP, cached and bounded."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from email.message import Message

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from tdxd.errors import DataError, UnavailableError
from tdxd.owner import pcs
from tdxd.owner.collateral import CollateralCache, prepare
from tdxd.owner.pcs import PcsSource, fetch_collateral
from tdxd.sim.pccs import PccsServer
from tdxd.sim.platform import SimPlatform
from tests.vectors import VECTORS, needs_vectors

NOW = 1_790_000_000
DAY = 86400


@pytest.fixture(scope="module")
def platform():
    return SimPlatform.create()


@pytest.fixture
def pccs(platform):
    server = PccsServer(platform, "127.0.0.1", 0, now_s=lambda: NOW)
    with contextlib.closing(server):
        yield server


# --- preparing ----------------------------------------------------------------


def test_good_signers(platform):
    prepared = prepare(platform.collateral_json(NOW))
    assert [check.ok for check in prepared.signers] == [True, True]
    assert prepared.expires_s == NOW - 3600 + 30 * DAY


def test_expiry_is_the_earliest_in_the_set(platform):
    prepared = prepare(platform.collateral_json(NOW, next_update_s=NOW + 5))
    assert prepared.expires_s == NOW + 5


def test_one_wrong_signer_is_named(platform):
    fields = json.loads(platform.collateral_json(NOW))
    fields["qe_identity_issuer_chain"] = platform.pki.pck_chain_pem
    first, second = prepare(json.dumps(fields)).signers
    assert first.ok
    assert (second.name, second.actual, second.ok) == (
        "qe_identity_signer",
        "tdx-sim PCK Certificate",
        False,
    )


def test_text_between_certificates_does_not_survive(platform):
    fields = json.loads(platform.collateral_json(NOW))
    hidden = platform.pki.pck.pem.replace("CERTIFICATE", "FOO")
    fields["tcb_info_issuer_chain"] = hidden + platform.pki.tcb_chain_pem + "junk"
    prepared = prepare(json.dumps(fields))
    assert prepared.signers[0].ok
    kept = prepared.parsed.tcb_info_issuer_chain
    assert kept == platform.pki.tcb_chain_pem


def test_pck_chain_of_the_collateral_is_dropped(platform):
    fields = json.loads(platform.collateral_json(NOW))
    fields["pck_certificate_chain"] = platform.pki.pck_chain_pem
    assert "pck_certificate_chain" not in json.loads(
        prepare(json.dumps(fields)).parsed.to_json()
    ) or not json.loads(prepare(json.dumps(fields)).parsed.to_json()).get(
        "pck_certificate_chain"
    )


@needs_vectors
def test_all_real_collateral_is_readable():
    names = sorted((VECTORS / "collateral").glob("*.json"))
    assert len(names) > 40
    for path in names:
        prepared = prepare(path.read_text())
        assert all(check.ok for check in prepared.signers), path.name


@pytest.mark.parametrize(
    "change",
    [
        {"tcb_info_issuer_chain": ""},
        {"tcb_info_issuer_chain": 7},
        {"tcb_info": "{}"},
        {"tcb_info": "[]"},
        {"qe_identity": "not json"},
        {"pck_crl": "zz"},
        {"root_ca_crl": "00"},
        {"tcb_info_signature": "xx"},
    ],
)
def test_malformed_collateral_is_an_error(platform, change):
    fields = {**json.loads(platform.collateral_json(NOW)), **change}
    with pytest.raises(DataError, match="collateral is malformed"):
        prepare(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{", "[" * 100_000])
def test_text_that_is_no_collateral(text):
    with pytest.raises(DataError, match="collateral is malformed"):
        prepare(text)


# --- fetching -----------------------------------------------------------------


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
def http_answer(status=200, body=b"{}", headers=None, pause=None):
    """A server with one answer for everything."""
    ended = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
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

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
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
    ],
)
def test_bad_answers_are_named(given, error, message):
    with http_answer(**given) as url, pytest.raises(error) as caught:
        fetch_collateral(PcsSource(url=url), "0" * 12, "platform")
    assert message in caught.value.message


def test_slow_answers_are_given_up():
    with (
        http_answer(pause=5) as url,
        pytest.raises(UnavailableError, match="timed out"),
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
    with pytest.raises(DataError, match="header TCB-Info-Issuer-Chain is missing"):
        pcs._chain(Message(), "TCB-Info-Issuer-Chain")


# --- the cache ----------------------------------------------------------------


class Service:
    """Fetches from the platform, as of a moment that the test moves; may be down."""

    def __init__(self, platform):
        self.platform = platform
        self.now_s = NOW
        self.down = False
        self.asked = 0

    def __call__(self, fmspc, ca):
        self.asked += 1
        if self.down:
            raise UnavailableError("collateral: down")
        return self.platform.collateral_json(self.now_s)


@pytest.fixture
def service(platform):
    return Service(platform)


def cache_of(service):
    return CollateralCache(service, refresh_s=DAY)


def test_second_question_is_answered_from_the_cache(service):
    cache = cache_of(service)
    first = cache.get("F", "platform", NOW)
    assert cache.get("F", "platform", NOW + DAY - 1) is first
    assert service.asked == 1


def test_newer_collateral_is_looked_for_every_day(service):
    cache = cache_of(service)
    first = cache.get("F", "platform", NOW)
    service.now_s = NOW + DAY
    assert cache.get("F", "platform", NOW + DAY) is not first
    assert service.asked == 2


def test_unexpired_set_is_used_on_while_the_service_is_down(service):
    cache = cache_of(service)
    first = cache.get("F", "platform", NOW)
    service.down = True
    for later in (DAY, DAY + 1, 29 * DAY):
        assert cache.get("F", "platform", NOW + later) is first
    assert service.asked == 3  # the second question came within the pause


def test_expired_set_is_never_used(service):
    cache = cache_of(service)
    cache.get("F", "platform", NOW)
    service.down = True
    with pytest.raises(UnavailableError, match="down"):
        cache.get("F", "platform", NOW + 30 * DAY)


def test_expired_set_from_the_service_is_refused(service):
    with pytest.raises(UnavailableError, match="has expired"):
        cache_of(service).get("F", "platform", NOW + 31 * DAY)


def test_failure_is_remembered_for_a_while(service):
    service.down = True
    cache = cache_of(service)
    for later in (0, 10, 29):
        with pytest.raises(UnavailableError):
            cache.get("F", "platform", NOW + later)
    assert service.asked == 1
    service.down = False
    assert cache.get("F", "platform", NOW + 30)


def test_many_families_do_not_fill_the_memory(service):
    cache = cache_of(service)
    for number in range(70):
        cache.get(f"{number}", "platform", NOW)
    assert len(cache._entries) == 64


def test_malformed_collateral_is_unavailable():
    cache = CollateralCache(lambda *_: "{}", refresh_s=DAY)
    with pytest.raises(UnavailableError, match="malformed"):
        cache.get("F", "platform", NOW)
