"""The gateway as a bare ASGI application: paths, keys, answers, log lines. A Django view per request and
per chunk would cost more than the engine's own HTTP server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog
from django.conf import settings

from apps.common.networks import is_within
from apps.common.roles import Role
from apps.gateway import errors
from apps.gateway.access_log import AccessLog
from apps.gateway.bodies import parse_body
from apps.gateway.client import BodyBudget, Client, ClientGone
from apps.gateway.identity import TASK_HEADER, named_person, origin
from apps.gateway.intake import call_of, only_model, read_wish
from apps.gateway.keys import Key, KeyCache, is_like_a_key
from apps.gateway.limits import Limits
from apps.gateway.listing import allows, anthropic_list, openai_list, router_list, stream_changes, usable
from apps.gateway.menu import SLEEPING, UNLOADED
from apps.gateway.metrics import NO_MODEL, Metrics
from apps.gateway.observer import Exchange, Observer
from apps.gateway.protocol import (
    ANTHROPIC_PATHS,
    FORM_PATHS,
    JSON_PATHS,
    METHODS,
    MODELS_PATH,
    Receive,
    Scope,
    Send,
    bearer_token,
    header,
    is_engines,
    request_id,
)
from apps.gateway.proxy import Proxy
from apps.gateway.registration import Registration
from apps.gateway.routes import RouteCache
from apps.gateway.wishes import Wish, Wishes

log = structlog.get_logger(__name__)
ROUTER_PATHS = frozenset({"/models", "/models/load", "/models/unload", "/models/sse"})
SMALL_ELEMENTS = 1000
LOOPBACK = frozenset({"127.0.0.1", "::1"})
FORWARDING_HEADERS = (b"forwarded", b"x-forwarded-for", b"x-real-ip")
TASK_LENGTH_MAX = 40
GUEST_LENGTH_MAX = 150
NOBODY = "somebody"  # behind Open WebUI's key, without a name


@dataclass(frozen=True, slots=True)
class Caller:
    """``user_id`` and ``role`` are the person's: the key's owner, or whom Open WebUI names behind its key.

    ``guest``: somebody behind that key without an account here. The use is its owner's, nothing else of theirs is."""

    key: Key
    user_id: int
    role: str
    task: str = ""
    guest: str = ""


