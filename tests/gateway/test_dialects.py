"""Every protocol that engines speak, with the official clients, and what the gateway learns of it."""

from __future__ import annotations

import json
import socket
from typing import Any

import anthropic
import pytest

from apps.deployments import routes
from tests.gateway import dialects
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import USAGE_EVENT, chat, events, raw_exchange, until
from tests.gateway.test_observer import Recorder
from tests.gateway.test_requests import client_for
from tests.gateway.test_streams import open_request, read_until

pytestmark = pytest.mark.django_db(transaction=True)
CHAT = "/v1/chat/completions"
HELLO: Any = [{"role": "user", "content": "Hello"}]


def claude(gateway: Any, key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=f"http://127.0.0.1:{gateway.port}", api_key=key, max_retries=0, timeout=60)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def recorded(house: House, within: Any, recorder: Recorder, bobs_key: str) -> Any:
    """A gateway with a recorder, and the model coder behind it."""
    routes.open_to(house.deploy("coder", house.engine("coder")))
    gateway = within(recorder, comment_after_s=0.05, comment_every_s=0.05)
    house.applied(gateway)
    return gateway


def figures(recorder: Recorder) -> tuple[Any, ...]:
    seen = until(lambda: recorder.closed, "the end was not told")[-1]
    return seen.tokens_in, seen.tokens_out, seen.tokens_cached


