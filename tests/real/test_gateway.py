"""The gateway before a real llama.cpp server, with the official clients: its dialects and their figures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest

from apps.deployments import routes
from tests.gateway.conftest import House, bobs_key, house, loop_thread, within  # noqa: F401 - fixtures
from tests.gateway.helpers import Engine as Address
from tests.gateway.helpers import until
from tests.gateway.test_observer import Recorder
from tests.real.test_llama_cpp_engine import (  # noqa: F401 - fixtures
    KEY,
    Engine,
    free_port,
    pytestmark,
    runner,
    serving,
)
from tests.real.test_llama_cpp_engine import (
    MODEL as GGUF,
)

pytestmark = [pytest.mark.django_db(transaction=True), pytestmark]
MODEL = "gemma-3-270m"
HELLO: Any = [{"role": "user", "content": "Name three colours."}]


@dataclass(frozen=True, slots=True)
class Door:
    """A gateway before one real engine, and the clients of somebody with a key."""

    gateway: Any
    recorder: Recorder
    key: str
    openai: openai.OpenAI
    anthropic: anthropic.Anthropic


@pytest.fixture
def opened(house: House, within: Any, bobs_key: str) -> Callable[[Engine], Door]:  # noqa: F811
    def to(engine: Engine) -> Door:
        routes.open_to(house.deploy(MODEL, Address(MODEL, key=KEY, port=engine.port)))
        recorder = Recorder()
        gateway = within(recorder)
        house.applied(gateway)
        url = f"http://127.0.0.1:{gateway.port}"
        return Door(
            gateway,
            recorder,
            bobs_key,
            openai.OpenAI(base_url=f"{url}/v1", api_key=bobs_key, max_retries=0),
            anthropic.Anthropic(base_url=url, api_key=bobs_key, max_retries=0),
        )

    return to


@pytest.fixture
def launched(runner: Any, opened: Callable[[Engine], Door]) -> Callable[..., Door]:  # noqa: F811
    """Behind an engine with options of its own."""

    def with_options(name: str, **options: Any) -> Door:
        engine = Engine(runner, name, GGUF, free_port(), {"extra_args": ["--no-warmup"], **options})
        engine.wait_until_ready()
        return opened(engine)

    return with_options


def test_a_real_engine_speaks_through_the_gateway(opened: Callable[[Engine], Door], serving: Engine) -> None:  # noqa: F811
    door = opened(serving)
    recorder, client, claude = door.recorder, door.openai, door.anthropic

    def figures() -> tuple[int, int]:
        seen = until(lambda: recorder.closed and recorder.closed.pop(), "the end was not told")
        assert (seen.outcome, seen.status) == ("ok", 200)
        assert seen.tokens_in is not None
        assert seen.tokens_out is not None
        return seen.tokens_in, seen.tokens_out

    chunks = list(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8, stream=True))
    assert not any(chunk.usage for chunk in chunks if not chunk.choices)  # nobody asked for them
    prompt_tokens, said = figures()
    assert prompt_tokens > 5
    assert 0 < said <= 8
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=8)
    assert whole.usage is not None
    assert figures() == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    told = client.completions.create(model=MODEL, prompt="The capital of France is", max_tokens=4)
    assert told.usage is not None
    assert figures() == (told.usage.prompt_tokens, told.usage.completion_tokens)
    pieces = list(client.completions.create(model=MODEL, prompt="The capital", max_tokens=4, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices)
    assert figures()[1] == 4
    response = client.responses.create(model=MODEL, input="Name three colours.", max_output_tokens=8)
    assert response.output_text
    assert figures()[1] > 0

    with claude.messages.stream(model=MODEL, max_tokens=8, messages=HELLO) as stream:
        assert stream.get_final_text()
    tokens_in, tokens_out = figures()
    assert tokens_in == prompt_tokens
    assert 0 < tokens_out <= 8
    assert claude.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens == prompt_tokens
    with pytest.raises(openai.BadRequestError, match=r"(?i)messages"):  # the engine's own words
        client.chat.completions.create(model=MODEL, messages="Hello")  # type: ignore[call-overload]
    assert recorder.closed.pop().outcome == "refused"
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        claude.messages.create(model="claude-haiku-4-5", max_tokens=8, messages=HELLO)
    tokens = door.gateway.ask("POST", "/tokenize", {"model": MODEL, "content": "Name three colours."}, key=door.key)
    assert len(tokens.json["tokens"]) > 3


# A template that knows tools, for the file has none; few as its parameters are, the model copies calls that it sees.
TOOLS_TEMPLATE = """{% if tools %}<start_of_turn>user
You may call functions. They are:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>
For a call answer with <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call><end_of_turn>
{% endif %}{% for message in messages %}<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}
{% if message.role == 'tool' %}<tool_response>
{{ message.content }}
</tool_response>{% else %}{{ message.content or '' }}{% endif %}{% for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""
CITY = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}}, "required": ["city"]}
WEATHER: Any = {"name": "get_weather", "description": "The weather of a city", "parameters": CITY}


