"""From a request to its engine and back: wait while the route is held, choose a target, pass bytes."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable

import structlog

from apps.deployments.models import RouteState
from apps.deployments.routes import RouteEntry, Target
from apps.gateway import errors
from apps.gateway.answer import Answer, BrokenAnswer, Disconnected
from apps.gateway.client import Client
from apps.gateway.intake import Call
from apps.gateway.limits import Limits
from apps.gateway.observer import REFUSED, Exchange, Observer
from apps.gateway.protocol import EventTail, answer_headers, is_event_stream, is_last_event, upstream_headers
from apps.gateway.routes import RouteCache, seconds_left
from apps.gateway.upstream import NotConnected, Upstream
from apps.gateway.usage import AnswerTail, EventTap, Usage, brings_token
from apps.gateway.wishes import Answer as WishAnswer
from apps.gateway.wishes import Wish, Wishes

log = structlog.get_logger(__name__)
ATTEMPTS_MAX = 8
AS_EVENT_BYTES_MAX = 64 * 1024 * 1024


class NotServed(Exception):
    """The target did not take the request: not reached, or it is another engine by now. Nothing was lost."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class EngineDied(Exception):
    """The connection ended after the request was sent. ``answered``: an answer had begun."""

    def __init__(self, answered: bool) -> None:
        super().__init__(answered)
        self.answered = answered


