"""What passes, what is refused, and in which words."""

from __future__ import annotations

import http.client
import json
import re
import socket
import struct
from contextlib import suppress
from typing import Any

import openai
import pytest

from apps.common.actors import actor_of
from apps.deployments import routes
from apps.gateway.services import quota_set
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import ANSWER, chat, events, raw_exchange, until
from tests.gateway.test_quotas import applied as quota_applied

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"


def client_for(gateway: GatewayProcess, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{gateway.port}/v1", api_key=key, max_retries=0, timeout=60)


def test_models_are_the_served_names_in_openais_shape(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    house.serve(gateway, "org/gemma", house.engine("org/gemma"))

    listed = gateway.ask("GET", "/v1/models", key=bobs_key).json

    assert listed["object"] == "list"
    assert [(m["id"], m["object"], m["owned_by"]) for m in listed["data"]] == [
        ("coder", "model", "rigpanel"),
        ("org/gemma", "model", "rigpanel"),
    ]
    assert all(isinstance(m["created"], int) for m in listed["data"])
    assert gateway.ask("GET", "/v1/models/org/gemma", key=bobs_key).json["id"] == "org/gemma"
    assert gateway.ask("GET", "/v1/models/nothing", key=bobs_key).error["code"] == "model_not_found"


def test_a_held_route_is_listed_too(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    routes.hold(["coder"], job_id=1, eta_at=None)
    house.applied(gateway)
    assert [m["id"] for m in gateway.ask("GET", "/v1/models", key=bobs_key).json["data"]] == ["coder"]


def test_request_and_answer_pass_byte_for_byte(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    body = (
        b'{ "model" : "coder",\r\n "messages":[{"role":"user","content":"\xe2\x82\xac \\u20ac"}], "temperature":0.10 }'
    )

    answer = gateway.ask("POST", CHAT, body, key=bobs_key)

    assert answer.status == 200
    assert answer.body == ANSWER.replace(b"MODEL", b"coder")
    assert engine.received[0].body == body
    assert engine.received[0].path == CHAT


def test_a_stream_passes_byte_for_byte(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))

    answer = gateway.ask("POST", CHAT, chat("coder", stream=True, chunks=200), key=bobs_key)

    assert answer.body == b"".join(events("coder", 200))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-engine"] == "ours"


def test_the_engine_sees_its_own_key_and_nothing_of_the_members(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    extra = {
        "Cookie": "rigpanel_session=secret",
        "X-Forwarded-For": "10.1.1.1",
        "X-Api-Key": bobs_key,
        "Connection": "keep-alive, X-Secret",
        "X-Secret": "hop",
        "Proxy-Authorization": "Basic abc",
        "TE": "trailers",
        "X-Request-Id": "mine-42",
    }

    answer = gateway.ask("POST", CHAT, chat("coder"), key=bobs_key, headers=extra)

    seen = engine.received[0].headers
    assert [v for n, v in seen if n == "authorization"] == [f"Bearer {engine.key}"]
    assert bobs_key not in str(seen)
    framing = {"host", "content-type", "content-length", "accept", "accept-encoding", "user-agent"}
    assert {n for n, _ in seen} <= {*framing, "authorization", "x-request-id"}
    assert [v for n, v in seen if n == "accept-encoding"] in ([], ["identity"])
    assert dict(seen)["x-request-id"] == answer.headers["x-request-id"] == "mine-42"


def test_the_official_client_chats_completes_and_embeds(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    client = client_for(gateway, bobs_key)
    messages: Any = [{"role": "user", "content": "Hello"}]

    stream = client.chat.completions.create(model="coder", messages=messages, stream=True, extra_body={"chunks": 5})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == "t0 t1 t2 t3 t4 "
    said = client.chat.completions.create(model="coder", messages=messages)
    assert said.choices[0].message.content == "Hi — there"
    assert client.completions.create(model="coder", prompt="Hello").choices[0].text == "Hi"
    embedding = client.embeddings.create(model="coder", input="x", encoding_format="float")
    assert embedding.data[0].embedding == [0.5, -1.0]
    assert [model.id for model in client.models.list()] == ["coder"]


def test_the_official_client_raises_its_own_errors(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    messages: Any = [{"role": "user", "content": "Hello"}]

    with pytest.raises(openai.AuthenticationError) as refused:
        client_for(gateway, "rp-nobody").chat.completions.create(model="coder", messages=messages)
    assert refused.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError, match="Available: coder") as unknown:
        client_for(gateway, bobs_key).chat.completions.create(model="gpt-9", messages=messages)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="as asked"):  # the engine's own answer passes as it is
        client_for(gateway, bobs_key).chat.completions.create(
            model="coder", messages=messages, extra_body={"script": "status", "status": 400}
        )


UNKNOWN = [
    ("GET", "/", 404, "not_found"),
    ("GET", "/v1", 404, "not_found"),
    ("POST", "/v1/load_lora_adapter", 404, "not_found"),
    ("GET", "/v1/../healthz", 404, "not_found"),
    ("POST", "/v1/models", 405, "method_not_allowed"),
    ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ("DELETE", "/v1/embeddings", 405, "method_not_allowed"),
    ("POST", "/healthz", 405, "method_not_allowed"),
]


def test_unknown_paths_and_methods_are_refused_in_openais_shape(gateway: GatewayProcess, bobs_key: str) -> None:
    for method, path, status, code in UNKNOWN:
        answer = gateway.ask(method, path, key=bobs_key)
        assert (answer.status, answer.error["code"]) == (status, code), (method, path)
        assert ("allow" in answer.headers) == (status == 405)


MALFORMED = [
    b"",
    b"{",
    b"nonsense",
    b"[]",
    b'"coder"',
    b"null",
    b"{}",
    b'{"model": null}',
    b'{"model": 5}',
    b'{"model": ""}',
    b'{"model": ["coder"]}',
    b'{"model": "coder"} trailing',
    b"[" * 100_000,
    b'{"model": "coder", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"model": "coder", "messages": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}",
    b'{"model": "coder", "temperature": NaN}',
    b'{"model": "coder", "messages": [-Infinity]}',
    b'{"model": "coder", "model": "other"}',
    b'{"model": "coder", "mod\\u0065l": "other"}',
    b'{"model": "coder", "stream": true, "stream": false}',
    b'{"model": "coder", "x": "\x00"}',
    b'\xef\xbb\xbf{"model": "coder"}',
    b'{"model": "coder", "x": ' + b"9" * 10_000 + b"}",
    b"\xff\xfe" + '{"model": "coder"}'.encode("utf-16-le"),
    b'{"model": "\xff"}',
]


def test_a_malformed_body_is_a_400_and_reaches_no_engine(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    for body in MALFORMED:
        answer = gateway.ask("POST", CHAT, body, key=bobs_key)
        assert (answer.status, answer.error["type"]) == (400, "invalid_request_error"), body[:40]
        told = gateway.ask("POST", "/v1/messages", body, key=bobs_key).json
        assert (told["type"], told["error"]["type"]) == ("error", "invalid_request_error"), body[:40]
        assert told["error"]["message"] == answer.error["message"]
    assert engine.received == []
    assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200


ODD = [
    b'{"model": "coder", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "coder", "messages": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"model": "coder", "temperature": 1e999999, "x": -1E-999999}',
    b'{"model": "coder", "max_tokens": 1' + b"0" * 4000 + b"}",
    b'{"model": "coder", "max_tokens": 1, "max_tokens": 2}',
]


def test_what_is_odd_and_yet_json_is_the_engines_to_judge(
    house: House, gateway: GatewayProcess, bobs_key: str, alice: Any, bob: Any
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    quota_set(bob, {"requests_per_minute": 1000, "tokens_per_day": 10**12}, actor=actor_of(alice))
    quota_applied(gateway, bobs_key, "1000")
    engine.received.clear()
    for body in ODD:
        assert gateway.ask("POST", CHAT, body, key=bobs_key).status == 200, body[:60]
    assert [received.body for received in engine.received] == ODD
    for name in (b"\\udfff", b"co\\r\\nder", b"\\u0000", b"x" * 2**20):
        answer = gateway.ask("POST", CHAT, b'{"model": "' + name + b'"}', key=bobs_key)
        assert (answer.status, answer.error["code"]) == (404, "model_not_found")
        assert len(answer.body) < 1000


def test_a_body_of_33_mib_is_refused_before_it_is_read(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\n"
        f"Content-Length: {33 * 2**20}\r\nConnection: close\r\n\r\n"
    )
    answer = raw_exchange(gateway.port, head.encode())  # no byte of the body was sent
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"request_too_large" in answer
    assert engine.received == []


def test_a_body_too_large_without_a_length_is_refused_too(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    whole = json.dumps(chat("coder", padding="x" * (33 * 2**20))).encode()
    pieces = (whole[start : start + 2**20] for start in range(0, len(whole), 2**20))

    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=60)
    connection.request("POST", CHAT, pieces, {"Authorization": f"Bearer {bobs_key}"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert engine.received == []
    until(lambda: gateway.metric("rigpanel_gateway_body_bytes") == 0, "the refused body is still counted")


def test_a_body_of_31_mib_passes_whole(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    body = json.dumps(chat("coder", image="A" * (31 * 2**20))).encode()
    assert gateway.ask("POST", CHAT, body, key=bobs_key).status == 200
    assert engine.received[0].body == body


def test_small_json_that_would_grow_large_is_refused(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    before = gateway.resident_bytes
    body = b'{"model": "coder", "x": [' + b"{}," * (8 * 2**20) + b"{}]}"  # 24 MiB; 64 bytes for each dictionary
    answer = gateway.ask("POST", CHAT, body, key=bobs_key)
    assert (answer.status, answer.error["code"]) == (413, "request_too_complex")
    assert gateway.resident_bytes - before < 200 * 2**20


def test_bodies_held_at_once_are_bounded(house: House, within: Any, bobs_key: str) -> None:
    gateway = within(buffered_bytes=64 * 1024)
    house.applied(gateway)
    answer = gateway.ask("POST", CHAT, chat("coder", padding="x" * 100_000), key=bobs_key)
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "busy", "5")
    assert gateway.gateway.budget.held_bytes == 0


SMUGGLED = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n" + b'{"model":"coder"}'


AMBIGUOUS = [
    b"Content-Length: 17\r\nContent-Length: 9\r\n",
    b"Content-Length: 17\r\nTransfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked\r\nContent-Length: 17\r\n",
    b"Transfer-Encoding: xchunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Content-Length: +17\r\n",
    b"Content-Length: 17, 9\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length : 17\r\n",
    b"Content-Length: 17\r\n folded: yes\r\nX: y\rZ: q\r\n",
    b"Content-Length: 17\nTransfer-Encoding: chunked\n",
    b"X: a\r\n b\r\nContent-Length: 17\r\n",
    b"X: a\nContent-Length: 17\r\n",
    b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 17\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked\r\n",
]


def test_ambiguous_framing_never_becomes_a_second_request(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    key = f"Authorization: Bearer {bobs_key}\r\n".encode()
    body = b'{"model":"coder"}' + SMUGGLED.replace(b"Host: x\r\n", b"Host: x\r\n" + key)

    start = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: x\r\n" + key
    for framing in AMBIGUOUS:
        answer = raw_exchange(gateway.port, start + framing + b"\r\n" + body)
        assert answer.startswith(b"HTTP/1.1 400"), framing
        assert engine.received == [], framing


CHUNKED = [
    b"11;a\nXX\r\n",
    b"11\nXX\r\n",
    b"-1\r\n",
    b"+11\r\n",
    b"0x11\r\n",
    b"fffffffffffffffff\r\n",
    b'11\r\n{"model":"coder"}XX\r\n0\r\n\r\n',
    b'11\r\n{"model":"coder"}\r\n0\r\nContent-Length: 5\r\n\r\n',
]


def test_broken_chunks_are_refused(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    for target in (CHAT, f"http://elsewhere.example{CHAT}"):  # the absolute form leads no further than the other
        head = (
            f"POST {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\nTransfer-Encoding: chunked\r\n"
        )
        for broken in CHUNKED:
            answer = raw_exchange(gateway.port, head.encode() + b"\r\n" + broken, half_close=False)
            assert answer.startswith(b"HTTP/1.1 400"), broken
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_request", broken
        assert engine.received == []
        whole = b'11;a=b;c="d"\r\n{"model":"coder"}\r\n0\r\nX: y\r\n\r\n'
        answer = raw_exchange(gateway.port, head.encode() + b"Connection: close\r\n\r\n" + whole, half_close=False)
        assert answer.startswith(b"HTTP/1.1 200"), target
        assert engine.received.pop().body == b'{"model":"coder"}'


def test_a_body_behind_an_upgrade_never_becomes_a_second_request(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    """It comes when the head has been read, so that what reads heads would begin with it."""
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    key = f"Authorization: Bearer {bobs_key}\r\n"
    body = SMUGGLED.replace(b"Host: x\r\n", b"Host: x\r\n" + key.encode())
    upgrade = f"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: {len(body)}\r\n\r\n"
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{key}{upgrade}"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(head.encode())
        answer = connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 400")
        assert b"HttpClient.Version.HTTP_1_1" in answer
        with suppress(OSError):
            connection.sendall(body)
            assert connection.recv(65536) == b""
    assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200
    assert [received.path for received in engine.received] == [CHAT]
    # Without a body it is what RFC 9110 §7.8 allows: a request like any other.
    listed = gateway.ask("GET", "/v1/models", key=bobs_key, headers={"Connection": "Upgrade", "Upgrade": "h2c"})
    assert listed.status == 200


def test_what_follows_an_upgrade_in_its_segment_is_the_next_request(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    """And not lost, so that what its client sends of it later would be read from its middle."""
    house.serve(gateway, "coder", house.engine("coder"))
    key = f"Authorization: Bearer {bobs_key}\r\n".encode()
    first = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + key + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    body = b"{" + SMUGGLED.replace(b"Host: x\r\n", b"Host: x\r\n" + key)
    head = b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n" % (CHAT.encode(), key, len(body))
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
        connection.sendall(first + first + head + body[:1])
        got = b""
        while got.count(b'"object": "list"') < 2:
            part = connection.recv(65536)
            assert part, got
            got += part
        connection.sendall(body[1:] + head.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: close\r\n") + body)
        while part := connection.recv(65536):
            got += part
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"200", b"400", b"400"]
    assert got.count(b"invalid_json") == 2


def test_two_authorization_headers_are_refused(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    head = (
        f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\nAuthorization: Bearer rp-x\r\n\r\n"
    )
    assert raw_exchange(gateway.port, head.encode()).startswith(b"HTTP/1.1 400")


def test_a_head_without_end_is_cut_off(gateway: GatewayProcess) -> None:
    for head in (b"GET /", b"GET / HTTP/1.1\r\nX-Long: ", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 8000):
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as connection:
            connection.sendall(head)
            with pytest.raises(OSError):  # noqa: PT012 - which of the writes fails depends on the kernel
                for _ in range(2000):
                    connection.sendall(b"x" * 65536)


def test_metrics_are_for_this_machine_or_a_key(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    forwarded = {"X-Forwarded-For": "10.0.0.7"}
    assert gateway.ask("GET", "/metrics").status == 200
    assert gateway.ask("GET", "/metrics", headers=forwarded).status == 401
    assert gateway.ask("GET", "/metrics", headers=forwarded, key=bobs_key).status == 200


def test_the_log_has_neither_keys_nor_prompts(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    body = chat("coder")
    body["messages"][0]["content"] = "the secret recipe"
    answer = gateway.ask("POST", CHAT + "?token=query-secret", body, key=bobs_key)
    until(lambda: answer.headers["x-request-id"] in gateway.log.read_text(), "the request was not logged")
    logged = gateway.log.read_text()
    for secret in (bobs_key, "secret recipe", "query-secret", engine.key):
        assert secret not in logged


def test_a_client_that_resets_in_the_middle_of_its_body_harms_nobody(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\nContent-Length: 1000000\r\n\r\n"
    for _ in range(20):
        connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=60)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.sendall(head.encode() + b"{" * 500_000)
        connection.close()
    assert gateway.ask("POST", CHAT, chat("coder"), key=bobs_key).status == 200
    until(lambda: gateway.metric("rigpanel_gateway_body_bytes") == 0, "bodies of clients that left are still counted")
    assert len(engine.received) == 1
