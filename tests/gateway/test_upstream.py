"""The client to engines, against servers that do what no server should."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop

from apps.gateway import upstream
from apps.gateway.answer import Answer, BrokenAnswer, Disconnected
from apps.gateway.upstream import NotConnected, Upstream, request_head
from tests.gateway.helpers import free_port

OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"
DEADLINE_S = 20.0


@pytest.fixture(
    scope="module", params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"]
)
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """The gateway runs on uvloop."""
    policy: asyncio.AbstractEventLoopPolicy = request.param()
    return policy


@dataclass
class Server:
    """Speaks raw bytes. ``script`` is called with each connection and its number."""

    script: Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    base_url: str = ""

    async def request(self, reader: asyncio.StreamReader) -> bytes:
        """The next request, head and body."""
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        body = await reader.readexactly(int(length or 0))
        if b"transfer-encoding: chunked" in head:
            body = await reader.readuntil(b"\r\n0\r\n\r\n")
        self.requests.append(head + body)
        return self.requests[-1]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            await self.script(reader, writer, self.connections)
        writer.close()


@asynccontextmanager
async def serving(script: Any) -> AsyncIterator[tuple[Server, Upstream]]:
    """``script``: an async function of (server, reader, writer, number), or bytes with which everything is answered."""

    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if not isinstance(script, bytes):
            await script(server, reader, writer, number)
            return
        while True:
            await server.request(reader)
            writer.write(script)

    server = Server(answers)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.base_url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    client = Upstream(connect_s=3)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield server, client
    finally:
        client.close()
        listening.close()


async def ask(
    client: Upstream, server: Server, method: str = "POST", body: Any = b"{}", length: int | None = None
) -> Answer:
    return await client.ask(server.base_url, method, "/v1/x", [(b"x-a", b"b")], body, length)


async def whole(client: Upstream, server: Server, method: str = "POST") -> tuple[int, bytes]:
    answer = await ask(client, server, method)
    try:
        return answer.status, await answer.read(2**30)
    finally:
        answer.release()


async def broken(wire: bytes, match: str | None = None) -> None:
    """What came is refused, and its connection is not used again."""
    async with serving(wire) as (server, client):
        for number in (1, 2):
            with pytest.raises(BrokenAnswer, match=match):
                await whole(client, server)
            assert server.connections == number


# -- answers as they should be ---------------------------------------------------------------------


async def test_a_connection_is_used_again_after_a_whole_answer() -> None:
    async with serving(HELLO) as (server, client):
        for _ in range(3):
            assert await whole(client, server) == (200, b"hello")
    assert server.connections == 1
    host = server.base_url.removeprefix("http://").encode()
    assert server.requests[0] == (
        b"POST /v1/x HTTP/1.1\r\nhost: " + host + b"\r\nx-a: b\r\ncontent-length: 2\r\n\r\n{}"
    )


async def test_every_framing_of_a_body_is_read_to_its_end() -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(OK + (b"Transfer-Encoding: chunked\r\n\r\n" if number == 1 else b"\r\n"))
        for piece in (b"a", b"bc", b"def"):
            writer.write(b"%x;why=not\r\n%b\r\n" % (len(piece), piece) if number == 1 else piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        if number == 1:
            writer.write(b"0\r\nX-Trailer: yes\r\n\r\n")
            await reader.read()  # until the other side closes

    async with serving(script) as (server, client):
        answer = await ask(client, server)
        chunks = []
        while chunk := await answer.chunk():
            chunks.append(chunk)
        assert b"".join(chunks) == b"abcdef"
        assert answer.complete
        assert answer.headers == [(b"transfer-encoding", b"chunked")]  # the trailer is nobody's
        answer.close()
        assert await whole(client, server) == (200, b"abcdef")  # ends with its connection


async def test_space_around_a_value_does_not_count() -> None:
    for lines in (
        b"Content-Length: \t5 \t\r\n\r\nhello",
        b"Transfer-Encoding:  Chunked \r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ):
        async with serving(OK + lines) as (server, client):
            assert await whole(client, server) == (200, b"hello")
            assert await whole(client, server) == (200, b"hello")
            assert server.connections == 1


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
async def test_answers_without_a_body_end_with_their_head(status: bytes) -> None:
    async with serving(b"HTTP/1.1 " + status + b"\r\n\r\n") as (server, client):
        assert await whole(client, server) == (int(status[:3]), b"")
        assert await whole(client, server) == (int(status[:3]), b"")
        assert server.connections == 1


@pytest.mark.parametrize("start", [b"HTTP/1.1 204 No Content", b"HTTP/1.1 200 OK"])
async def test_a_body_where_none_belongs_is_no_answer_to_the_next_request(start: bytes) -> None:
    method = "HEAD" if b"200" in start else "POST"
    wire = start + b"\r\nContent-Length: %d\r\n\r\n" % len(HELLO) + HELLO
    async with serving(wire) as (server, client):
        for number in (1, 2):
            assert (await whole(client, server, method))[1] == b""
            assert server.connections == number


async def test_what_comes_before_the_answer_is_passed_over() -> None:
    early = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
    async with serving(early + HELLO) as (server, client):
        answer = await ask(client, server)
        assert (answer.status, answer.headers) == (200, [(b"content-length", b"5")])
        assert await answer.chunk() == b"hello"
        answer.release()
        assert await whole(client, server) == (200, b"hello")
        assert server.connections == 1


async def test_an_answer_that_drips_byte_by_byte_is_read() -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        for byte in HELLO:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)

    async with serving(script) as (server, client):
        assert await whole(client, server) == (200, b"hello")


async def test_http_1_0_and_connection_close_are_not_used_again() -> None:
    for wire in (HELLO.replace(b"1.1", b"1.0"), HELLO.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")):
        async with serving(wire) as (server, client):
            for number in (1, 2):
                assert await whole(client, server) == (200, b"hello")
                assert server.connections == number


# -- what is no answer ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wire",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 099 X\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 600 X\r\nContent-Length: 0\r\n\r\n",  # RFC 9110 §15; uvicorn could not pass it on
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n folded\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : a\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    ],
)
async def test_what_is_not_http_is_refused(wire: bytes) -> None:
    await broken(wire)


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5, 5",
        b"Transfer-Encoding: gzip",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: xchunked",
    ],
)
async def test_a_length_that_can_be_read_in_two_ways_is_refused(lines: bytes) -> None:
    await broken(OK + lines + b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")


async def test_a_head_has_a_limit_in_one_piece_and_in_many() -> None:
    await broken(OK + b"X: " + b"a" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n", "head is longer")
    await broken(OK + b"".join(b"X-%d: y\r\n" % n for n in range(8000)) + b"\r\n", "head is longer")

    async def endless(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(OK + b"X: ")
        while True:
            writer.write(b"a" * 1000)
            await writer.drain()

    async with serving(endless) as (server, client):
        with pytest.raises(BrokenAnswer):
            await whole(client, server)


@pytest.mark.parametrize("endless", [b"HTTP/1.1 102 Processing\r\n\r\n", b"HTTP/1.1 103 E\r\nX: y\r\n\r\n"])
async def test_answers_before_the_answer_end_too(endless: bytes) -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        while True:
            writer.write(endless * 100)
            await writer.drain()

    async with serving(script) as (server, client):
        with pytest.raises(BrokenAnswer):
            await whole(client, server)


@pytest.mark.parametrize("endless", [b"1;" + b"x" * 2**20, b"0\r\n" + b"X-T: " + b"y" * 2**20])
async def test_between_the_parts_of_a_body_there_is_a_limit_too(endless: bytes) -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n" + endless)
        await reader.read()

    async with serving(script) as (server, client):
        with pytest.raises(BrokenAnswer, match="without a byte"):
            await whole(client, server)


# -- what follows an answer -----------------------------------------------------------------------


@pytest.mark.parametrize("more", [HELLO.replace(b"hello", b"WRONG"), b"junk", OK])
async def test_bytes_behind_an_answer_never_answer_the_next_request(more: bytes) -> None:
    async with serving(HELLO + more) as (server, client):
        for number in (1, 2, 3):
            assert await whole(client, server) == (200, b"hello")
            assert server.connections == number


async def test_bytes_on_an_idle_connection_never_answer_the_next_request() -> None:
    said = asyncio.Event()

    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(HELLO)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.write(HELLO.replace(b"hello", b"WRONG"))
        await writer.drain()
        said.set()
        await reader.read()

    async with serving(script) as (server, client):
        assert await whole(client, server) == (200, b"hello")
        await said.wait()
        await asyncio.sleep(0.05)
        assert await whole(client, server) == (200, b"hello")
        assert server.connections == 2


async def test_an_idle_connection_is_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "IDLE_CONNECTION_S", 0.05)
    closed = asyncio.Event()

    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(HELLO)
        await reader.read()
        closed.set()

    async with serving(script) as (server, client):
        await whole(client, server)
        await closed.wait()


# -- connections that end --------------------------------------------------------------------------


async def test_a_connection_that_is_refused_is_told_from_one_that_ended() -> None:
    with pytest.raises(NotConnected):
        await Upstream(connect_s=3).ask(f"http://127.0.0.1:{free_port()}", "GET", "/", [])
    for wrong in ("https://127.0.0.1:1", "ftp://x", "nothing", "http://", "http://x:99999"):
        with pytest.raises(NotConnected):
            await Upstream(connect_s=3).ask(wrong, "GET", "/", [])


async def test_a_host_that_does_not_answer_is_not_waited_for() -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        client = Upstream(connect_s=0.2)
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        waiting = [asyncio.create_task(client.ask(url, "GET", "/", [])) for _ in range(4)]
        done, rest = await asyncio.wait(waiting, timeout=DEADLINE_S, return_when=asyncio.FIRST_EXCEPTION)
        assert isinstance(done.pop().exception(), NotConnected)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)


@pytest.mark.parametrize(
    ("sent", "begun"), [(b"", False), (b"HTTP/1.1 2", True), (OK, True), (b"HTTP/1.1 100 Continue\r\n\r\n", True)]
)
async def test_a_connection_that_ends_before_the_head_says_whether_an_answer_had_begun(
    sent: bytes, begun: bool
) -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(sent)

    async with serving(script) as (server, client):
        with pytest.raises(Disconnected) as ended:
            await whole(client, server)
        assert ended.value.begun is begun
        assert server.connections == 1  # a new connection: nothing is sent twice


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 50\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"]
)
async def test_a_body_that_ends_early_gives_what_came_and_then_says_so(framing: bytes) -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(OK + framing)

    async with serving(script) as (server, client):
        answer = await ask(client, server)
        assert await answer.chunk() == b"hello"
        with pytest.raises(Disconnected):
            await answer.chunk()
        answer.release()


async def closes_on_reuse(server: Server, reader: Any, writer: Any, number: int) -> None:
    """Answers once; then it closes in the moment that the next request comes."""
    await server.request(reader)
    writer.write(HELLO)
    if number == 1:
        await server.request(reader)
        writer.transport.abort()
    else:
        await reader.read()


async def test_a_request_on_an_idle_connection_that_ends_is_sent_once_more_on_a_new_one() -> None:
    async with serving(closes_on_reuse) as (server, client):
        assert await whole(client, server) == (200, b"hello")
        assert await whole(client, server) == (200, b"hello")
        assert server.connections == 2
        assert server.requests[1] == server.requests[2]


async def test_it_is_sent_once_more_only_and_not_when_an_answer_had_begun() -> None:
    async def dies(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        if number <= 3:
            writer.write(HELLO)
            await server.request(reader)

    async with serving(dies) as (server, client):
        answers = await asyncio.gather(*(ask(client, server) for _ in range(3)))
        for answer in answers:
            await answer.read(100)
            answer.release()
        with pytest.raises(Disconnected):
            await whole(client, server)
        assert (server.connections, len(server.requests)) == (4, 5)  # not on the two other idle ones

    async def begins(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(HELLO)
        await server.request(reader)
        writer.write(b"HTTP/1.1 5")

    async with serving(begins) as (server, client):
        await whole(client, server)
        with pytest.raises(Disconnected):
            await whole(client, server)
        assert server.connections == 1


async def test_a_body_in_pieces_is_sent_on_a_new_connection_only() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b""
        yield b"de"

    async with serving(closes_on_reuse) as (server, client):
        assert await whole(client, server) == (200, b"hello")
        answer = await ask(client, server, body=pieces(), length=5)
        assert await answer.chunk() == b"hello"
        answer.close()
        answer = await ask(client, server, body=pieces())
        assert await answer.chunk() == b"hello"
        answer.close()
        assert server.connections == 3
        assert server.requests[1].endswith(b"content-length: 5\r\n\r\nabcde")
        assert server.requests[2].endswith(b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")


# -- leaving, waiting, sending ---------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n"])
async def test_to_leave_is_to_close_the_connection_at_once(begun: bytes) -> None:
    arrived, closed = asyncio.Event(), asyncio.Event()

    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)
        writer.write(begun)
        arrived.set()
        with suppress(ConnectionError):
            await reader.read()
        closed.set()

    async with serving(script) as (server, client):
        asking = asyncio.create_task(whole(client, server))
        await arrived.wait()
        await asyncio.sleep(0.05)
        assert not asking.done()
        asking.cancel()
        await closed.wait()


async def test_an_answer_that_nobody_takes_makes_its_server_wait() -> None:
    sent = 0

    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        nonlocal sent
        await server.request(reader)
        writer.write(OK + b"Content-Length: %d\r\n\r\n" % (64 * 2**20))
        for _ in range(64):
            writer.write(b"x" * 2**20)
            await writer.drain()
            sent += 1

    async with serving(script) as (server, client):
        answer = await ask(client, server)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 32  # what the kernel holds
        assert answer._held_bytes < 2**20
        length = 0
        while chunk := await answer.chunk():
            length += len(chunk)
        assert length == 64 * 2**20
        answer.release()


async def test_a_large_body_waits_for_its_reader() -> None:
    read = asyncio.Event()
    taken = 0

    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await read.wait()
        await reader.readexactly(64 * 2**20)
        writer.write(HELLO)

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(64):
            taken += 1
            yield b"x" * 2**20

    async with serving(script) as (server, client):
        asking = asyncio.create_task(ask(client, server, body=pieces(), length=64 * 2**20))
        before = -1
        while before != taken or not taken:
            before = taken
            await asyncio.sleep(0.3)
        assert taken < 32
        read.set()
        answer = await asking
        assert await answer.chunk() == b"hello"
        answer.release()


async def test_a_server_that_answers_before_it_has_the_body_is_heard_and_not_used_again() -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(HELLO.replace(b"200 OK", b"413 Large"))
        await reader.read(1)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    async with serving(script) as (server, client):
        answer = await ask(client, server, body=endless())
        assert (answer.status, await answer.chunk()) == (413, b"hello")
        answer.release()
        assert answer.closed


async def test_what_ends_a_body_in_pieces_ends_the_request() -> None:
    async def script(server: Server, reader: Any, writer: Any, number: int) -> None:
        await reader.read()

    async def failing() -> AsyncIterator[bytes]:
        yield b"a"
        raise KeyError("the client's own")

    async def of(count: int) -> AsyncIterator[bytes]:
        yield b"a" * count

    async with serving(script) as (server, client):
        with pytest.raises(KeyError, match="own"):
            await ask(client, server, body=failing(), length=5)
        with pytest.raises(BrokenAnswer, match="longer"):  # the rest would be read as another request
            await ask(client, server, body=of(6), length=5)
        with pytest.raises(BrokenAnswer, match="shorter"):
            await ask(client, server, body=of(4), length=5)


@pytest.mark.parametrize(
    ("target", "header"),
    [
        ("/v1/x\r\nX-Evil: 1", (b"a", b"b")),
        ("/v1/x", (b"a", b"b\r\nX-Evil: 1")),
        ("/v1/x", (b"a", b"b\nX-Evil: 1")),
        ("/v1/x", (b"a\r\nX-Evil", b"b")),
        ("/v1/x", (b"a", b"b\0")),
    ],
)
def test_nothing_can_be_put_between_the_lines_of_a_request(target: str, header: tuple[bytes, bytes]) -> None:
    with pytest.raises(ValueError, match="control character"):
        request_head("http://127.0.0.1:1", "POST", target, [header], 0)


def test_an_address_may_have_a_path_and_may_be_ipv6() -> None:
    head = request_head("http://[::1]:81/base/", "GET", "/v1/x?y=z", [], 0)
    assert head == b"GET /base/v1/x?y=z HTTP/1.1\r\nhost: [::1]:81\r\n\r\n"


class Pieces:
    """A body that can be looked after."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"{}"


async def test_a_request_that_failed_keeps_nothing_of_its_body() -> None:
    """Not until a collection either: bodies are large, and those of many failures would be kept at once."""

    async def ended(server: Server, reader: Any, writer: Any, number: int) -> None:
        await server.request(reader)

    async def failed(client: Upstream, server: Server) -> weakref.ref[Pieces]:
        body = Pieces()
        with pytest.raises(Disconnected):
            await ask(client, server, body=body)
        return weakref.ref(body)

    gc.disable()
    try:
        async with serving(ended) as (server, client):
            body = await failed(client, server)
            await asyncio.sleep(0)
            assert body() is None
    finally:
        gc.enable()
