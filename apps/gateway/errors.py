"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``; on Anthropic's paths in theirs:
``{"type": "error", "error": {"type", "message"}, "request_id"}``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
# https://docs.anthropic.com/en/api/errors
ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
SHOWN_NAMES_MAX = 20
SHOWN_NAME_LENGTH_MAX = 200


class GatewayError(Exception):
    """An answer that is not the engine's. ``message`` says what happened and what to do."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        error_type: str = "",
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.error_type = error_type or (SERVER_ERROR if status >= 500 else INVALID_REQUEST)
        self.param = param
        self.headers = list(headers)
        if retry_after_s is not None:
            self.headers.append((b"retry-after", str(max(1, retry_after_s)).encode()))

    @property
    def payload(self) -> dict[str, Any]:
        return {
            "error": {"message": self.message, "type": self.error_type, "param": self.param, "code": self.code},
        }

    def anthropic_payload(self, request_id: str) -> dict[str, Any]:
        otherwise = "api_error" if self.status >= 500 else INVALID_REQUEST
        error = {"type": ANTHROPIC_TYPES.get(self.status, otherwise), "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}

    def as_event(self) -> bytes:
        """For a stream whose 200 is already sent; OpenAI's clients raise on a data event with ``error``."""
        return b"data: " + json.dumps(self.payload).encode() + b"\n\ndata: [DONE]\n\n"

    def as_anthropic_event(self, request_id: str) -> bytes:
        return b"event: error\ndata: " + json.dumps(self.anthropic_payload(request_id)).encode() + b"\n\n"


def _shown(name: str) -> str:
    return name if len(name) <= SHOWN_NAME_LENGTH_MAX else name[:SHOWN_NAME_LENGTH_MAX] + "…"


def bad_request(message: str, *, code: str = "invalid_request", param: str | None = None) -> GatewayError:
    return GatewayError(400, code, message, param=param)


def upgrade_with_body() -> GatewayError:
    return bad_request(
        "The request has a body and the header 'Upgrade', which the gateway does not answer. Send it as plain HTTP/1.1 "
        "(in Java: HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1))."
    )


def key_missing() -> GatewayError:
    return GatewayError(
        401,
        "invalid_api_key",
        "No API key was given. Send the header 'Authorization: Bearer rp-…' (or 'x-api-key: rp-…'); "
        "keys are made on the panel's page /me/.",
        headers=[(b"www-authenticate", b"Bearer")],
    )


def key_refused() -> GatewayError:
    """One answer for unknown, revoked and expired keys and for people who may not use the gateway: the
    difference is nobody's business who does not hold a valid key."""
    return GatewayError(
        401,
        "invalid_api_key",
        "This API key is not valid: it is unknown, was revoked, has expired, or its owner may not use the gateway. "
        "Make a new one on the panel's page /me/.",
        headers=[(b"www-authenticate", b'Bearer error="invalid_token"')],
    )


def key_from_elsewhere(address: str) -> GatewayError:
    return GatewayError(
        403,
        "network_not_allowed",
        f"This API key is limited to certain networks, and {address or 'where you are'} is in none of them.",
    )


def key_not_for(model: str, models: Iterable[str]) -> GatewayError:
    listed = ", ".join(sorted(models)[:SHOWN_NAMES_MAX])
    return GatewayError(
        403, "model_not_allowed", f"This API key is not for {_shown(model)!r}, only for: {listed}.", param="model"
    )


def key_ended() -> GatewayError:
    """For a stream that is cut."""
    return GatewayError(
        401,
        "key_revoked",
        "The API key was revoked, or its owner may not use the gateway any more, during this answer.",
    )


def person_refused(why: str) -> GatewayError:
    return GatewayError(401, "invalid_user_token", f"Open WebUI's header X-OpenWebUI-User-Jwt does not count. {why}")


def person_not_allowed(email: str) -> GatewayError:
    return GatewayError(
        403, "person_not_allowed", f"{_shown(email)} may not use the gateway; an owner can change that in the panel."
    )


def not_found(path: str) -> GatewayError:
    return GatewayError(404, "not_found", f"There is nothing at {_shown(path)!r} on the gateway; its API is /v1/.")


def method_not_allowed(method: str, path: str, allowed: str) -> GatewayError:
    return GatewayError(
        405,
        "method_not_allowed",
        f"{path} answers {allowed}, not {_shown(method)}.",
        headers=[(b"allow", allowed.encode())],
    )


def body_too_large(limit_bytes: int) -> GatewayError:
    return GatewayError(
        413,
        "request_too_large",
        f"The request is larger than {limit_bytes // (1024 * 1024)} MiB, the most that the gateway takes.",
    )


def model_too_late(limit_bytes: int) -> GatewayError:
    return GatewayError(
        413,
        "request_too_large",
        f"The form's field 'model' does not come within its first {limit_bytes // (1024 * 1024)} MiB; "
        "send it before the file.",
        param="model",
    )