class Gateway:
    """One process's gateway; ``limits`` are shortened by tests, ``observer`` counts, limits and queues."""

    def __init__(self, limits: Limits | None = None, observer: Observer | None = None) -> None:
        self.limits = limits or Limits()
        self.observer = observer or Observer()
        self._running: dict[Client, Exchange] = {}
        self._proxies = settings.TRUSTED_PROXIES
        self.routes = RouteCache()
        self.keys = KeyCache()
        self.keys.on_gone = self._cut
        self.budget = BodyBudget(self.limits.buffered_bytes)
        self.access_log = AccessLog()
        self.metrics = Metrics(self.routes, self.keys, self.budget)
        self.registration = Registration(self.routes, self.keys, self.limits)
        self.wishes = Wishes(self.registration.refresh_now)
        self.routes.on_apply = self.wishes.wake
        self.proxy = Proxy(self.routes, self.limits, self.registration.refresh_now, self.observer, self.wishes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:  # a websocket, where the server was not told to refuse them
            await send({"type": "websocket.close", "code": 1008})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self.registration.start()
                await self.observer.start()
                await send({"type": "lifespan.startup.complete"})
            else:
                await self.registration.stop()
                await self.wishes.stop()
                self.proxy.stop()
                await self.observer.stop()
                self.access_log.flush()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        client = Client(scope, receive, send, request_id(scope["headers"]))
        caller: Caller | None = None
        outcome = "ok"
        try:
            path: str = scope["path"]
            if is_engines(path):
                client.anthropic = path in ANTHROPIC_PATHS
                _only(scope, *(("POST",) if path in JSON_PATHS or path in FORM_PATHS else sorted(METHODS)))
                caller = await self._caller(client, scope)
                await self._forward(client, caller, scope, began)
            else:
                caller = await self._answer(client, scope, path)
        except errors.GatewayError as error:
            outcome = error.code
            if caller is not None and client.tell_end is None:  # it did not begin, so it has no line in the ledger
                self._refused(caller, client.model, error)
            await client.answer_error(error)
        except ClientGone:
            outcome = "client_gone"
        except asyncio.CancelledError:
            # The server's deadline for running requests has passed: a last word instead of a torn line.
            outcome = "stopping"
            await client.answer_error(errors.stopping())
        except Exception:
            outcome = "internal_error"
            log.exception("request failed", request_id=client.request_id)
            await client.answer_error(errors.internal())
        finally:
            client.ends(outcome)
            outcome = client.outcome if outcome == "ok" else outcome
            self._record(scope, client, caller, outcome, time.monotonic() - began)

    # -- paths ----------------------------------------------------------------------------------

    async def _answer(self, client: Client, scope: Scope, path: str) -> Caller | None:
        """Everything that is not forwarded. Returns who asked, where a key was used."""
        if path == "/healthz":
            _only(scope, "GET", "HEAD")
            await client.answer_json(200, {"status": "ok"})
            return None
        if path == "/metrics":
            _only(scope, "GET", "HEAD")
            caller = None if _is_local(scope) else await self._caller(client, scope)
            await client.answer(200, self.metrics.text(), b"text/plain; version=0.0.4; charset=utf-8")
            return caller
        if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            _only(scope, "GET", "HEAD")
            caller = await self._caller(client, scope)
            self._check_in_touch()
            await client.answer_json(200, self._models(client, caller, path))
            return caller
        if path in ROUTER_PATHS:
            return await self._router(client, scope)
        raise errors.not_found(path)

    async def _forward(self, client: Client, caller: Caller, scope: Scope, began: float) -> None:
        with self.budget.share() as share:
            wish = await read_wish(client, scope, self.limits, share)
            client.model = wish.asked_model = wish.asked_model or only_model(
                [name for name in self.routes.names() if allows(caller.key, name)]
            )
            model = self.routes.menu.resolve(wish.asked_model)
            if not allows(caller.key, model, wish.asked_model):
                raise errors.key_not_for(wish.asked_model, caller.key.models)
            caller = self._still(caller)
            client.model = model
            exchange = Exchange(
                request_id=client.request_id,
                path=wish.path,
                key_id=caller.key.id,
                key_owner_id=caller.key.user_id,
                user_id=caller.user_id,
                asked_model=wish.asked_model,
                model=model,
                stream=wish.stream,
                began_at=time.time() - (time.monotonic() - began),
                body_bytes=len(wish.body),
                tokens_limit=wish.parsed.tokens_limit if wish.parsed else None,
                task=caller.task,
                guest=caller.guest,
            )
            client.more_headers = exchange.answer_headers
            self.observer.admit(exchange)
            self.observer.open(exchange)
            client.tell_end = partial(self._close, exchange, began)
            if self.routes.entry(model) is None:
                model = exchange.model = await self._on_the_menu(wish.asked_model, caller)
                caller = self._still(caller)  # from here on ``_cut`` sees to it
            client.model = model
            again = partial(self._check_again, caller.key, model, wish.asked_model)
            call = call_of(wish, model, share=share, exchange=exchange, began=began, check_again=again)
            del wish  # the call lets go of the body once the engine has it
            self._running[client] = exchange
            try:
                async with client.watched(call.upload.finished if call.upload else None):
                    await self.proxy.forward(client, call)
            finally:
                del self._running[client]

    def _still(self, caller: Caller) -> Caller:
        """The caller with the role that they have by now. Raises 401 when the key was revoked or the person left after
        ``_caller`` looked."""
        role = self.keys.role(caller.key, caller.user_id)
        if role is None:
            raise errors.key_ended()
        return caller if caller.guest or role == caller.role else replace(caller, role=role)

    def _check_again(self, key: Key, model: str, asked: str) -> None:
        """Raises 403 when the alias by which a key may use the model does not lead there any more."""
        if not allows(key, model, asked if self.routes.menu.resolve(asked) == model else model):
            raise errors.key_not_for(model, key.models)

    async def _on_the_menu(self, asked: str, caller: Caller) -> str:
        """The served name of what no route leads to yet. Raises 404 when no profile could serve it either, and 403 when
        the name leads elsewhere by now, to what the key is not for."""
        model = self.routes.menu.resolve(asked)
        if model not in self.routes.menu.offers:
            await self.registration.menu_now()
            model = self.routes.menu.resolve(asked)
            if not allows(caller.key, model, asked):
                raise errors.key_not_for(asked, caller.key.models)
        self._check_in_touch()
        if self.routes.entry(model) is None and model not in self.routes.menu.offers:
            raise errors.model_not_found(asked, usable(self.routes, caller.key, caller.role))
        return model

    def _models(self, client: Client, caller: Caller, path: str) -> dict[str, Any]:
        """The list, or one model of it; in Anthropic's shape for their clients."""
        key, role = caller.key, caller.role
        if path == MODELS_PATH:
            if header(client.headers, b"anthropic-version") is not None:
                return anthropic_list(self.routes, key, role)
            return {"object": "list", "data": openai_list(self.routes, key, role)}
        name = path.removeprefix(MODELS_PATH + "/")
        found = next((row for row in openai_list(self.routes, key, role) if row["id"] == name), None)
        if found is None:
            raise errors.model_not_found(name, usable(self.routes, key, role))
        return found

    async def _router(self, client: Client, scope: Scope) -> Caller:
        """The llama.cpp router's dialect, by which Open WebUI shows models and loads them."""
        path, method = scope["path"], scope["method"]
        caller = await self._caller(client, scope)
        if path == "/models" and method in ("POST", "DELETE"):
            raise errors.not_here(method)
        _only(scope, *(("POST",) if path in ("/models/load", "/models/unload") else ("GET", "HEAD")))
        if path == "/models":
            await client.answer_json(200, router_list(self.routes, caller.key, caller.role))
        elif path == "/models/sse":
            async with client.watched():
                await stream_changes(client, self.routes, caller.key, caller.role)
        else:
            await self._load_or_unload(client, caller, load=path == "/models/load")
        return caller

    async def _load_or_unload(self, client: Client, caller: Caller, *, load: bool) -> None:
        with self.budget.share() as share:
            body = await client.body(self.limits, share)
            asked = parse_body(body, elements_max=SMALL_ELEMENTS).model
        model = self.routes.menu.resolve(asked)
        if not allows(caller.key, model, asked):
            raise errors.key_not_for(asked, caller.key.models)
        if self.routes.entry(model) is None and model not in self.routes.menu.waiting:
            model = await self._on_the_menu(asked, caller)
        caller = self._still(caller)
        running = self.routes.state(model) != UNLOADED
        wish = Wish(model, caller.user_id, explicit=True, guest=caller.guest)
        if load:
            if running and self.routes.state(model) != SLEEPING:
                raise errors.already_running(model)
            answer = await self.wishes.ask(wish)
        else:
            if not running and model not in self.routes.menu.waiting:
                raise errors.not_running(model)
            if not Role(caller.role).covers(Role.OPERATOR):
                raise errors.operators_stop()
            answer = await self.wishes.unload(wish)
        if answer.refused or answer.waits:
            why = answer.refused or answer.waits
            raise errors.not_loaded(model, why, forbidden=answer.forbidden, again_s=answer.again_s)
        await client.answer_json(200, {"success": True})

    # -- who ------------------------------------------------------------------------------------

    async def _caller(self, client: Client, scope: Scope) -> Caller:
        """Who asks. Raises 401 and 403, or 503 when keys are not known well enough to say."""
        token = bearer_token(client.headers)
        if token is None:
            raise errors.key_missing()
        self._check_in_touch()
        key = self.keys.lookup(token)
        if key is None and is_like_a_key(token):  # made a moment ago, perhaps: its owner saw it on a page just now
            await self.registration.refresh_now()
            key = self.keys.lookup(token)
        if key is None:
            raise errors.key_refused()
        try:
            return self._person(client, scope, key)
        except errors.GatewayError as error:
            self._refused(Caller(key, key.user_id, key.role), "", error)
            raise

    def _person(self, client: Client, scope: Scope, key: Key) -> Caller:
        """Who asks with this key. Raises 403 when it is not for where or whom the request comes from, and 401."""
        if key.networks:
            address = origin(scope.get("client"), client.headers, self._proxies)
            if not is_within(address, key.networks):
                raise errors.key_from_elsewhere(address)
        self.keys.used(key)
        if not key.people_secret:  # whoever else sends such headers: they say nothing
            return Caller(key, key.user_id, key.role)
        task = (header(client.headers, TASK_HEADER) or b"").decode("latin-1")[:TASK_LENGTH_MAX]
        email = named_person(client.headers, key.people_secret)
        person = self.keys.person(email) if email else None
        if person is None:  # nobody is named, or somebody without an account here: a member, on the owner's account
            return Caller(key, key.user_id, Role.MEMBER, task, guest=(email or NOBODY)[:GUEST_LENGTH_MAX])
        if not person.may:
            raise errors.person_not_allowed(email or "")
        return Caller(key, person.user_id, person.role, task)

    def _cut(self, key_ids: set[int], user_ids: set[int]) -> None:
        """Keys were revoked, or people left: what they still have under way ends now."""
        for client, exchange in list(self._running.items()):
            if exchange.key_id in key_ids or not user_ids.isdisjoint((exchange.user_id, exchange.key_owner_id)):
                client.cut(errors.key_ended())

    def _check_in_touch(self) -> None:
        confirmed_at = self.keys.confirmed_at
        if confirmed_at is None:
            raise errors.starting_up()
        if time.monotonic() - confirmed_at > self.limits.stale_s:
            raise errors.out_of_touch(self.limits.stale_s)

    # -- afterwards -----------------------------------------------------------------------------

    def _refused(self, caller: Caller, model: str, error: errors.GatewayError) -> None:
        self.observer.refused(user_id=caller.user_id, key_id=caller.key.id, model=model, code=error.code)

    def _close(self, exchange: Exchange, began: float, outcome: str, status: int | None) -> None:
        exchange.status, exchange.outcome, exchange.duration_s = status, outcome, time.monotonic() - began
        self.observer.close(exchange)

    def _record(self, scope: Scope, client: Client, caller: Caller | None, outcome: str, duration_s: float) -> None:
        """One log line and the counters. Never the key, the body or the query."""
        path = scope["path"]
        if path in ("/healthz", "/metrics") and outcome == "ok":
            return
        known = client.model if self.routes.entry(client.model) else NO_MODEL
        status = client.status or 0
        self.metrics.requests.labels(known, str(status), outcome).inc()
        self.metrics.duration.labels(known).observe(duration_s)
        self.access_log.request(
            request_id=client.request_id,
            method=scope["method"],
            path=path,
            model=client.model,
            key_id=caller.key.id if caller else None,
            user_id=caller.user_id if caller else None,
            status=client.status,
            outcome=outcome,
            sent_bytes=client.sent_bytes,
            duration_s=duration_s,
        )


def _only(scope: Scope, *methods: str) -> None:
    if scope["method"] not in methods:
        raise errors.method_not_allowed(scope["method"], scope["path"], ", ".join(methods))


def _is_local(scope: Scope) -> bool:
    """Whether the request comes from this machine and was not forwarded by a proxy on it."""
    address = scope.get("client")
    forwarded = any(header(scope["headers"], name) is not None for name in FORWARDING_HEADERS)
    return address is not None and address[0] in LOOPBACK and not forwarded
