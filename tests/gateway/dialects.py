"""What engines answer where it is not OpenAI's chat, as vLLM and llama.cpp write it."""

from __future__ import annotations

import json
from typing import Any


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _event(kind: str, value: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **value})}\n\n".encode()


MESSAGE: dict[str, Any] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "coder",
    "content": [{"type": "text", "text": "Hi there"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "cache_read_input_tokens": 9, "output_tokens": 2},
}
RESPONSE: dict[str, Any] = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "model": "coder",
    "output": [
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Hi there", "annotations": []}],
        }
    ],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "usage": {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 9},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    },
}
ANSWERS = {
    "/v1/messages": _json(MESSAGE),
    "/v1/messages/count_tokens": _json({"input_tokens": 12}),
    "/v1/responses": _json(RESPONSE),
    "/v1/responses/resp_1": _json(RESPONSE),
    "/tokenize": _json({"tokens": [1, 2, 3], "count": 3, "max_model_len": 4096}),
    "/detokenize": _json({"prompt": "Hi there"}),
    "/v1/rerank": _json({"id": "r", "model": "coder", "usage": {"total_tokens": 40}, "results": []}),
    "/v1/score": _json({"id": "s", "object": "list", "data": [], "usage": {"prompt_tokens": 7, "total_tokens": 7}}),
    "/v1/audio/transcriptions": _json({"text": "hello world", "usage": {"type": "duration", "seconds": 4}}),
}
STREAMS = {
    "/v1/messages": [
        _event("message_start", {"message": {**MESSAGE, "content": [], "stop_reason": None}}),
        _event("content_block_start", {"index": 0, "content_block": {"type": "text", "text": ""}}),
        _event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "Hi "}}),
        _event("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": "there"}}),
        _event("content_block_stop", {"index": 0}),
        _event(
            "message_delta",
            {"delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 2}},
        ),
        _event("message_stop", {}),
    ],
    "/v1/responses": [
        _event("response.created", {"sequence_number": 0, "response": {**RESPONSE, "output": [], "usage": None}}),
        _event(
            "response.output_text.delta",
            {
                "sequence_number": 1,
                "item_id": "msg_1",
                "output_index": 0,
                "content_index": 0,
                "delta": "Hi there",
                "logprobs": [],
            },
        ),
        _event("response.completed", {"sequence_number": 2, "response": RESPONSE}),
    ],
}


def form_field(raw: bytes, boundary: str, name: str) -> str | None:
    """The value of a plain field of a multipart body."""
    for part in raw.split(b"--" + boundary.encode()):
        head, _, content = part.partition(b"\r\n\r\n")
        if f'name="{name}"'.encode() in head and b"filename" not in head:
            return content.removesuffix(b"\r\n").decode()
    return None
