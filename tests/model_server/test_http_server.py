"""The HTTP server of the REST API: what it takes, what it cuts off, how it ends."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

from tdxd.model_server.flags import StartError
from tdxd.model_server.http_exchange import HttpLimits
from tdxd.model_server.http_server import HttpServer
from tdxd.model_server.rest_api import Answer, RestApi

DEADLINE_S = 30.0


class Api(RestApi):
    """Answers with what it was sent; `/wait` waits for the gate, `/large` is long."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()

    def computes(self, method: str, path: str) -> bool:
        return method == "POST"

    def answer(self, method: str, path: str, body: bytes) -> Answer:
        if path == "/wait":
            self.entered.set()
            assert self.gate.wait(DEADLINE_S)
        if path == "/large":
            return Answer(status=200, body=b"x" * (64 << 20))
        return Answer(status=200, body=f"{method} {path} {len(body)}".encode())


class Served:
    """A server on a unix socket in a directory."""

    def __init__(self, directory, **limits) -> None:
        self.api = Api()
        self.path = str(directory / "rest")
        self.server = HttpServer(self.api, threads=2, limits=HttpLimits(**limits))
        self.server.listen(port=0, unix_path=self.path)

    def connect(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX)
        made.settimeout(DEADLINE_S)
        made.connect(self.path)
        return made

    def exchange(self, data: bytes) -> bytes:
        """Send bytes; return all that comes until the server closes."""
        with self.connect() as client:
            client.sendall(data)
            return rest_of(client)


def rest_of(client: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            parts.append(part)
    return b"".join(parts)


def answer_of(client: socket.socket) -> bytes:
    """Read one answer from a connection that stays open."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += client.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < size:
        body += client.recv(65536)
    return body


@pytest.fixture
def serve(tmp_path):
    made = []

    def serve(**limits):
        made.append(Served(tmp_path, **limits))
        return made[-1]

    yield serve
    for one in made:
        one.api.gate.set()
        one.server.drain(DEADLINE_S)


def post(path: str = "/", body: bytes = b"", *lines: bytes) -> bytes:
    head = [f"POST {path} HTTP/1.1".encode(), b"Host: x", *lines]
    if not any(line.lower().startswith(b"transfer") for line in lines):
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


CLOSE = b"Connection: close"


def test_requests_follow_each_other_on_one_connection(serve):
    with serve().connect() as client:
        for size in (0, 5):
            client.sendall(post("/a?b=c", b"x" * size))
            assert answer_of(client) == b"POST /a %d" % size


def test_requests_that_come_together_are_answered_in_turn(serve):
    got = serve().exchange(post("/a") + post("/b", b"", CLOSE))
    assert got.index(b"POST /a 0") < got.index(b"POST /b 0")


def test_a_body_in_chunks(serve):
    got = serve().exchange(
        post("/", b"3\r\nabc\r\n0\r\n\r\n", b"Transfer-Encoding: chunked", CLOSE)
    )
    assert got.endswith(b"POST / 3")


def test_a_client_that_asks_before_it_sends(serve):
    with serve().connect() as client:
        client.sendall(post("/", b"abc", b"Expect: 100-continue")[:-3])
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"abc")
        assert answer_of(client) == b"POST / 3"


def test_head_has_no_body(serve):
    got = serve().exchange(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert got.startswith(b"HTTP/1.1 200 ")
    assert got.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    ("data", "limits", "status"),
    [
        (b"nonsense\r\n\r\n", {}, b"400"),
        (post("/", b"", b"X: " + b"x" * 2000)[:-2], {"head_bytes": 1000}, b"431"),
        (post("/", b"x" * 11), {"body_bytes": 10}, b"413"),
        (
            post("/", b"b\r\nabcdefghijk\r\n0\r\n\r\n", b"Transfer-Encoding: chunked"),
            {"body_bytes": 10},
            b"413",
        ),
        (post("/", b"x" * 11), {"all_bodies_bytes": 10}, b"503"),
        (post("/", b"x", b"Content-Encoding: gzip"), {}, b"415"),
        (post("/", b"zz\r\n", b"Transfer-Encoding: chunked"), {}, b"400"),
    ],
)
def test_what_is_too_much_or_wrong_is_told_and_cut_off(serve, data, limits, status):
    got = serve(**limits).exchange(data)
    assert got.startswith(b"HTTP/1.1 " + status)
    assert b"connection: close" in got.lower()
    assert b'"error": ' in got


def test_the_memory_of_a_refused_body_is_free_again(serve):
    served = serve(all_bodies_bytes=10)
    assert b"503" in served.exchange(post("/", b"x" * 11))[:12]
    assert served.exchange(post("/", b"x" * 10, CLOSE)).endswith(b"POST / 10")


@pytest.mark.parametrize(
    ("limit", "data"),
    [
        ("idle_s", b""),
        ("head_s", b"POST / HTTP/1.1\r\n"),
        ("body_s", post("/", b"abc")[:-1]),
    ],
)
def test_who_is_too_slow_is_cut_off(serve, limit, data):
    assert serve(**{limit: 0.05}).exchange(data) == b""


def test_who_does_not_read_is_cut_off(serve):
    served = serve(write_s=0.05)
    with served.connect() as client:
        client.sendall(post("/large", b"", CLOSE))
        client.recv(1)
        while served.server._state.open:
            time.sleep(0.01)
        assert len(rest_of(client)) < 64 << 20


def test_connections_are_counted(serve):
    served = serve(connections=1)
    with served.connect() as first:
        first.sendall(post())
        answer_of(first)
        assert served.exchange(b"") == b""
        first.sendall(post())
        assert answer_of(first) == b"POST / 0"


def test_an_answer_that_lasts_too_long(serve):
    got = serve(answer_s=0.05).exchange(post("/wait", b"", CLOSE))
    assert got.startswith(b"HTTP/1.1 504 ")
    assert b"Timed out waiting for notification" in got


def test_what_is_known_is_answered_while_every_thread_computes(serve):
    served = serve()
    with served.connect() as first, served.connect() as second:
        for client in (first, second):
            client.sendall(post("/wait"))
        assert served.api.entered.wait(DEADLINE_S)
        got = served.exchange(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert got.endswith(b"GET / 0")


def test_draining_answers_what_is_in_progress_and_closes_the_rest(serve):
    served = serve()
    with served.connect() as idle, served.connect() as busy:
        idle.sendall(post())
        answer_of(idle)
        busy.sendall(post("/wait"))
        assert served.api.entered.wait(DEADLINE_S)
        thread = threading.Thread(target=served.server.drain, args=(DEADLINE_S,))
        thread.start()
        assert rest_of(idle) == b""
        with (
            socket.socket(socket.AF_UNIX) as late,
            pytest.raises(OSError, match="No such"),
        ):
            late.connect(served.path)
        served.api.gate.set()
        got = rest_of(busy)
        thread.join()
    assert got.endswith(b"POST /wait 0")
    assert b"connection: close" in got.lower()
    served.server.drain = lambda _limit_s: None  # it is done


def test_an_address_that_cannot_be_had(tmp_path):
    server = HttpServer(Api(), threads=1)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"listen on 0\.0\.0\.0:{port}"):
            server.listen(port=port, unix_path="")
    with pytest.raises(StartError, match="cannot listen on unix:"):
        server.listen(port=0, unix_path=str(tmp_path / "none" / "rest"))
    server.drain(DEADLINE_S)
