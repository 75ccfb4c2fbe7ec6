"""The rig page: every state has a face, and it costs what it costs."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from apps.catalog.models import Weights
from apps.dashboard.cards import place_bridges, rig_alerts
from apps.dashboard.live import concerned, draw, watched
from apps.deployments.models import Deployment, GpuReservation, Replica
from apps.installs.models import EngineInstall
from apps.jobs.models import Job, JobStep
from apps.rigs.models import Link, Rig
from apps.telemetry.frames import FrameBuilder, keep
from tests.factories.profiles import llama_cpp_profile, simulated_profile
from tests.factories.rigs import quad_3090
from tests.telemetry.readings import card, reading

pytestmark = pytest.mark.django_db
# Measured with five profiles, a deployment that serves and twenty jobs. A rise needs a reason.
HOME_QUERIES = 29


def deploy(rig: Rig, slug: str = "coder", status: str = "ready", **values: Any) -> Deployment:
    profile = simulated_profile(slug, tp=2)
    deployment = Deployment.objects.create(
        rig=rig,
        version=profile.current,
        served_name=slug,
        status=status,
        started_by_name="bob",
        ready_at=timezone.now(),
        **values,
    )
    replica = Replica.objects.create(
        deployment=deployment,
        index=0,
        launch_id=slug,
        host="127.0.0.1",
        port=28100,
        base_url="http://127.0.0.1:28100",
        engine_key="k",
    )
    for gpu in rig.gpus.filter(index__in=(0, 1)):
        GpuReservation.objects.create(rig=rig, gpu=gpu, replica=replica)
    return deployment


def live_frame(rig: Rig, at: float | None = None, **values: Any) -> None:
    cards = [card(uuid=g.uuid, **values) for g in rig.gpus.order_by("index")]
    keep(rig.slug, FrameBuilder().build(reading(at or time.time(), *cards)))


def text(html: bytes | str) -> str:
    html = html.decode() if isinstance(html, bytes) else html
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_a_first_run_offers_the_starter_and_says_that_nothing_serves(client: Client, rig: Rig, alice: Any) -> None:
    client.force_login(alice)
    page = text(client.get("/").content)
    assert "Nothing serves" in page
    assert "Install starter engine" in page
    assert "No profiles yet" in page
    assert "Nothing has happened yet" in page


def test_a_viewer_sees_everything_and_has_no_button_that_changes_the_rig(
    client: Client, rig: Rig, charlie: Any
) -> None:
    deploy(rig)
    client.force_login(charlie)
    html = client.get("/").content.decode()
    assert "Coder" in html
    main = html[html.index("<main") : html.index("</main")]
    assert "<button" not in re.sub(r"<button[^>]*data-copy.*?</button>", "", main, flags=re.S)
    assert "Your role may look, but not switch." in html


def test_a_member_may_switch_only_to_what_is_marked_for_members(rig: Rig, bob: Any) -> None:
    simulated_profile("open", members_may_switch=True)
    simulated_profile("closed")
    html = draw("home.switch", bob)
    assert 'value="open"' in html
    assert 'value="closed"' not in html
    assert "operators only" in html


def test_what_serves_is_shown_with_its_layout_and_who_switched(rig: Rig, alice: Any, live_store: Any) -> None:
    deploy(rig, simulated=True)
    page = text(draw("home.serving", alice))
    assert "Coder TP2 ready simulated engine" in page
    assert "switched by bob" in page
    assert "not reported" in page  # no gateway and no engine has said anything


def test_a_deployment_that_comes_up_shows_steps_and_time_left(rig: Rig, alice: Any) -> None:
    job = Job.objects.create(
        kind="switch",
        title="Switch to Coder",
        rig_name=rig.slug,
        queue="q",
        user_name="bob",
        state="running",
        progress=0.4,
        eta_at=timezone.now() + timedelta(seconds=95),
    )
    JobStep.objects.create(
        job=job, index=0, name="start", title="Start the engine", state="running", detail="loading weights"
    )
    deploy(rig, status="loading", job_id=job.pk)
    page = text(draw("home.serving", alice))
    assert "Coming up" in page
    assert "Start the engine · loading weights" in page
    assert "40 %" in page
    assert re.search(r"about 1 min 3\d s left", page)


def test_a_failed_switch_tells_cause_evidence_and_suggestion(rig: Rig, alice: Any) -> None:
    Job.objects.create(
        kind="switch",
        title="Switch to Mixtral",
        rig_name=rig.slug,
        queue="q",
        user_name="bob",
        state="failed",
        finished_at=timezone.now(),
        profile_slug="mixtral",
        result={
            "summary": "65 536 tokens need 3.5 GiB of KV cache per GPU and 3.04 were free.",
            "suggestion": "Lower the context to 56 896.",
            "evidence": ["ValueError: <KV cache>"],
        },
    )
    html = draw("home.serving", alice)
    page = text(html)
    assert "65 536 tokens need 3.5 GiB" in page
    assert "Suggestion: Lower the context to 56 896." in page
    assert "ValueError: &lt;KV cache&gt;" in html


def test_a_later_success_takes_the_failure_away(rig: Rig, alice: Any) -> None:
    for state in ("failed", "succeeded"):
        Job.objects.create(
            kind="switch",
            title="Switch",
            rig_name=rig.slug,
            queue="q",
            user_name="bob",
            state=state,
            finished_at=timezone.now(),
            result={"summary": "It went so."},
        )
    assert "did not go well" not in draw("home.serving", alice)


def test_live_readings_stand_on_the_cards(rig: Rig, alice: Any, live_store: Any) -> None:
    live_frame(rig)
    page = text(draw("home.cards", alice))
    assert "live" in page
    assert "10.0 / 24.0 GiB" in page
    assert "250 / 350 W" in page
    assert "1 000 W of 1 600 W · caps 4×350 W" in page


def test_old_readings_are_greyed_and_say_when_they_were_seen(rig: Rig, alice: Any, live_store: Any) -> None:
    live_frame(rig, at=time.time() - 14)
    html = draw("home.cards", alice)
    assert 'id="cards" class="stale"' in html
    assert re.search(r"last seen 1[45] s ago", text(html))
    assert [a.key for a in rig_alerts(rig)] == ["stale"]


def test_without_the_store_the_page_stands_and_says_that_nothing_is_live(client: Client, rig: Rig, alice: Any) -> None:
    client.force_login(alice)
    response = client.get("/")
    assert response.status_code == 200
    page = text(response.content)
    assert "No live readings." in page
    assert "memory not reported busy not reported power not reported memory temp not reported" in page
    assert "Power not reported of 1 600 W" in page


def test_a_missing_card_keeps_its_slot_and_says_so(rig: Rig, alice: Any, live_store: Any) -> None:
    live_frame(rig)
    rig.gpus.filter(index=2).update(present=False)
    html = draw("home.cards", alice)
    assert [int(i) for i in re.findall(r"<h3>GPU (\d)</h3>", html)] == [0, 1, 2, 3]
    assert "This slot’s card does not answer." in text(html)
    assert "NVLink: a card is missing" in html
    assert "GPU 2 is missing." in text(draw("home.alerts", alice))


def test_weights_and_cache_are_told_apart_once_the_engine_serves(rig: Rig, alice: Any, live_store: Any) -> None:
    live_frame(rig)
    deployment = deploy(rig, status="loading")
    assert 'data-weights="0"' in draw("home.cards", alice)
    Deployment.objects.filter(pk=deployment.pk).update(status="ready")
    html = draw("home.cards", alice)
    assert f'data-weights="{4 * 2**30}"' in html  # 8 GiB on two cards
    assert "KV cache and work space" in html
    assert html.count("held by Coder") == 4  # two cards: text and title


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (((0, 1), (2, 3)), [(1, 2, 1), (3, 2, 1)]),
        (((0, 2), (1, 3)), [(1, 3, 2), (2, 3, 1)]),
        (((0, 3), (1, 2)), [(1, 4, 1), (2, 2, 2)]),
        (((1, 2),), [(2, 2, 1)]),
    ],
)
def test_bridges_are_drawn_where_they_are(db: None, pairs: Any, expected: list[tuple[int, int, int]]) -> None:
    """(first column, columns, lane from above); ones that cross or enclose others get lanes of their own."""
    rig = quad_3090(pairs=pairs)
    order = [g.pk for g in rig.gpus.order_by("index")]
    placed = place_bridges(order, set(order), list(rig.links.select_related("first", "second")))
    assert [(b.start, b.span, b.lane) for b in placed] == expected


def test_a_broken_and_a_thin_bridge_say_so(rig: Rig, alice: Any) -> None:
    first, second = rig.links.order_by("pk")
    Link.objects.filter(pk=first.pk).update(active_lanes=0)
    Link.objects.filter(pk=second.pk).update(active_lanes=3)
    html = draw("home.cards", alice)
    assert "NVLink broken" in html
    assert "NVLink 42 GB/s, 3 of 4 lanes" in html


def test_the_starter_shows_its_progress_and_goes_once_an_engine_is_there(rig: Rig, alice: Any, charlie: Any) -> None:
    assert "An operator can install it." in draw("home.starter", charlie)
    job = Job.objects.create(
        kind="install", title="Install", rig_name=rig.slug, queue="q", user_name="a", state="running", progress=0.5
    )
    assert "50 %" in draw("home.starter", alice)
    Job.objects.filter(pk=job.pk).update(state="failed", result={"summary": "The disk is full."})
    assert "The disk is full. " in text(draw("home.starter", alice)) + " "
    assert "Try again" in draw("home.starter", alice)
    EngineInstall.objects.create(rig_name=rig.slug, engine="llama_cpp", name="starter", state="ready")
    assert "No engine" not in draw("home.starter", alice)


def test_what_cannot_start_yet_offers_what_is_missing_in_place_of_a_switch(
    rig: Rig, alice: Any, charlie: Any, tmp_path: Path
) -> None:
    profile = llama_cpp_profile("tiny")
    weights = Weights.objects.create(model=profile.current.model, rig_name=rig.slug, path=str(tmp_path / "tiny.gguf"))
    html = draw("home.switch", alice)
    assert "Install engine" in text(html)
    assert 'action="/deployments/switch/"' not in html
    assert "engine not installed" in text(draw("home.switch", charlie))
    EngineInstall.objects.create(rig_name=rig.slug, engine="llama_cpp", name="starter", state="ready")
    html = draw("home.switch", alice)
    assert "Get weights" in text(html)
    assert f'href="/models/{profile.current.model.slug}/"' in html
    assert "weights not here" in text(draw("home.switch", charlie))
    Path(weights.path).touch()
    assert 'action="/deployments/switch/"' in draw("home.switch", alice)


def test_the_number_of_queries_does_not_rise(
    client: Client, rig: Rig, alice: Any, live_store: Any, django_assert_max_num_queries: Any
) -> None:
    deploy(rig)
    for i in range(5):
        simulated_profile(f"p{i}")
    for i in range(20):
        Job.objects.create(kind="switch", title=f"{i}", rig_name=rig.slug, queue="q", user_name="a", state="succeeded")
    client.force_login(alice)
    with django_assert_max_num_queries(HOME_QUERIES):
        client.get("/")


@pytest.mark.parametrize("path", ["/", "/telemetry/", "/settings/", "/nowhere/", "/accounts/login/"])
def test_pages_carry_no_inline_script_style_or_handler(client: Client, rig: Rig, alice: Any, path: str) -> None:
    deploy(rig)
    if "login" not in path:
        client.force_login(alice)
    response = client.get(path)
    html = response.content.decode()
    assert not re.search(r"<script(?![^>]*\ssrc=)", html)
    assert "<style" not in html
    assert not re.search(r"<[^>]+\s(style|on[a-z]+)=", html)
    assert "unsafe" not in response["Content-Security-Policy"]


def test_every_root_of_a_region_has_an_id(rig: Rig, alice: Any) -> None:
    """What the socket sends is swapped by the id of its root, so that page and socket show the same."""
    deploy(rig)
    for name in watched(["nav", "home"]):
        rest = draw(name, alice).strip()
        while rest:
            root = re.match(r"<(\w+) id=\"([\w-]+)\"", rest)
            assert root, rest[:80]
            end = f"</{root.group(1)}>"
            assert end in rest
            rest = "" if rest.endswith(end) and rest.count(f"<{root.group(1)}") > 1 else rest.partition(end)[2].strip()


def test_a_page_watches_only_regions_that_exist() -> None:
    assert watched(["job:17", "job", "nav", "../../etc", "nav:1", ""]) == ("job:17", "nav")
    assert "home.cards" in watched(["home"])
    assert len(watched([f"job:{i}" for i in range(1000)])) == 60


def test_added_log_lines_concern_only_the_page_of_their_job() -> None:
    regions = watched(["home", "nav", "job:17", "job:18"])
    assert concerned(regions, "job", {"job": 17, "log": 1}) == ["job:17"]
    assert "home.jobs" in concerned(regions, "job", {"job": 17})
    assert "job:18" not in concerned(regions, "job", {"job": 17})


def test_a_region_of_something_that_is_gone_is_empty(rig: Rig, alice: Any) -> None:
    assert draw("job:999", alice) == ""


def test_somebody_deactivated_gets_nothing_drawn(rig: Rig, bob: Any) -> None:
    bob.is_active = False
    assert draw("home.jobs", bob) == ""
