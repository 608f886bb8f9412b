"""Limits on connections: a real server with small limits, and clients that write bytes."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from rec.ops.serving.connections import (
    MAX_HEADERS,
    HeadWithBody,
    Limited,
    LimitedH11,
    Limits,
    Protocol,
    most_connections,
)

SMALL = Limits(
    head_bytes=2000, head_seconds=0.4, body_seconds=0.4, answer_seconds=0.4, connections=3
)
GET = b"GET /%d HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /read HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n"


class App:
    """Answers with the path. /read reads the body first, /wait waits until it may answer, /large answers 50 MB."""

    def __init__(self) -> None:
        self.may_answer, self.bodies = asyncio.Event(), list[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = scope["path"].encode()
        if scope["path"] == "/read":
            message = await receive()
            while message.get("more_body"):
                message = await receive()
            self.bodies.append(message["type"])
        if scope["path"] == "/wait":
            await self.may_answer.wait()
        if scope["path"] == "/large":
            body = b"x" * 50_000_000
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})


class Running:
    def __init__(self, protocol: type[Limited]) -> None:
        self.app = App()
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self.app, http=protocol, ws="none", log_level="critical", lifespan="off"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)

    def said(self, *parts: bytes, pause: float = 0.0) -> bytes:
        """All that the server answers to the parts, until it ends the connection."""
        with self.connect() as client:
            for part in parts:
                client.sendall(part)
                time.sleep(pause)
            return read_all(client)

    def refusal(self, *parts: bytes) -> tuple[int, str]:
        """Status and sentence."""
        answer = self.said(*parts)
        assert answer.count(b"HTTP/1.1") == 1 and b"content-type: application/json" in answer
        content = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert list(content) == ["detail"] and "\n" not in content["detail"]
        return int(answer[9:12]), content["detail"]


def read_all(client: socket.socket) -> bytes:
    received = b""
    while part := client.recv(65_536):
        received += part
    return received


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module", params=[Protocol, LimitedH11], ids=["httptools", "h11"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    base: type[Limited] = request.param
    running = Running(type("Small", (base,), {"limits": SMALL}))
    yield running
    running.server.should_exit = True
    running.thread.join(20)
    assert not running.thread.is_alive()


def test_both_parsers_are_covered() -> None:
    assert {Protocol.__name__, LimitedH11.__name__} == {"LimitedHttpTools", "LimitedH11"}


@pytest.mark.parametrize(
    "endless",
    [
        b"GET / HTTP/1.1\r\n" + b"A: bbbb\r\n" * 2000,
        b"GET / HTTP/1.1\r\nA: " + b"b" * 20_000,
        b"GET /" + b"a" * 20_000,
        b"\r\n" * 10_000,
    ],
    ids=["headers", "header", "address", "nothing"],
)
def test_a_head_without_end_is_refused(server: Running, endless: bytes) -> None:
    status, sentence = server.refusal(endless)
    assert status in (400, 431) and (status == 400 or "at most 2,000 bytes" in sentence)
    in_parts = [endless[at : at + 500] for at in range(0, 5000, 500)]
    assert server.refusal(*in_parts)[0] in (400, 431)


def test_the_limit_of_the_head_is_exact(server: Running) -> None:
    start = b"GET /ok HTTP/1.1\r\nConnection: close\r\nHost: a\r\nA: "
    end = b"\r\n\r\n"
    room = SMALL.head_bytes - len(start) - len(end)
    assert server.said(start + b"b" * room + end).startswith(b"HTTP/1.1 200")
    assert server.refusal(start + b"b" * (room + 1) + end)[0] == 431


def test_the_body_does_not_count_as_head(server: Running) -> None:
    head = b"POST /read HTTP/1.1\r\nConnection: close\r\nHost: a\r\nContent-Length: 100000\r\n\r\n"
    assert server.said(head + b"b" * 100_000).endswith(b"/read")


def test_many_small_headers_are_refused_before_they_end(server: Running) -> None:
    # 101 headers of 5 bytes are far below 2,000 bytes, and cost much more memory than they are long.
    head = b"GET / HTTP/1.1\r\n" + b"a: \r\n" * (MAX_HEADERS + 2)
    assert server.refusal(head) in (
        (431, "too many headers: at most 100"),
        (408, "the headers did not arrive within 0.4 seconds"),  # h11 keeps them as bytes
    )


def test_a_head_that_does_not_end_is_refused_in_time(server: Running) -> None:
    late = (408, "the headers did not arrive within 0.4 seconds")
    assert server.refusal(b"GET / HT") == late
    answer = server.said(GET % 1, b"GET / HT", pause=0.1)  # a second request on the connection
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 408" in answer


def test_a_byte_now_and_then_does_not_extend_the_time(server: Running) -> None:
    start = time.monotonic()
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nA: ")
        for _ in range(15):
            time.sleep(0.05)
            client.sendall(b"b")
        assert b"HTTP/1.1 408" in read_all(client)
    assert time.monotonic() - start < 5


def test_a_silent_connection_is_closed(server: Running) -> None:
    assert server.said() == b""


@pytest.mark.parametrize(
    "parts",
    [
        (POST, b"abc"),
        (POST.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked"), b"3\r\nabc\r\n"),
    ],
    ids=["length", "chunks"],
)
def test_a_body_that_does_not_end_is_refused_in_time(
    server: Running, parts: tuple[bytes, ...]
) -> None:
    server.app.bodies.clear()
    assert server.refusal(*parts) == (408, "the body did not arrive within 0.4 seconds")
    wait_until(lambda: server.app.bodies == ["http.disconnect"])


def test_a_body_that_nobody_reads_ends_too_and_is_answered_once(server: Running) -> None:
    head = POST.replace(b"/read", b"/early").replace(b"5", b"5000000")
    answer = server.said(head, *[b"x" * 1000] * 8, pause=0.1)
    assert answer.count(b"HTTP/1.1") == 1 and answer.startswith(b"HTTP/1.1 200")


def test_after_an_unread_body_the_next_head_is_limited(server: Running) -> None:
    head = POST.replace(b"/read", b"/early")
    answer = server.said(head, b"abcde", b"GET /" + b"a" * 20_000, pause=0.05)
    assert answer.startswith(b"HTTP/1.1 200") and b"HTTP/1.1 431" in answer


def test_requests_one_after_the_other_are_answered_in_order(server: Running) -> None:
    with server.connect() as client:
        for number in range(5):
            client.sendall(GET % number)
            assert client.recv(1000).endswith(b"/%d" % number)
        client.sendall(GET % 7 + GET % 8 + POST + b"abcde")
        received = b""
        while not received.endswith(b"/read"):
            received += client.recv(1000)
    assert received.index(b"/7") < received.index(b"/8") < received.index(b"/read")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\xfc\x03\x03",  # a TLS handshake
        b"hello\r\n\r\n",
        b"GET / HTTP/x\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        POST.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"xyz\r\n",
    ],
)
def test_what_is_not_http_is_refused_with_a_sentence(server: Running, garbage: bytes) -> None:
    assert server.refusal(garbage) == (400, "this is not a valid HTTP request")


def test_a_request_is_answered_before_the_garbage_behind_it(server: Running) -> None:
    answer = server.said(GET % 1 + b"hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and b"/1" in answer


def test_a_client_that_asks_before_it_sends_its_body_is_told_to_go_on(server: Running) -> None:
    with server.connect() as client:
        client.sendall(POST.replace(b"Host", b"Expect: 100-continue\r\nHost"))
        assert client.recv(1000).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"abcde")
        assert client.recv(1000).endswith(b"/read")


def test_the_head_of_an_answer_goes_out_with_its_body() -> None:
    written: list[bytes] = []

    class Recorder(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            written.append(bytes(data))

        def close(self) -> None:
            written.append(b"END")

    answer = HeadWithBody(Recorder())
    answer.write(b"head ")
    answer.write(b"body")
    answer.write(b"more")
    answer.close()
    assert written == [b"head body", b"more", b"END"]
    written.clear()
    failed = HeadWithBody(Recorder())
    failed.write(b"head")
    failed.close()
    assert written == [b"head", b"END"]


def test_a_head_is_all_that_a_client_gets_who_asks_for_it(server: Running) -> None:
    with server.connect() as client:
        client.sendall(b"HEAD /first HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = client.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"\r\n\r\n")
        client.sendall(GET % 2)
        assert client.recv(65_536).endswith(b"/2")


def test_silent_connections_make_room_for_a_newcomer(server: Running) -> None:
    silent = [server.connect() for _ in range(3 * SMALL.connections)]
    for number in range(3):
        assert server.said(GET.replace(b"Host", b"Connection: close\r\nHost") % number)
    assert sum(is_open(client) for client in silent) < SMALL.connections
    for client in silent:
        client.close()


def is_open(client: socket.socket) -> bool:
    client.settimeout(0.05)
    try:
        return client.recv(1) != b""
    except TimeoutError:
        return True
    except OSError:
        return False


def test_a_connection_that_works_is_not_ended_for_a_newcomer(server: Running) -> None:
    server.app.may_answer.clear()
    working = [server.connect() for _ in range(SMALL.connections)]
    for client in working:
        client.sendall(GET.replace(b"/%d", b"/wait"))
    time.sleep(0.2)
    status, sentence = server.refusal(GET % 1)
    assert status == 503 and "too many connections" in sentence
    server.app.may_answer.set()
    time.sleep(0.1)
    for client in working:
        wait_for_answer(client)
        client.close()


def wait_for_answer(client: socket.socket) -> None:
    assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_a_client_that_does_not_take_its_answer_is_dropped(server: Running) -> None:
    with server.connect() as client:
        client.sendall(GET.replace(b"/%d", b"/large"))
        wait_until(lambda: bool(server.server.server_state.connections))
        wait_until(lambda: not server.server.server_state.connections)


def test_there_are_fewer_connections_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(files: int) -> int:
        monkeypatch.setattr("resource.getrlimit", lambda _: (files, files))
        return most_connections()

    assert limit(200) == 102 and limit(1024) == 720 and limit(1_000_000) == limit(-1) == 2000
    assert 0 < limit(20) < 20