def calls(number: int) -> list[Any]:
    """A question, its call and its answer."""
    function = {"name": "get_weather", "arguments": json.dumps({"city": "Rome"})}
    return [
        {"role": "user", "content": "Weather in Rome?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": f"c{number}", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": f"c{number}", "content": "sunny"},
    ]


def test_tools_are_called_through_the_gateway(launched: Callable[..., Door]) -> None:
    door = launched("tools", chat_template=TOOLS_TEMPLATE, context_tokens=2048)
    client = door.openai
    wish: Any = {
        "model": MODEL,
        "messages": [*calls(1), *calls(2), {"role": "user", "content": "Weather in Paris?"}],
        "tools": [{"type": "function", "function": WEATHER}],
        "tool_choice": "required",
        "max_tokens": 40,
        "temperature": 0,
    }
    (call,) = client.chat.completions.create(**wish).choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris"})
    pieces = [
        piece.function
        for chunk in client.chat.completions.create(**wish, stream=True)
        if chunk.choices
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    assert len(pieces) > 2
    assert json.loads("".join(piece.arguments or "" for piece in pieces)) == {"city": "Paris"}
    whole, streamed = door.recorder.closed
    assert (whole.tokens_in, whole.tokens_out) == (streamed.tokens_in, streamed.tokens_out)

    asked: Any = {
        "model": MODEL,
        "max_tokens": 40,
        "extra_body": {"temperature": 0},
        "tools": [{"name": "get_weather", "description": "The weather of a city", "input_schema": CITY}],
        "tool_choice": {"type": "any"},
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            {"role": "assistant", "content": [used("c1", "Rome")]},
            {"role": "user", "content": [answered("c1"), {"type": "text", "text": "Weather in Rome?"}]},
            {"role": "assistant", "content": [used("c2", "Rome")]},
            {"role": "user", "content": [answered("c2"), {"type": "text", "text": "Weather in Paris?"}]},
        ],
    }
    blocks = door.anthropic.messages.create(**asked).content
    assert [(block.name, block.input) for block in blocks if block.type == "tool_use"][:1] == [
        ("get_weather", {"city": "Paris"})
    ]


def used(call_id: str, city: str) -> dict[str, Any]:
    return {"type": "tool_use", "id": call_id, "name": "get_weather", "input": {"city": city}}


def answered(call_id: str) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": call_id, "content": "sunny"}


def test_embeddings_come_through_the_gateway(launched: Callable[..., Door]) -> None:
    door = launched("embeddings", embeddings=True, pooling="mean")
    made = door.openai.embeddings.create(model=MODEL, input=["Paris", "Rome is a city"])
    assert [len(item.embedding) for item in made.data] == [640, 640]
    seen = until(lambda: door.recorder.closed and door.recorder.closed.pop(), "the end was not told")
    assert (seen.tokens_in, seen.tokens_out or 0) == (made.usage.prompt_tokens, 0)