class Proxy:
    """``refresh`` brings the routes up to date at once."""

    def __init__(
        self,
        routes: RouteCache,
        limits: Limits,
        refresh: Callable[[], Awaitable[None]],
        observer: Observer,
        wishes: Wishes,
    ) -> None:
        self._routes = routes
        self._limits = limits
        self._refresh = refresh
        self._observer = observer
        self._wishes = wishes
        self._upstream = Upstream(connect_s=limits.connect_s)

    def stop(self) -> None:
        self._upstream.close()

    # -- choosing -------------------------------------------------------------------------------

    async def forward(self, client: Client, call: Call) -> None:
        """Answer the client with the engine's answer. Raises GatewayError for every other end."""
        refused: set[str] = set()  # base URLs that did not take it under the present epoch
        attempts = 0
        has_turn = False
        try:
            while attempts < ATTEMPTS_MAX:
                entry = self._entry(call.model)
                if entry is None or entry.state == RouteState.HELD:
                    if has_turn:  # whoever waits for a model must not keep others from theirs
                        has_turn = False
                        self._observer.turn_over(call.exchange)
                    await (self._wish(client, call) if entry is None else self._wait(client, call))
                    refused.clear()
                    continue  # look again: what opened may be held again, or gone
                targets = tuple(target for target in entry.targets if target.base_url not in refused)
                if not targets:
                    why = "its engine cannot be reached." if refused else "no engine of it is running."
                    state = "The panel's home page shows its state; try again shortly."
                    raise errors.no_model(call.model, f"{why} {state}")
                if not has_turn:
                    turn = self._observer.turn(call.exchange)
                    if turn is not None:
                        await self._take_turn(client, call, turn)
                    has_turn = True
                    if turn is not None:
                        continue  # routes may have changed while it waited
                if call.exchange.waited_s:
                    call.check_again()
                attempts += 1
                if await self._try(client, call, self._routes.pick(targets, call.conversation), refused):
                    return
            raise errors.no_model(call.model, "its engines refused the request again and again.")
        finally:
            if has_turn:
                self._observer.turn_over(call.exchange)

    async def _try(self, client: Client, call: Call, target: Target, refused: set[str]) -> bool:
        """Whether the target answered. If not, nothing was lost and ``refused`` says where not to try again."""
        epoch = self._routes.epoch
        call.exchange.deployment_id, call.exchange.version_id = target.deployment_id, target.version_id
        try:
            # No await between the look at the route and the count: see routes.py.
            with self._routes.under_way(target):
                await self._exchange(client, call, target)
            return True
        except NotServed as error:
            log.warning("engine did not take a request", model=call.model, url=target.base_url, why=error.why)
            refused.add(target.base_url)
            self._routes.was_down(target.base_url)
            await self._refresh()
            if self._routes.epoch != epoch:
                refused.clear()
        except EngineDied as error:
            if not error.answered:
                await self._refresh()
            if error.answered or self._routes.epoch == epoch:
                raise errors.engine_died(call.model) from None
            # A switch stopped it before it answered anything: the new table says who answers now.
            refused.clear()
        if call.upload is not None and call.upload.started:
            raise errors.engine_died(call.model)  # what of it was sent is gone
        return False

    def _entry(self, model: str) -> RouteEntry | None:
        """The route, None when there is none. Raises 503 when routes are not known well enough to say."""
        confirmed_at = self._routes.confirmed_at
        if confirmed_at is None:
            raise errors.starting_up()
        if time.monotonic() - confirmed_at > self._limits.stale_s:
            raise errors.out_of_touch(self._limits.stale_s)
        return self._routes.entry(model)

    # -- waiting --------------------------------------------------------------------------------

    async def _wait(self, client: Client, call: Call) -> None:
        """Until the route is not held any more. Raises 503 past the limit."""
        deadline = call.began + self._limits.wait_s

        def look() -> bytes:
            entry = self._entry(call.model)  # also says when the gateway is out of touch
            left = seconds_left(entry.eta_at) if entry is not None else None
            if time.monotonic() >= deadline:
                raise errors.model_loading(call.model, self._limits.wait_s, left)
            return _waiting_comment(call.model, left)

        with self._routes.queue(call.model) as released:
            await self._keep_alive(client, call, released, look, deadline)

    async def _wish(self, client: Client, call: Call) -> None:
        """Until there is a route. Raises 403 or 503 when the model is not to be loaded, 503 past the limit."""
        if call.model not in self._routes.menu.offers:  # its route went while it waited
            raise errors.model_not_found(call.model, self._routes.names())
        deadline = call.began + self._limits.wait_s
        wanted = self._wishes.join(Wish(call.model, call.exchange.user_id, guest=call.exchange.guest))

        def look() -> bytes:
            answer = wanted.answer or WishAnswer()
            if answer.refused:
                raise errors.not_loaded(call.model, answer.refused, forbidden=answer.forbidden, again_s=answer.again_s)
            left = seconds_left(answer.eta_at)
            if time.monotonic() >= deadline:
                raise errors.model_loading(call.model, self._limits.wait_s, left, answer.waits)
            return _waiting_comment(call.model, left, answer.waits)

        try:
            while self._entry(call.model) is None:
                look()
                await self._keep_alive(client, call, wanted.change(), look, deadline)
        finally:
            self._wishes.leave(wanted)

    async def _take_turn(self, client: Client, call: Call, turn: asyncio.Future[None]) -> None:
        """Until the request may go to an engine. Raises what the future raises."""
        comment = f": waiting for a turn at {_one_line(call.model)}\n\n".encode()
        try:
            await self._keep_alive(client, call, turn, lambda: comment, math.inf)
        except BaseException:
            if not turn.cancel() and not turn.cancelled() and turn.exception() is None:
                self._observer.turn_over(call.exchange)  # it came in the moment that the client left
            raise
        turn.result()

    async def _keep_alive(
        self, client: Client, call: Call, done: asyncio.Future[None], look: Callable[[], bytes], deadline: float
    ) -> None:
        """Until ``done``. A stream is kept alive with comment lines, which OpenAI's clients and browsers pass over;
        ``look`` gives the line, or raises when the wait is over."""
        began = time.monotonic()
        tick = max(began, call.began + self._limits.comment_after_s)
        try:
            while not done.done():
                line = look()
                now = time.monotonic()
                if now >= tick:
                    tick = now + self._limits.comment_every_s
                    if call.stream:
                        if not client.streaming:
                            await client.start_events()
                        await client.comment(line)
                        continue  # writing may have taken a while
                await asyncio.wait({done}, timeout=max(0.0, min(deadline, tick) - now))
        finally:
            call.exchange.waited_s += time.monotonic() - began

    # -- passing bytes --------------------------------------------------------------------------

    async def _exchange(self, client: Client, call: Call, target: Target) -> None:
        answer = await self._ask(client, call, target)
        try:
            if answer.status in (401, 403):  # every launch has its own key: this is not the engine that we mean
                raise NotServed("it does not accept the engine key")
            call.body = b""  # a stream lasts minutes; its request need not
            call.share.release()
            try:
                await _pass_on(client, call, answer)
            except (Disconnected, BrokenAnswer):
                raise EngineDied(answered=True) from None
        finally:
            answer.release()

    async def _ask(self, client: Client, call: Call, target: Target) -> Answer:
        """Send the request and wait, for as long as it takes, for the head of the answer."""
        headers = upstream_headers(
            client.headers,
            engine_key=target.engine_key,
            request_id=client.request_id,
            has_body=call.method == "POST",
        )
        body, length = (call.body, None) if call.upload is None else (call.upload.pieces(), call.upload.length)
        try:
            return await self._upstream.ask(target.base_url, call.method, call.target, headers, body, length)
        except NotConnected as error:
            raise NotServed(str(error)) from None
        except Disconnected:
            raise EngineDied(answered=False) from None
        except BrokenAnswer as error:
            reason = str(error)[:200]
            log.warning("engine answered with broken HTTP", model=call.model, url=target.base_url, error=reason)
            raise errors.engine_broken(call.model) from None


