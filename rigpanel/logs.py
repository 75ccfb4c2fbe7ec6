"""Log lines: one per event, key=value, on stderr; the supervisor puts them in DATA_DIR/logs."""

from __future__ import annotations

import logging
import re
from typing import Any

import structlog

# A link that lets somebody in is a secret until it is used, and every 4xx answer logs its request.
_LINK = re.compile(r"(/(?:join|reset)/)[^\s'\"?]+")


def hide_links(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and ("/join/" in value or "/reset/" in value):
            event[key] = _LINK.sub(r"\1…", value)
    return event


_SHARED: list[Any] = [
    hide_links,
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


class HideLinks(logging.Filter):
    """For text that comes as it will be written."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = hide_links(None, "", {"event": record.msg})["event"]
        return True


class NoProbes(logging.Filter):
    """Whether everything is well is asked every few seconds, and "no" is an answer, not an error."""

    def filter(self, record: logging.LogRecord) -> bool:
        event = record.msg if isinstance(record.msg, dict) else {}
        return not str(event.get("request", "")).endswith((" /readyz", " /healthz"))


def logging_config(debug: bool) -> dict[str, Any]:
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "line": {
                "()": structlog.stdlib.ProcessorFormatter,
                "processor": structlog.processors.KeyValueRenderer(key_order=["timestamp", "level", "logger", "event"]),
                "foreign_pre_chain": _SHARED,
            },
            "as_it_is": {"format": "%(message)s"},
        },
        "filters": {"no_probes": {"()": NoProbes}, "hide_links": {"()": HideLinks}},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["no_probes"]},
            "lines": {"class": "logging.StreamHandler", "formatter": "as_it_is", "filters": ["hide_links"]},
        },
        "root": {"handlers": ["stderr"], "level": "DEBUG" if debug else "INFO"},
        "loggers": {
            "apps.gateway.requests": {"handlers": ["lines"], "propagate": False},  # whole lines, see its access_log.py
            "django.server": {"level": "WARNING"},
            "uvicorn.access": {"level": "WARNING"},
            "celery.worker.strategy": {"level": "WARNING"},
            "celery.worker.request": {"level": "WARNING"},
            "celery.app.trace": {"level": "WARNING"},
            "celery.beat": {"level": "WARNING"},
            "django_structlog": {"level": "WARNING"},
            "asyncio": {"level": "WARNING"},
        },
    }
