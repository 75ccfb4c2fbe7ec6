"""The pure parts: events that are kept whole, headers, words."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import timedelta
from itertools import pairwise

import pytest
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from apps.deployments.routes import RouteEntry, RouteTable, Target
from apps.gateway import errors
from apps.gateway.bodies import parse_body
from apps.gateway.protocol import (
    EventTail,
    answer_headers,
    declared_length,
    is_engines,
    request_id,
    upstream_headers,
)
from apps.gateway.routes import CLEARLY_BUSIER, RouteCache, seconds_left
from apps.gateway.usage import AnswerTail, EventTap, Usage, brings_token, split_events
from tests.gateway import dialects


@given(st.text(alphabet="a:\r\n ", max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_a_streams_bytes_come_out_as_they_went_in_however_they_are_cut(text: str, cuts: list[int]) -> None:
    stream = text.encode()
    places = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    tail = EventTail()
    passed = [tail.whole(stream[start:end]) for start, end in pairwise(places)]
    assert all(part == b"" or part.endswith((b"\n\n", b"\r\n\r\n")) for part in passed)
    assert b"".join(passed) + tail.rest() == stream


def test_an_event_without_end_is_passed_on_in_the_end() -> None:
    tail = EventTail()
    sent = sum(len(tail.whole(b"x" * 65536)) for _ in range(100))
    assert sent >= 95 * 65536


def test_headers_that_connection_names_end_at_this_hop() -> None:
    raw = [
        (b"Connection", b"close, X-Trace"),
        (b"X-Trace", b"1"),
        (b"X-Kept", b"2"),
        (b"Transfer-Encoding", b"chunked"),
    ]
    assert answer_headers(raw) == [(b"x-kept", b"2")]


def test_only_what_an_engine_can_use_is_sent_to_it() -> None:
    raw = [(b"authorization", b"Bearer rp-x"), (b"host", b"evil"), (b"content-length", b"999"), (b"accept", b"*/*")]
    sent = upstream_headers(raw, engine_key="ek", request_id="r1")
    assert sorted(sent) == [
        (b"accept", b"*/*"),
        (b"authorization", b"Bearer ek"),
        (b"content-type", b"application/json"),
        (b"x-request-id", b"r1"),
    ]


def test_contradicting_lengths_are_refused() -> None:
    assert declared_length([(b"content-length", b"5"), (b"content-length", b"5")]) == 5
    for values in ([b"5", b"6"], [b"-1"], [b"5, 6"], [b"0x5"], [b""], ["٥".encode()]):
        with pytest.raises(errors.GatewayError):
            declared_length([(b"content-length", value) for value in values])


def test_a_callers_request_id_is_kept_only_if_it_is_plain() -> None:
    assert request_id([(b"x-request-id", b"abc-1")]) == "abc-1"
    for given_id in (b"", b"a b", b"a\nb", b"x" * 129, "ü".encode()):
        assert request_id([(b"x-request-id", given_id)]).startswith("req-")


def test_only_true_asks_for_a_stream() -> None:
    assert parse_body(b'{"model":"m","stream":true}', elements_max=9).stream
    for value in (b"false", b"null", b"1", b'"true"'):
        assert not parse_body(b'{"model":"m","stream":' + value + b"}", elements_max=9).stream


@pytest.mark.parametrize(
    ("eta_s", "words"),
    [(None, "not known"), (-5.0, "longer than expected"), (45.0, "about 45 s"), (200.0, "3 min 20 s")],
)
def test_the_wait_is_told_in_words_with_a_time_to_retry(eta_s: float | None, words: str) -> None:
    error = errors.model_loading("coder", 120, eta_s)
    assert words in error.message
    assert error.status == 503
    assert any(name == b"retry-after" and int(value) > 0 for name, value in error.headers)


def test_a_long_list_of_models_is_cut() -> None:
    message = errors.model_not_found("x" * 10_000, [f"m{n}" for n in range(500)]).message
    assert len(message) < 600
    assert "m19 and more" in message


def test_equal_replicas_take_turns_and_a_busy_one_is_spared() -> None:
    one, two = Target(1, "http://a", "k"), Target(1, "http://b", "k")
    cache = RouteCache()
    cache.apply(RouteTable(1, (RouteEntry("m", "open", None, (one, two)),)))
    assert [cache.pick((one, two)) for _ in range(4)] == [one, two, one, two]
    with cache.under_way(one), cache.under_way(one):
        assert cache.pick((one, two)) == two
        with cache.under_way(two):
            assert cache.in_flight() == {1: 3}
            assert cache.pick((one, two)) == two
    assert cache.in_flight() == {}


def test_a_conversation_stays_where_its_prefix_is_unless_that_is_clearly_busier() -> None:
    one, two = Target(1, "http://a", "k"), Target(1, "http://b", "k")
    cache = RouteCache()
    cache.apply(RouteTable(1, (RouteEntry("m", "open", None, (one, two)),)))
    assert [cache.pick((one, two), n) for n in (1, 2, 3)] == [one, two, one]  # new ones are spread
    for _ in range(5):
        assert cache.pick((one, two), 1) == one
        assert cache.pick((one, two), 2) == two
    with ExitStack() as busy:
        for _ in range(CLEARLY_BUSIER - 1):
            busy.enter_context(cache.under_way(one))
        assert cache.pick((one, two), 1) == one
        busy.enter_context(cache.under_way(one))
        assert cache.pick((one, two), 1) == two
    assert cache.pick((one, two), 1) == two  # and stays there: that is where its prefix is now


def test_a_replica_that_was_down_is_asked_last() -> None:
    one, two = Target(1, "http://a", "k"), Target(1, "http://b", "k")
    cache = RouteCache()
    cache.apply(RouteTable(1, (RouteEntry("m", "open", None, (one, two)),)))
    cache.was_down("http://a")
    assert {cache.pick((one, two), n) for n in range(6)} == {two}
    cache.was_down("http://b")
    assert {cache.pick((one, two)) for _ in range(6)} == {one, two}


def test_conversations_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.gateway.routes.CONVERSATIONS_MAX", 100)
    one, two = Target(1, "http://a", "k"), Target(1, "http://b", "k")
    cache = RouteCache()
    for number in range(1000):
        cache.pick((one, two), number)
    assert len(cache._conversations) == 100


def test_an_eta_that_has_passed_is_negative_and_none_stays_unknown() -> None:
    assert seconds_left(None) is None
    past = seconds_left(timezone.now() - timedelta(seconds=5))
    assert past is not None
    assert past < 0


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/anything/new", "/rerank", "/tokenize", "/v1/messages/count_tokens"]
)
def test_what_is_an_engines_to_answer(path: str) -> None:
    assert is_engines(path)


@pytest.mark.parametrize(
    "path",
    [
        "/v1",
        "/v1/",
        "/v1/models",
        "/v1/models/x",
        "/v1/../sleep",
        "/v1/x/../../sleep",
        "/v1//sleep",
        "/v1/./x",
        "/v1/\\..\\sleep",
        "/v1/x\r\n",
        "/v1/load_lora_adapter",
        "/sleep",
        "/wake_up",
        "/collective_rpc",
        "/metrics",
    ],
)
def test_nothing_leads_to_what_an_engine_keeps_beside_its_api(path: str) -> None:
    assert not is_engines(path)


MEMBERS = st.dictionaries(
    st.text(max_size=8).filter(lambda n: n not in ("model", "stream", "stream_options")),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=20), lambda inner: st.lists(inner, max_size=3)
    ),
    max_size=6,
)


@given(MEMBERS, st.text(min_size=1, max_size=10), st.text(min_size=1, max_size=10), st.booleans(), st.integers(0, 3))
def test_another_model_is_written_into_the_clients_own_bytes(
    members: dict[str, object], asked: str, served: str, ascii_only: bool, place: int
) -> None:
    pairs = list(members.items())
    pairs.insert(min(place, len(pairs)), ("model", asked))
    indent = place or None
    try:
        body = json.dumps(dict(pairs), ensure_ascii=ascii_only, indent=indent).encode()
        written = json.dumps(served, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate is no text that could be sent
        return
    parsed = parse_body(body, elements_max=1000)
    rewritten = parsed.rewritten(body, model=served, add_usage=False)
    assert json.loads(rewritten) == {**dict(pairs), "model": served}
    if asked == served:
        assert rewritten == body
    else:
        was = json.dumps(asked, ensure_ascii=ascii_only).encode()
        assert len(rewritten) == len(body) - len(was) + len(written)
    with_usage = json.loads(parsed.rewritten(body, model=served, add_usage=True))
    assert with_usage == {**dict(pairs), "model": served, "stream_options": {"include_usage": True}}


def test_stream_options_of_the_clients_own_stay() -> None:
    for options, wanted in (
        ("null", {"include_usage": True}),
        ("{}", {"include_usage": True}),
        ('{"include_usage": false, "x": 1}', {"include_usage": True, "x": 1}),
        ('{"include_usage": true}', {"include_usage": True}),
    ):
        body = f'{{"stream_options": {options}, "model": "é"}}'.encode()
        parsed = parse_body(body, elements_max=9)
        assert json.loads(parsed.rewritten(body, model="b", add_usage=True)) == {
            "model": "b",
            "stream_options": wanted,
        }


def test_a_member_that_decides_may_not_be_there_twice() -> None:
    for body in (b'{"model":"a","model":"b"}', b'{"model":"a","stream":true,"stream":false}'):
        with pytest.raises(errors.GatewayError, match="twice"):
            parse_body(body, elements_max=9)


def test_a_conversation_is_known_by_its_first_message() -> None:
    def opening(**members: object) -> bytes:
        return parse_body(json.dumps({"model": "m", **members}).encode(), elements_max=10**6).opening()

    system, hello = {"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hello"}
    answer, more = {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}
    assert opening(messages=[system, hello]) == opening(messages=[system, hello, answer, more])
    assert opening(messages=[system, hello]) != opening(messages=[system, more])
    assert opening(messages=[system, hello]) != opening(messages=[hello])
    assert opening(prompt="a") != opening(prompt="b")
    assert opening(prompt=["a", "b"]) == opening(prompt=["a"])
    assert opening(input=[[1, 2], [3]]) == opening(input=[[1, 2]])
    assert opening(temperature=1) == b""
    assert len(opening(messages=[{"role": "user", "content": [{"image": "x" * 10**6}] * 500}])) < 10**6


USAGE_ONLY = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":3}}'


@given(st.lists(st.integers(0, 400), max_size=8), st.sampled_from([b"\n\n", b"\r\n\r\n"]))
def test_the_figures_are_taken_out_however_the_stream_is_cut(cuts: list[int], end: bytes) -> None:
    said = b'data: {"choices":[{"delta":{"content":"\\"usage\\":{\\"prompt_tokens\\":99}"}}]}'
    kept = [b": comment", said, b"data: [DONE]"]
    stream = end.join([*kept[:2], USAGE_ONLY, kept[2], b""])
    places = sorted({0, len(stream), *(min(cut, len(stream)) for cut in cuts)})
    usage = Usage()
    tail, tap = EventTail(), EventTap(usage, strip=True)
    passed = b"".join(tap.passed(tail.whole(stream[a:b])) for a, b in pairwise(places)) + tap.passed(tail.rest())
    assert passed == end.join([*kept, b""])
    assert (usage.tokens_in, usage.tokens_out, usage.tokens_cached) == (11, 3, None)


def test_an_event_with_words_and_figures_is_not_taken_out() -> None:
    event = b'data: {"choices":[{"delta":{"content":"x"}}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
    usage = Usage()
    assert EventTap(usage, strip=True).passed(event) == event
    assert (usage.tokens_in, usage.tokens_out) == (1, 2)
    unasked = USAGE_ONLY + b"\n\n"
    assert EventTap(usage, strip=False).passed(unasked) == unasked


@pytest.mark.parametrize(
    ("figures", "wanted"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}}, (5, 7, 4)),
        ({"prompt_tokens": 5, "completion_tokens": 7, "prompt_tokens_details": None}, (5, 7, None)),
        ({"input_tokens": 5, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 4}}, (5, 7, 4)),
        ({"input_tokens": 5, "cache_read_input_tokens": 4, "output_tokens": 7}, (9, 7, 4)),
        ({"total_tokens": 40}, (40, None, None)),
        ({"prompt_tokens": 7, "total_tokens": 7}, (7, None, None)),
        ({"prompt_tokens": "many", "completion_tokens": -1}, (None, None, None)),
        ({"type": "duration", "seconds": 4}, (None, None, None)),
    ],
)
def test_figures_of_every_dialect_mean_the_same(figures: dict[str, object], wanted: tuple[int | None, ...]) -> None:
    usage = Usage()
    usage.take(figures)
    assert (usage.tokens_in, usage.tokens_out, usage.tokens_cached) == wanted


def test_the_figures_of_a_long_answer_are_found_at_its_end_or_beginning() -> None:
    for answer in (
        b'{"data":"' + b"x" * 10**6 + b'","usage":{"prompt_tokens":5}}',
        b'{"usage":{"prompt_tokens":5},"data":"' + b"x" * 10**6 + b'"}',
    ):
        tail, usage = AnswerTail(), Usage()
        for start in range(0, len(answer), 1000):
            tail.see(answer[start : start + 1000])
        tail.read_into(usage)
        assert usage.tokens_in == 5
        assert sum(map(len, tail._parts)) < 100_000


def test_events_split_at_both_kinds_of_ends() -> None:
    assert split_events(b"a\n\nb\r\n\r\nc") == [b"a\n\n", b"b\r\n\r\n", b"c"]


def delta(**members: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": members, "finish_reason": None}]})


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@pytest.mark.parametrize(
    "events",
    [
        b"",
        b": waiting\n\n",
        b"data: [DONE]\n\n",
        delta(role="assistant"),
        delta(role="assistant", content=""),
        delta(role="assistant", content=None, reasoning_content=None, tool_calls=[]),
        delta(),
        event({"choices": [], "usage": {"prompt_tokens": 1}}),
        event({"choices": [{"index": 0, "text": ""}]}),
        event({"error": {"message": "no room"}}),
        event({"type": "ping"}),
        event({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": ""}}),
        event({"type": "message_delta", "delta": {"stop_reason": "end_turn"}}),
        event({"type": "response.output_item.added", "item": {"type": "message"}}),
    ],
)
def test_what_only_opens_or_ends_an_answer_is_no_token(events: bytes) -> None:
    assert not brings_token(events)


@pytest.mark.parametrize(
    "events",
    [
        delta(content="Hi"),
        delta(role="assistant", content="Hi"),
        delta(content="data: [DONE]"),
        delta(reasoning_content="Let me"),
        delta(reasoning="Let me"),
        delta(tool_calls=[{"index": 0, "function": {"name": "now", "arguments": ""}}]),
        delta(role="assistant") + delta(content="Hi"),
        event({"choices": [{"index": 0, "text": " "}]}),
        delta(content="Hi").replace(b"data: ", b"data:").replace(b"\n", b"\r\n"),
        event({"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Let"}}),
        event({"type": "response.function_call_arguments.delta", "delta": "{"}),
        event({"type": "transcript.text.delta", "delta": "Hi"}),
        event({"content": "of a shape that nobody knows"}),
        b"data: no JSON\n\n",
    ],
)
def test_text_reasoning_and_calls_of_tools_are_tokens(events: bytes) -> None:
    assert brings_token(events)


@pytest.mark.parametrize(("path", "first"), [("/v1/messages", b"Hi "), ("/v1/responses", b"Hi there")])
def test_other_protocols_open_their_answers_with_events_that_bring_no_token(path: str, first: bytes) -> None:
    begun = next(events for events in dialects.STREAMS[path] if brings_token(events))
    assert first in begun
    assert b".delta" in begun or b"content_block_delta" in begun