async def _pass_on(client: Client, call: Call, answer: Answer) -> None:
    events = is_event_stream(answer.content_type)
    usage = Usage()
    if not events:
        call.exchange.first_token_s = time.monotonic() - call.began
    try:
        if client.streaming and not (events and answer.status == 200):
            event = await _as_event(client, call, answer, usage)
            _note(call.exchange, usage)
            if answer.status >= 400:
                client.ends(REFUSED)  # the status that is out says nothing of it
            await client.finish(event)
            return
        if client.status is None:
            client.streaming = events
            headers = answer_headers(answer.headers)
            if events:  # figures may be taken out of it, and an error may be its end
                headers = [header for header in headers if header[0] != b"content-length"]
            await client.start(answer.status, headers)
        if events:
            await _pass_events(client, call, answer, usage)
            return
        tail = AnswerTail()
        while chunk := await answer.chunk():
            tail.see(chunk)
            if answer.complete:
                break  # with these bytes the client has all of it
            await client.write(chunk)
        tail.read_into(usage)
        _note(call.exchange, usage)
        await client.finish(chunk)
    finally:
        _note(call.exchange, usage)


async def _pass_events(client: Client, call: Call, answer: Answer, usage: Usage) -> None:
    tail, tap = EventTail(), EventTap(usage, strip=call.strip_usage)
    while chunk := await answer.chunk():
        events = tap.passed(tail.whole(chunk))
        if answer.complete:
            events += tap.passed(tail.rest())
        if call.exchange.first_token_s is None and brings_token(events):
            call.exchange.first_token_s = time.monotonic() - call.began
        if answer.complete:
            await _end_events(client, call, usage, events)
            return
        if is_last_event(events):
            _note(call.exchange, usage)
            client.ends()
        await client.write(events)
    await _end_events(client, call, usage, tap.passed(tail.rest()))


async def _end_events(client: Client, call: Call, usage: Usage, rest: bytes) -> None:
    _note(call.exchange, usage)
    await client.finish(rest)


def _note(exchange: Exchange, usage: Usage) -> None:
    exchange.tokens_in, exchange.tokens_out = usage.tokens_in, usage.tokens_out
    exchange.tokens_cached, exchange.events = usage.tokens_cached, usage.events


async def _as_event(client: Client, call: Call, answer: Answer, usage: Usage) -> bytes:
    """An engine's answer that is no stream, for a client whose stream has begun while it waited. Raises 502 when it is
    no JSON object or too large to be an event."""
    body = await answer.read(AS_EVENT_BYTES_MAX)
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if answer.status >= 400 and (client.anthropic or not (isinstance(value, dict) and "error" in value)):
        text = body.decode("utf-8", "replace")[:500]
        refusal = errors.GatewayError(answer.status, "engine_refused", f"The engine answered {answer.status}: {text}")
        return refusal.as_anthropic_event(client.request_id) if client.anthropic else refusal.as_event()
    if not isinstance(value, dict):  # also what was cut off at the limit
        raise errors.engine_no_stream(call.model)
    if isinstance(figures := value.get("usage"), dict):
        usage.take(figures)
    return b"data: " + json.dumps(value).encode() + b"\n\ndata: [DONE]\n\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _waiting_comment(model: str, left_s: float | None, why: str = "") -> bytes:
    text = f": waiting for {_one_line(model)}"
    if why:
        text += f": {_one_line(why)}"
    elif left_s is not None:
        text += ", it takes longer than expected" if left_s <= 0 else f", about {errors.duration(left_s)} left"
    return text.encode() + b"\n\n"
