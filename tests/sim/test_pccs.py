"""A key server that reads this PCCS gets collateral that verifies, from the real URLs."""

from __future__ import annotations

import http.client
import json
import urllib.parse
from collections.abc import Iterator
from contextlib import closing

import pytest

from tdxd.errors import HostError, UsageError
from tdxd.sim.pccs import PccsServer
from tdxd.sim.platform import SimPlatform
from tests.dcap import DATA, NOW, verify


@pytest.fixture(scope="module")
def platform() -> SimPlatform:
    return SimPlatform.create()


@pytest.fixture(scope="module")
def server(platform: SimPlatform) -> Iterator[PccsServer]:
    with closing(PccsServer(platform, "127.0.0.1", 0, now_s=lambda: NOW)) as one:
        yield one


def get(server: PccsServer, path: str) -> tuple[int, dict[str, str], bytes]:
    where = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(where.netloc, timeout=10)
    with closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def test_what_is_served_verifies_a_quote(
    platform: SimPlatform, server: PccsServer
) -> None:
    fmspc = platform.fmspc
    pck = get(server, "/sgx/certification/v4/pckcrl?ca=platform&encoding=der")
    root = get(server, "/sgx/certification/v4/rootcacrl")
    tcb = get(server, f"/tdx/certification/v4/tcb?fmspc={fmspc}")
    qe = get(server, "/tdx/certification/v4/qe/identity")
    assert [one[0] for one in (pck, root, tcb, qe)] == [200] * 4
    tcb_info, identity = json.loads(tcb[2]), json.loads(qe[2])
    chain = urllib.parse.unquote
    collateral = {
        "pck_crl_issuer_chain": chain(pck[1]["SGX-PCK-CRL-Issuer-Chain"]),
        "root_ca_crl": root[2].decode(),
        "pck_crl": pck[2].hex(),
        "tcb_info_issuer_chain": chain(tcb[1]["TCB-Info-Issuer-Chain"]),
        "tcb_info": json.dumps(tcb_info["tcbInfo"], separators=(",", ":")),
        "tcb_info_signature": tcb_info["signature"],
        "qe_identity_issuer_chain": chain(qe[1]["SGX-Enclave-Identity-Issuer-Chain"]),
        "qe_identity": json.dumps(identity["enclaveIdentity"], separators=(",", ":")),
        "qe_identity_signature": identity["signature"],
    }
    quote = platform.quote(DATA)
    assert verify(quote, json.dumps(collateral), platform.root_der) == "UpToDate"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/tdx/certification/v4/tcb?fmspc=00806F050000", 404),
        ("/tdx/certification/v4/tcb?fmspc=0080", 400),
        ("/tdx/certification/v4/tcb", 400),
        ("/sgx/certification/v4/pckcrl?ca=processor", 404),
        ("/sgx/certification/v4/pckcrl?ca=other", 400),
        ("/sgx/certification/v4/tcb?fmspc=00806F050000", 404),
        ("/", 404),
    ],
)
def test_anything_else_is_refused_as_a_pccs_does(
    server: PccsServer, path: str, status: int
) -> None:
    assert get(server, path)[0] == status


def test_the_family_may_be_in_lower_case(
    platform: SimPlatform, server: PccsServer
) -> None:
    path = f"/tdx/certification/v4/tcb?fmspc={platform.fmspc.lower()}"
    assert get(server, path)[0] == 200


def test_the_pck_crl_is_hex_unless_der_is_asked_for(server: PccsServer) -> None:
    path = "/sgx/certification/v4/pckcrl?ca=PLATFORM"
    _, plain_headers, plain = get(server, path)
    _, der_headers, der = get(server, path + "&encoding=DER")
    assert bytes.fromhex(plain.decode()) == der
    assert plain_headers["Content-Type"] == "application/x-pem-file"
    assert der_headers["Content-Type"] == "application/pkix-crl"


def test_it_serves_the_loopback_interface_alone(platform: SimPlatform) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "localhost.example"):
        with pytest.raises(UsageError):
            PccsServer(platform, host, 0)


def test_it_serves_ipv6_too(platform: SimPlatform) -> None:
    with closing(PccsServer(platform, "::1", 0, now_s=lambda: NOW)) as server:
        assert server.url.startswith("http://[::1]:")
        assert get(server, "/sgx/certification/v4/rootcacrl")[0] == 200


def test_a_taken_port_is_named(platform: SimPlatform, server: PccsServer) -> None:
    port = urllib.parse.urlsplit(server.url).port
    assert port is not None
    with pytest.raises(HostError, match=f"bind 127.0.0.1:{port}"):
        PccsServer(platform, "127.0.0.1", port)
