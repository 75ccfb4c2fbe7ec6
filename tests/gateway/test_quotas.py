"""Quotas: in memory, to the second; of roles, people and keys; refusals that say which limit and until when."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.accounts.models import ApiKey
from apps.accounts.services import key_create, key_rotate
from apps.audit.models import AuditEntry
from apps.common.actors import actor_of
from apps.common.errors import Invalid
from apps.common.models import Epoch
from apps.common.roles import Role
from apps.gateway.errors import GatewayError
from apps.gateway.ledger import import_folder
from apps.gateway.meters import Elsewhere, MinuteWindow
from apps.gateway.models import Quota, UsageDay
from apps.gateway.observer import Exchange
from apps.gateway.quotas import Allowance, Quotas, QuotaTable
from apps.gateway.selectors import allowance_of, quota_table
from apps.gateway.services import quota_set
from tests.gateway.conftest import GatewayProcess, House
from tests.gateway.helpers import Answer, chat, until
from tests.gateway.test_ledger import exchange

BERLIN = ZoneInfo("Europe/Berlin")
NOON = datetime(2027, 3, 31, 12, 0, tzinfo=BERLIN).timestamp()


class Clock:
    now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotas(clock: Clock) -> Callable[..., Quotas]:
    def make(key: Allowance | None = None, **limits: int) -> Quotas:
        made = Quotas(BERLIN, clock)
        made.table = QuotaTable((1, 1), {1: Allowance(**limits)} if limits else {}, {2: key} if key else {})
        return made

    return make


def begin(quotas: Quotas, clock: Clock, user: int = 1, **more: Any) -> Exchange:
    asked = exchange(user=user, at=clock.now, **more)
    quotas.admit(asked)
    quotas.opened(asked)
    return asked


def end(quotas: Quotas, asked: Exchange, tokens: int | None = None, position: int = 1) -> None:
    asked.tokens_out = tokens
    quotas.closed(asked, "file", position)


def refusal(quotas: Quotas, clock: Clock) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        quotas.admit(exchange(at=clock.now))
    assert caught.value.status == 429
    return caught.value


def retry_after(error: GatewayError) -> int:
    return int(dict(error.headers)[b"retry-after"])


def headers(asked: Exchange) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in asked.answer_headers}


def test_requests_per_minute_slide_and_the_answer_says_when(quotas: Any, clock: Clock) -> None:
    mine = quotas(requests_per_minute=2)
    first = begin(mine, clock)
    assert headers(first)["x-ratelimit-limit-requests"] == "2"
    assert headers(first)["x-ratelimit-remaining-requests"] == "1"
    clock.now += 20
    assert headers(begin(mine, clock))["x-ratelimit-reset-requests"] == "1m0s"
    error = refusal(mine, clock)
    assert error.payload["error"] == {
        "message": "You have made 2 requests in the last minute, and your quota allows 2. "
        "The next one may come in 40 s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert retry_after(error) == 40
    clock.now += 40
    begin(mine, clock)
    assert retry_after(refusal(mine, clock)) == 20


def test_tokens_per_minute_are_those_that_were_used(quotas: Any, clock: Clock) -> None:
    mine = quotas(tokens_per_minute=100)
    asked = begin(mine, clock, tokens_limit=1)
    end(mine, begin(mine, clock, tokens_limit=1))
    end(mine, asked, 120)
    error = refusal(mine, clock)
    assert "used 120 tokens in the last minute" in error.message
    assert error.payload["error"]["type"] == "tokens"
    clock.now += 60
    begin(mine, clock)


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day", "tokens_per_month"])
def test_many_at_once_do_not_all_pass_by_the_same_remainder(quotas: Any, clock: Clock, limit: str) -> None:
    mine = quotas(**{limit: 1000})
    running = [begin(mine, clock, tokens_limit=300, body_bytes=400) for _ in range(3)]
    assert headers(running[-1])["x-ratelimit-remaining-tokens"] == "0"
    assert mine.people[1].held == 3 * 400
    error = refusal(mine, clock)
    assert "used 0 tokens, requests under way may take 1200 more, and your quota allows 1000" in error.message
    assert (error.code, retry_after(error)) == ("rate_limit_exceeded", 2)
    for asked in running:
        asked.tokens_in = 100
        end(mine, asked, 50)
    assert mine.people[1].held == 0
    assert mine.keys[2].held == 0
    assert headers(begin(mine, clock, tokens_limit=300, body_bytes=400))["x-ratelimit-remaining-tokens"] == "150"


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 400), st.integers(0, 400), st.booleans()), max_size=80),
    st.integers(100, 2000),
)
def test_a_limit_is_passed_by_less_than_one_request_where_requests_say_how_much_they_want(
    steps: list[tuple[bool, int, int, bool]], limit: int
) -> None:
    """Whatever runs at once and in whatever order it ends."""
    clock = Clock()
    mine = Quotas(BERLIN, clock)
    mine.table = QuotaTable((1, 1), {1: Allowance(tokens_per_day=limit)}, {})
    running: list[Exchange] = []
    used, largest = 0, 0
    for comes, most, takes, first in steps:
        if comes:
            asked = exchange(at=clock.now, tokens_limit=most, body_bytes=0)
            try:
                mine.admit(asked)
            except GatewayError:
                continue
            mine.opened(asked)
            running.append(asked)
            largest = max(largest, most)
        elif running:
            asked = running.pop(0 if first else -1)
            taken = min(takes, asked.tokens_limit or 0)
            used += taken
            end(mine, asked, taken)
    used += sum(asked.tokens_limit or 0 for asked in running)  # at worst
    assert used < limit + largest


def test_without_a_word_about_it_an_answer_is_expected_to_be_like_the_last_ones(quotas: Any, clock: Clock) -> None:
    mine = quotas(tokens_per_day=10**9)
    assert begin(mine, clock, body_bytes=4000).tokens_held == 1000 + 256
    for _ in range(60):
        asked = begin(mine, clock, body_bytes=4000)
        asked.tokens_in = 400
        end(mine, asked, 40)
    assert begin(mine, clock, body_bytes=4000).tokens_held == pytest.approx(440, abs=2)
    assert begin(mine, clock, body_bytes=4000, path="/v1/embeddings").tokens_held == pytest.approx(400, abs=2)
    assert begin(mine, clock, body_bytes=4000, tokens_limit=9).tokens_held == pytest.approx(409, abs=2)


def test_a_refusal_carries_the_headers_that_say_what_is_left(quotas: Any, clock: Clock) -> None:
    mine = quotas(requests_per_minute=1, tokens_per_minute=5000, tokens_per_day=800)
    begin(mine, clock, tokens_limit=10)
    asked = exchange(at=clock.now)
    with pytest.raises(GatewayError):
        mine.admit(asked)
    told = headers(asked)
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("1", "0")
    assert told["x-ratelimit-reset-requests"] == "1m0s"
    assert told["x-ratelimit-limit-tokens"] == "800", "of the limits of tokens the one that is nearest to its end"
    assert told["x-ratelimit-remaining-tokens"] == "788"


def test_at_once_counts_what_runs(quotas: Any, clock: Clock) -> None:
    mine = quotas(concurrent=1)
    asked = begin(mine, clock)
    assert "allows 1 at once" in refusal(mine, clock).message
    end(mine, asked)
    begin(mine, clock)


def test_a_day_ends_at_midnight_of_the_panel_and_a_month_on_its_first(quotas: Any, clock: Clock) -> None:
    mine = quotas(tokens_per_day=100, tokens_per_month=250)
    end(mine, begin(mine, clock), 150)
    error = refusal(mine, clock)
    assert error.code == "insufficient_quota"
    assert "used 150 tokens today, and your quota allows 100 a day" in error.message
    assert "2027-04-01 00:00 (Europe/Berlin)" in error.message
    assert retry_after(error) == 12 * 3600
    clock.now += 12 * 3600  # the first of April: both begin anew
    end(mine, begin(mine, clock), 90)
    clock.now += 24 * 3600
    end(mine, begin(mine, clock), 90)
    clock.now += 24 * 3600
    end(mine, begin(mine, clock), 90)
    clock.now += 24 * 3600
    assert "this month, and your quota allows 250 a month" in refusal(mine, clock).message


def test_a_key_has_limits_of_its_own_within_those_of_its_person(quotas: Any, clock: Clock) -> None:
    mine = quotas(key=Allowance(requests_per_minute=1), requests_per_minute=5)
    asked = begin(mine, clock)
    assert headers(asked)["x-ratelimit-remaining-requests"] == "0", "the nearer limit is told"
    assert refusal(mine, clock).message.startswith("This key has made 1 requests")


def test_what_the_database_knows_and_what_is_on_its_way_count_once(quotas: Any, clock: Clock) -> None:
    mine = quotas(tokens_per_day=1000)
    for position in (10, 20, 30):
        end(mine, begin(mine, clock), 100, position)
    today = date(2027, 3, 31)
    assert mine.people[1].day_tokens == 300
    mine.learn({1: Elsewhere(day_tokens=220, month_tokens=220)}, {}, {"file": 20}, today)
    assert mine.people[1].day_tokens == 320, "the first two are among the 220, the third is not yet"
    mine.learn({1: Elsewhere(day_tokens=320, month_tokens=320)}, {}, {"file": 30}, today)
    assert mine.people[1].day_tokens == 320
    assert not mine.pending_files
    mine.learn({1: Elsewhere(1000, 1000)}, {}, {}, today)
    assert "used 1000 tokens today" in refusal(mine, clock).message


def test_without_quotas_nothing_is_kept(clock: Clock) -> None:
    free = Quotas(BERLIN, clock)
    for position in range(50):
        asked = begin(free, clock)
        assert not asked.answer_headers
        end(free, asked, 100, position)
    assert not free.pending_files
    assert free.people[1].running == 0


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 5)), max_size=60), st.integers(1, 10))
def test_a_window_holds_exactly_the_last_minute(steps: list[tuple[int, int]], below: int) -> None:
    window, seen, now = MinuteWindow(), [], 1000.0
    for pause, requests in steps:
        now += pause
        window.add(now, requests=requests)
        seen.append((now, requests))
        assert window.requests == sum(n for at, n in seen if at > now - 60)
        wait_s = window.frees_in(now, requests_below=below)
        assert sum(n for at, n in seen if at > now + wait_s - 60) < below
        assert wait_s <= 60


# -- what owners set -------------------------------------------------------------------------------


def test_a_persons_quota_takes_the_place_of_the_roles_field_by_field(alice: Any, bob: Any) -> None:
    actor = actor_of(alice)
    quota_set(Role.MEMBER, {"requests_per_minute": 10, "concurrent": 4}, actor=actor)
    quota_set(bob, {"requests_per_minute": 100}, actor=actor)
    assert allowance_of(bob) == Allowance(requests_per_minute=100, concurrent=4)
    table = quota_table()
    assert table.people == {bob.pk: Allowance(requests_per_minute=100, concurrent=4)}
    quota_set(bob, {}, actor=actor)
    assert quota_table().people[bob.pk].requests_per_minute == 10


def test_a_change_is_audited_and_told_to_the_gateways_once(alice: Any, bob: Any) -> None:
    epoch = Epoch.current("quotas")
    for _ in range(2):
        quota_set(bob, {"tokens_per_day": 5000}, actor=actor_of(alice))
    assert Epoch.current("quotas") == epoch + 1
    entry = AuditEntry.objects.get(action="quota.set")
    assert entry.object_name == bob.email
    assert entry.detail == {"tokens_per_day": [None, 5000]}


@pytest.mark.parametrize(
    "values", [{"concurrent": -1}, {"share": 0}, {"tokens_per_day": 10**16}, {"requests_per_minute": True}], ids=str
)
def test_what_is_no_limit_is_refused_beside_its_field(alice: Any, values: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as caught:
        quota_set(Role.MEMBER, values, actor=actor_of(alice))
    assert set(caught.value.fields) == set(values)
    assert not Quota.objects.exists()


# -- with real gateways ----------------------------------------------------------------------------


def applied(process: GatewayProcess, key: str, limit: str) -> None:
    """Wait until the process goes by a quota: its answers say so."""
    until(
        lambda: (
            process.ask("POST", "/v1/chat/completions", chat("coder"), key=key).headers.get(
                "x-ratelimit-limit-requests"
            )
            == limit
        ),
        "the quota was not applied",
    )


def test_a_member_over_the_limit_gets_429_in_openais_shape_and_others_go_on(
    house: House, bobs_key: str, bob: Any, alice: Any, gateway: GatewayProcess
) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    alices_key = key_create(alice, name="desk", actor=actor_of(alice))[1]
    house.applied(gateway)
    quota_set(bob, {"requests_per_minute": 3}, actor=actor_of(alice))
    applied(gateway, bobs_key, "3")
    answers = [gateway.ask("POST", "/v1/chat/completions", chat("coder"), key=bobs_key) for _ in range(4)]
    refused = answers[-1]
    assert refused.status == 429
    assert refused.error["code"] == "rate_limit_exceeded"
    assert "your quota allows 3" in refused.error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert answers[0].headers["x-ratelimit-limit-requests"] == refused.headers["x-ratelimit-limit-requests"] == "3"
    assert gateway.ask("POST", "/v1/chat/completions", chat("coder"), key=alices_key).status == 200
    assert gateway.ask("GET", "/v1/models", key=bobs_key).status == 200


def test_a_key_that_takes_anothers_place_has_its_quota_and_both_keep_it_while_both_go_on(
    house: House, alice: Any, bob: Any, gateway: GatewayProcess
) -> None:
    house.serve(gateway, "coder", house.engine("coder"))
    old, old_token = key_create(bob, name="ci", actor=actor_of(bob))
    quota_set(old, {"requests_per_minute": 5, "tokens_per_day": 10**6}, actor=actor_of(alice))
    free, _ = key_create(bob, name="free", actor=actor_of(bob))
    quotas, epoch = Quota.objects.count(), Epoch.current("quotas")
    new, new_token = key_rotate(old, actor=actor_of(bob))
    assert Epoch.current("quotas") > epoch  # what the gateways look at
    entry = AuditEntry.objects.filter(action="quota.set").latest("sequence")
    assert (entry.object_id, entry.actor_name) == (str(new.pk), actor_of(bob).name)
    house.applied(gateway)
    for token in (old_token, new_token):
        applied(gateway, token, "5")
    quota = Quota.objects.get(key=new)
    assert (quota.requests_per_minute, quota.tokens_per_day, quota.concurrent) == (5, 10**6, None)
    assert Quota.objects.get(key=old).requests_per_minute == 5
    key_rotate(free, actor=actor_of(bob))
    assert Quota.objects.count() == quotas + 1  # of none comes none


HEADER = re.compile(r"x-ratelimit-(limit|remaining|reset)-(requests|tokens)")


def told(answer: Answer) -> dict[str, int]:
    """What an answer says of limits, checked: all or nothing of a kind, and times as OpenAI writes them."""
    found = {name: value for name, value in answer.headers.items() if name.startswith("x-ratelimit-")}
    assert all(HEADER.fullmatch(name) for name in found)
    for kind in ("requests", "tokens"):
        assert len([name for name in found if name.endswith(kind)]) in (0, 3)
    assert all(re.fullmatch(r"(\d+h)?(\d+m)?\d+s", found.pop(name)) for name in list(found) if "-reset-" in name)
    return {name.removeprefix("x-ratelimit-"): int(value) for name, value in found.items()}


def test_what_is_left_of_a_roles_a_persons_and_a_keys_limit_is_told_on_every_answer(
    house: House, bobs_key: str, bob: Any, alice: Any, gateway: GatewayProcess
) -> None:
    """Of the engine's answers (three tokens each here), of its refusals and of our own; to each what is nearest."""
    house.serve(gateway, "coder", house.engine("coder"))
    paths = ("/v1/chat/completions", "/v1/messages")
    alices_key = key_create(alice, name="desk", actor=actor_of(alice))[1]
    second, bobs_second = key_create(bob, name="second", actor=actor_of(bob))
    house.applied(gateway)

    def ask(key: str = bobs_key, path: str = paths[0], **more: Any) -> Answer:
        return gateway.ask("POST", path, chat("coder", **more), key=key)

    assert told(ask()) == {}
    quota_set(Role.MEMBER, {"requests_per_minute": 1000, "tokens_per_day": 10**9}, actor=actor_of(alice))
    applied(gateway, bobs_key, "1000")
    first = told(ask(max_tokens=10))
    after = told(ask(max_tokens=10))
    assert first["limit-requests"] == 1000
    assert after["remaining-requests"] == first["remaining-requests"] - 1
    assert after["limit-tokens"] == 10**9
    assert 0 < 10**9 - after["remaining-tokens"] < 500  # used, and held for this answer
    for more in ({"stream": True}, {"script": "status", "status": 418}):
        assert told(ask(**more))["limit-requests"] == 1000  # type: ignore[arg-type]
    assert told(ask(alices_key)) == {}

    # A person's takes the role's place field by field; a key's is beside it, and the nearer one is told.
    quota_set(bob, {"requests_per_minute": 900}, actor=actor_of(alice))
    quota_set(second, {"requests_per_minute": 2, "tokens_per_minute": 5000}, actor=actor_of(alice))
    applied(gateway, bobs_key, "900")
    both = told(ask(bobs_second, max_tokens=10))
    assert (both["limit-requests"], both["remaining-requests"], both["limit-tokens"]) == (2, 1, 5000)
    assert told(ask())["limit-tokens"] == 10**9
    ask(bobs_second)
    refused = ask(bobs_second)
    assert (refused.status, refused.error["type"], told(refused)["remaining-requests"]) == (429, "requests", 0)
    assert 1 <= int(refused.headers["retry-after"]) <= 60

    quota_set(second, {"requests_per_minute": 901, "tokens_per_minute": 1}, actor=actor_of(alice))
    applied(gateway, bobs_second, "900")
    until(lambda: told(ask(bobs_second)).get("limit-tokens") == 1, "the limit of tokens was not applied")
    for path in paths:
        refused = ask(bobs_second, path)
        assert (refused.status, told(refused)["remaining-tokens"]) == (429, 0)
        assert "This key has used" in refused.json["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert refused.json["error"]["type"] == "rate_limit_error"  # in Anthropic's shape


def test_a_day_that_was_spent_before_a_restart_stays_spent(
    house: House, bobs_key: str, bob: Any, alice: Any, own_process: Callable[..., GatewayProcess]
) -> None:
    quota_set(bob, {"tokens_per_day": 10_000}, actor=actor_of(alice))
    key = ApiKey.objects.get(user=bob)
    today = datetime.now(UTC).date()
    for day, tokens in ((today - timedelta(days=1), 10**6), (today, 9000)):
        UsageDay.objects.create(day=day, user=bob, key=key, model="coder", tokens_out=tokens)
    process = own_process()
    house.serve(process, "coder", house.engine("coder"))
    answer = process.ask("POST", "/v1/chat/completions", chat("coder"), key=bobs_key)
    assert answer.status == 200
    assert 0 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 1000
    UsageDay.objects.filter(day=today).update(tokens_out=10_000)
    until(
        lambda: process.ask("POST", "/v1/chat/completions", chat("coder"), key=bobs_key).status == 429,
        "the ledger's tokens were not counted",
    )
    refused = process.ask("POST", "/v1/chat/completions", chat("coder"), key=bobs_key)
    assert refused.error["code"] == "insufficient_quota"
    import_folder(process.folder / "usage")
    assert set(UsageDay.objects.filter(day=today).values_list("failed", flat=True)) == {0}, "429 is not a request"


# -- in the API ------------------------------------------------------------------------------------


def test_owners_set_quotas_over_the_api(client: Any, alice: Any, bob: Any) -> None:
    client.force_login(alice)

    def put(**body: Any) -> Any:
        return client.put("/api/v1/quotas", body, content_type="application/json", headers={"X-CSRFToken": "x"})

    client.handler.enforce_csrf_checks = False
    key, _ = key_create(bob, name="laptop", actor=actor_of(bob))
    answer = put(role="member", requests_per_minute=60)
    assert answer.status_code == 200, answer.content
    assert put(member=bob.email, tokens_per_day=10**6, share=3).json()["member"] == str(bob.public_id)
    assert put(key=key.pk, concurrent=2).json()["name"] == f"{key} of bob"
    listed = client.get("/api/v1/quotas").json()
    assert listed["count"] == 3
    assert listed["items"][0]["role"] == "member"
    assert put(member=bob.email).status_code == 204
    assert client.get("/api/v1/quotas").json()["count"] == 2
    for wrong in ({}, {"role": "member", "key": key.pk}, {"role": "member", "concurrent": -1}, {"role": "viewer"}):
        assert put(**wrong).status_code == 422, wrong
    assert put(key=10**9).status_code == 404