def model_needed(available: Iterable[str]) -> GatewayError:
    """A request that names no model although there is not just one."""
    names = list(available)
    listed = ", ".join(names[:SHOWN_NAMES_MAX]) or "none is being served"
    return GatewayError(
        400, "invalid_request", f"Say which model is meant, with ?model=NAME. Available: {listed}.", param="model"
    )


def body_too_slow(limit_s: float) -> GatewayError:
    return GatewayError(408, "request_timeout", f"The request's body did not arrive within {limit_s:.0f} s.")


def head_too_slow(limit_s: float) -> GatewayError:
    return GatewayError(408, "request_timeout", f"The request's head did not arrive within {limit_s:.0f} s.")


def too_many_bodies() -> GatewayError:
    return GatewayError(
        503, "busy", "The gateway holds too many large requests at the moment; try again shortly.", retry_after_s=5
    )


def model_not_found(model: str, available: Iterable[str]) -> GatewayError:
    names = list(available)
    listed = ", ".join(names[:SHOWN_NAMES_MAX]) + (" and more" if len(names) > SHOWN_NAMES_MAX else "")
    hint = f"Available: {listed}." if names else "No model is being served; switch to one in the panel."
    return GatewayError(
        404, "model_not_found", f"The model {_shown(model)!r} is not served here. {hint}", param="model"
    )


def model_loading(model: str, waited_s: float, eta_s: float | None, why: str = "") -> GatewayError:
    if eta_s is None and why:
        outlook, retry_after_s = why, 30
    elif eta_s is None:
        outlook, retry_after_s = "How long it will take is not known.", 30
    elif eta_s <= 0:
        outlook, retry_after_s = "It is taking longer than expected.", 15
    else:
        outlook, retry_after_s = f"It should be ready in about {duration(eta_s)}.", int(eta_s) + 1
    return GatewayError(
        503,
        "model_loading",
        f"The model {_shown(model)!r} is still not loaded after {duration(waited_s)}. {outlook} Try again then.",
        retry_after_s=min(retry_after_s, 600),
    )


def no_model(model: str, why: str) -> GatewayError:
    return GatewayError(503, "no_model", f"The model {model!r} cannot answer: {why}", retry_after_s=10)


def not_loaded(model: str, why: str, *, forbidden: bool, again_s: int | None) -> GatewayError:
    return GatewayError(
        403 if forbidden else 503,
        "model_not_loaded",
        f"The model {_shown(model)!r} is not loaded. {why}",
        param="model",
        retry_after_s=again_s if again_s or forbidden else 30,
    )


def engine_died(model: str) -> GatewayError:
    return GatewayError(
        502,
        "engine_died",
        f"The engine of {model!r} ended the connection before its answer was complete. "
        "It may have crashed or been stopped; the panel's page /jobs/ tells.",
    )


def engine_broken(model: str) -> GatewayError:
    return GatewayError(502, "engine_error", f"The engine of {model!r} sent something that is not HTTP.")


def engine_no_stream(model: str) -> GatewayError:
    return GatewayError(
        502,
        "engine_error",
        f"The engine of {model!r} was asked for a stream and sent neither one nor a JSON object in its place. "
        "Ask without 'stream', or look at the engine's log on the panel's page /deployments/.",
    )


def out_of_touch(stale_s: float) -> GatewayError:
    return GatewayError(
        503,
        "database_unreachable",
        f"The gateway has not reached the panel's database for more than {duration(stale_s)}, so it no longer knows "
        "which keys and models are current. Somebody with access to the machine should look at the panel's log.",
        retry_after_s=30,
    )


def starting_up() -> GatewayError:
    return GatewayError(
        503,
        "starting",
        "The gateway has just started and has not read keys and models from the panel's database yet.",
        retry_after_s=2,
    )


def not_here(method: str) -> GatewayError:
    """What the llama.cpp router has and a panel with a history and roles does on its own pages."""
    what = "Models are downloaded" if method == "POST" else "Models are removed"
    return GatewayError(501, "not_implemented", f"{what} on the panel's page /models/, not through the gateway.")


def already_running(model: str) -> GatewayError:
    return GatewayError(400, "already_running", f"The model {_shown(model)!r} is already running.", param="model")


def not_running(model: str) -> GatewayError:
    return GatewayError(400, "not_running", f"The model {_shown(model)!r} is not running.", param="model")


def operators_stop() -> GatewayError:
    return GatewayError(403, "not_allowed", "Only operators and owners may stop a model.")


def stopping() -> GatewayError:
    return GatewayError(
        503, "stopping", "The gateway is being stopped or restarted; try again shortly.", retry_after_s=5
    )


def internal() -> GatewayError:
    return GatewayError(500, "internal_error", "Something in the gateway went wrong; its log has the details.")


def duration(seconds: float) -> str:
    """In words: ``12 s``, ``3 min 20 s``."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"