def test_anthropics_client_talks_streams_and_counts(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("coder")
    house.serve(gateway, "coder", engine)
    client = claude(gateway, bobs_key)

    said = client.messages.create(model="coder", max_tokens=9, messages=HELLO)
    assert said.content[0].text == "Hi there"  # type: ignore[union-attr]
    with client.messages.stream(model="coder", max_tokens=9, messages=HELLO) as stream:
        assert stream.get_final_text() == "Hi there"
    assert client.messages.count_tokens(model="coder", messages=HELLO).input_tokens == 12
    assert [model.id for model in client.models.list()] == ["coder"]
    sent = dict(engine.received[0].headers)
    assert sent["anthropic-version"]
    assert "x-api-key" not in sent
    assert sent["authorization"] == f"Bearer {engine.key}"


def test_anthropics_client_raises_its_own_errors(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    with pytest.raises(anthropic.AuthenticationError) as refused:
        claude(gateway, "rp-nobody").messages.create(model="coder", max_tokens=9, messages=HELLO)
    assert refused.value.body["type"] == "error"  # type: ignore[index]
    assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError, match="Available: coder") as unknown:
        claude(gateway, bobs_key).messages.create(model="gpt-9", max_tokens=9, messages=HELLO)
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    answer = gateway.ask("POST", "/v1/messages", b"{", key=bobs_key)
    assert (answer.status, answer.json["error"]["type"]) == (400, "invalid_request_error")
    assert answer.json["request_id"] == answer.headers["x-request-id"]


def test_a_waiting_anthropic_stream_is_kept_alive_and_ends_with_its_own_error(
    house: House, within: Any, bobs_key: str
) -> None:
    routes.hold(["coder"], job_id=1, eta_at=None)
    gateway = within(wait_s=0.4, comment_after_s=0.05, comment_every_s=0.05)
    house.applied(gateway)
    with (
        pytest.raises(anthropic.APIStatusError, match="still not loaded") as ended,
        claude(gateway, bobs_key).messages.stream(model="coder", max_tokens=9, messages=HELLO) as stream,
    ):
        stream.get_final_text()
    assert ended.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


def test_responses_pass_and_their_figures_are_read(recorded: Any, recorder: Recorder, bobs_key: str) -> None:
    client = client_for(recorded, bobs_key)
    assert client.responses.create(model="coder", input="Hello").output_text == "Hi there"
    assert figures(recorder) == (12, 2, 9)
    kinds = [event.type for event in client.responses.create(model="coder", input="Hello", stream=True)]
    assert kinds == ["response.created", "response.output_text.delta", "response.completed"]
    until(lambda: len(recorder.closed) == 2, "the end was not told")
    assert figures(recorder) == (12, 2, 9)
    assert client.responses.retrieve("resp_1").id == "resp_1"  # names no model: the only one is meant


def test_anthropics_figures_come_in_two_events(recorded: Any, recorder: Recorder, bobs_key: str) -> None:
    recorded.ask("POST", "/v1/messages", chat("coder", stream=True, max_tokens=9), key=bobs_key)
    assert figures(recorder) == (12, 2, 9)
    assert recorder.closed[-1].tokens_limit == 9


PLAIN = [
    ("/v1/rerank", {"query": "a", "documents": ["b"]}, "/v1/rerank", (40, None, None)),
    ("/v1/score", {"text_1": "a", "text_2": "b"}, "/v1/score", (7, None, None)),
    ("/tokenize", {"prompt": "Hi"}, "/tokenize", (None, None, None)),
    ("/v1/tokenize", {"prompt": "Hi"}, "/tokenize", (None, None, None)),
    ("/v1/detokenize", {"tokens": [1]}, "/detokenize", (None, None, None)),
]


def test_other_calls_pass_too(house: House, recorded: Any, recorder: Recorder, bobs_key: str) -> None:
    for number, (path, body, asked, wanted) in enumerate(PLAIN):
        answer = recorded.ask("POST", path, {"model": "coder", **body}, key=bobs_key)
        assert (answer.status, answer.body) == (200, dialects.ANSWERS[asked]), path
        assert house.engines[0].received[-1].path == asked
        until(lambda n=number: len(recorder.closed) == n + 1, "the end was not told")  # type: ignore[misc]
        assert figures(recorder) == wanted, path


def test_a_streams_figures_are_asked_for_and_taken_out_again(
    house: House, recorded: Any, recorder: Recorder, bobs_key: str
) -> None:
    answer = recorded.ask("POST", CHAT, chat("coder", stream=True), key=bobs_key)
    assert answer.body == b"".join(events("coder", 3))
    assert figures(recorder) == (11, 3, 8)
    assert recorder.closed[-1].events == 5  # three tokens, the figures and the end
    assert json.loads(house.engines[0].received[0].body)["stream_options"] == {"include_usage": True}


def test_figures_that_the_client_asked_for_stay(house: House, recorded: Any, recorder: Recorder, bobs_key: str) -> None:
    body = json.dumps(chat("coder", stream=True, stream_options={"include_usage": True})).encode()
    answer = recorded.ask("POST", CHAT, body, key=bobs_key)
    wanted = events("coder", 3)
    wanted.insert(-1, USAGE_EVENT)
    assert answer.body == b"".join(wanted)
    assert house.engines[0].received[0].body == body
    assert figures(recorder) == (11, 3, 8)


def test_figures_of_a_stream_that_was_left_are_unknown_and_its_events_are_counted(
    house: House, recorded: Any, recorder: Recorder, bobs_key: str
) -> None:
    connection = open_request(recorded, bobs_key, chat("coder", stream=True, gate=True))
    read_until(connection, b"t0")
    connection.close()
    assert figures(recorder) == (None, None, None)
    assert (recorder.closed[-1].outcome, recorder.closed[-1].events) == ("client_gone", 1)


def test_a_path_that_nobody_knows_yet_passes_with_its_query(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    coder, other = house.engine("coder"), house.engine("other")
    house.serve(gateway, "coder", coder)
    assert gateway.ask("GET", "/v1/new/thing?x=1", key=bobs_key).status == 200
    assert coder.received[-1].path == "/v1/new/thing?x=1"
    house.serve(gateway, "other", other)
    answer = gateway.ask("GET", "/v1/new/thing", key=bobs_key)
    assert (answer.status, answer.error["param"]) == (400, "model")
    assert "Available: coder, other" in answer.error["message"]
    assert gateway.ask("DELETE", "/v1/new/thing?model=other&y=a%20b", key=bobs_key).status == 200
    assert other.received[-1].path == "/v1/new/thing?model=other&y=a+b"
    assert gateway.ask("POST", "/v1/new/thing", {"model": "coder", "z": 1}, key=bobs_key).status == 200


# -- forms ---------------------------------------------------------------------------------------

SOUND = bytes(range(256)) * 40_000  # 10 MB


def test_the_official_client_transcribes(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("whisper")
    house.serve(gateway, "whisper", engine)
    text = client_for(gateway, bobs_key).audio.transcriptions.create(model="whisper", file=("a.wav", SOUND))
    assert text.text == "hello world"
    assert SOUND in engine.received[0].body


def form(*parts: tuple[str, bytes]) -> bytes:
    body = b""
    for head, content in parts:
        body += b"--b0\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + content + b"\r\n"
    return body + b"--b0--\r\n"


def send_form(gateway: Any, key: str, body: bytes, content_type: str = "multipart/form-data; boundary=b0") -> Any:
    return gateway.ask("POST", "/v1/audio/transcriptions", body, key=key, headers={"Content-Type": content_type})


def test_a_form_passes_byte_for_byte_also_with_its_file_first(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    engine = house.engine("whisper")
    house.serve(gateway, "whisper", engine)
    file = ('name="file"; filename="model"', b'name="model"\r\n\r\nfalse\r\n' + SOUND)
    for parts in ((('name="model"', b"whisper"), file), (file, ('name="model"', b"whisper"))):
        body = form(*parts)
        assert send_form(gateway, bobs_key, body).status == 200
        assert engine.received[-1].body == body
    until(lambda: gateway.metric("rigpanel_gateway_body_bytes") == 0, "the form is still counted as held")


def test_a_form_that_is_none_is_refused(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("whisper")
    house.serve(gateway, "whisper", engine)
    for body in (b"", b"nonsense", form(("name=file", b"x")), form(('name="model"', b"")), form(("", b"x"))):
        answer = send_form(gateway, bobs_key, body)
        assert answer.status == 400, body
    assert send_form(gateway, bobs_key, form(), "multipart/form-data").status == 400
    assert engine.received == []


def test_a_form_too_large_is_refused_before_it_is_read(gateway: GatewayProcess, bobs_key: str) -> None:
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\n"
        f"Content-Type: multipart/form-data; boundary=b0\r\nContent-Length: {513 * 2**20}\r\nConnection: close\r\n\r\n"
    )
    assert raw_exchange(gateway.port, head.encode()).startswith(b"HTTP/1.1 413")


def test_a_large_form_streams_through_with_flat_memory(house: House, gateway: GatewayProcess, bobs_key: str) -> None:
    engine = house.engine("whisper")
    house.serve(gateway, "whisper", engine)
    before = gateway.resident_bytes
    body = form(('name="model"', b"whisper"), ('name="file"; filename="a.wav"', bytes(60 * 2**20)))
    assert send_form(gateway, bobs_key, body).status == 200
    assert gateway.resident_bytes - before < 30 * 2**20
    assert len(engine.received[0].body) == len(body)


def test_a_client_that_leaves_in_the_middle_of_its_form_stops_the_engine(
    house: House, gateway: GatewayProcess, bobs_key: str
) -> None:
    deployment = house.serve(gateway, "whisper", house.engine("whisper"))
    sample = f'rigpanel_gateway_in_flight{{deployment="{deployment.pk}"}}'
    head = (
        f"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {bobs_key}\r\n"
        "Content-Type: multipart/form-data; boundary=b0\r\nContent-Length: 1000000\r\n\r\n"
    )
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=60)
    connection.sendall(head.encode() + form(('name="model"', b"whisper"))[:-4] + b"\r\n")
    until(lambda: gateway.metric(sample) == 1, "not under way")
    connection.close()
    until(lambda: b"rigpanel_gateway_in_flight{" not in gateway.ask("GET", "/metrics").body, "still under way")
