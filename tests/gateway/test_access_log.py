"""The gateway's own line per request is the one that structlog would write."""

from __future__ import annotations

import asyncio
import logging
import logging.config
from typing import Any

import pytest
import structlog

from apps.gateway.access_log import LOGGER, AccessLog
from rigpanel.logs import logging_config

REQUEST: dict[str, Any] = {
    "request_id": "req-1",
    "method": "POST",
    "path": "/v1/chat/completions",
    "model": "coder",
    "key_id": 3,
    "user_id": None,
    "status": 200,
    "outcome": "ok",
    "sent_bytes": 12,
    "duration_s": 0.01234,
}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the configured handler of these lines writes, record by record."""
    config = logging_config(debug=False)
    made = logging.config.DictConfigurator(config)  # type: ignore[attr-defined]
    made.config["filters"] = {"hide_links": made.configure_filter(config["filters"]["hide_links"])}
    made.config["formatters"] = {"as_it_is": made.configure_formatter(config["formatters"]["as_it_is"])}
    handler = made.configure_handler(config["handlers"]["lines"])
    written: list[str] = []
    monkeypatch.setattr(handler, "emit", lambda record: written.append(handler.format(record)))
    logger = logging.getLogger(LOGGER)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    assert config["loggers"][LOGGER]["handlers"] == ["lines"]
    return written


@pytest.mark.parametrize("text", ["plain", "it's", "both ' and \"", "two\nlines\r\x1b[31m", "ünï\u2028code", "a" * 99])
async def test_a_line_is_what_structlog_would_write(lines: list[str], text: str) -> None:
    log = AccessLog()
    log.request(**{**REQUEST, "path": text, "model": text})
    log.flush()
    (line,) = lines
    at = line.split("'")[1]
    renderer = structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "logger", "event"])
    event = {
        "event": "request", "request_id": "req-1", "method": "POST", "path": text, "model": text, "key": 3,
        "user": None, "status": 200, "outcome": "ok", "bytes": 12, "ms": 12.3,
        "level": "info", "logger": LOGGER, "timestamp": at,
    }  # fmt: skip
    assert line == renderer(None, "info", event)
    stamped = structlog.processors.TimeStamper(fmt="iso", utc=True)(None, "info", {})["timestamp"]
    assert (len(at) in (20, 27), at[:11], at[-1]) == (True, stamped[:11], "Z")


async def test_lines_are_written_together_and_soon(lines: list[str]) -> None:
    log = AccessLog()
    for number in range(3):
        log.request(**{**REQUEST, "request_id": f"req-{number}"})
    assert lines == []
    async with asyncio.timeout(20):
        while not lines:
            await asyncio.sleep(0.02)
    assert [line.split("request_id='")[1][:5] for line in lines[0].split("\n")] == ["req-0", "req-1", "req-2"]
    log.flush()
    assert len(lines) == 1


async def test_a_link_that_lets_somebody_in_is_not_in_it(lines: list[str]) -> None:
    log = AccessLog()
    log.request(**{**REQUEST, "path": "/join/secret-token"})
    log.flush()
    assert "secret-token" not in lines[0]
    assert "path='/join/…'" in lines[0]
