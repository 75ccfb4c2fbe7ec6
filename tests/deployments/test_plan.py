"""What a plan says before anything is stopped: whether it fits, beside whom, and what would."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.core.management import call_command
from django.test import Client

from apps.common.actors import actor_of
from apps.deployments import plan as plan_module
from apps.deployments import rig_state
from apps.deployments.models import SLEEPER, Deployment, GpuReservation, Replica, Status
from apps.deployments.plan import expected_memory, launches, plan, preview_slots
from apps.deployments.services import switch_request
from apps.deployments.suggestions import suggestion_apply
from apps.engines.simulated.memory import plan_cache
from apps.installs.models import EngineInstall
from apps.jobs.models import JobState
from apps.jobs.runner import job_claim
from apps.profiles.binding import NumaHost
from apps.profiles.fit import Verdict
from apps.profiles.models import Profile
from apps.profiles.selectors import profile_get
from apps.profiles.services import load_shipped, profile_update
from apps.telemetry.frames import parse

GIB = 2**30


@pytest.fixture
def mixtral(rig: Any) -> Profile:
    load_shipped()
    return profile_get("mixtral-8x22b-tp4")


def longer(profile: Profile, person: Any, **options: Any) -> Profile:
    return profile_update(profile, actor=actor_of(person), options={**profile.current.options, **options})


def frame(rig: Any, used: dict[int, float], processes: dict[int, float] | None = None) -> Any:
    """A live reading: GiB in use, and GiB of it by processes, by card index."""
    import time

    from apps.telemetry.frames import GPU_FIELDS

    rows = {"uuids": [], "gpus": [], "host": [10.0, 20 * GIB, 128 * GIB], "at": time.time()}
    for gpu in rig.gpus.all():
        values = dict.fromkeys(GPU_FIELDS)
        values["memory_used_bytes"] = int(used.get(gpu.index, 0) * GIB)
        values["process_memory_bytes"] = int((processes or {}).get(gpu.index, 0) * GIB)
        rows["uuids"].append(gpu.uuid)
        rows["gpus"].append([values[name] for name in GPU_FIELDS])
    return parse(rows)


def running(rig: Any, profile: Profile, cards: tuple[int, ...], port: int = 28190) -> Deployment:
    deployment = Deployment.objects.create(
        rig=rig, version=profile.current, served_name=profile.current.served_name, status=Status.READY
    )
    replica = Replica.objects.create(
        deployment=deployment, index=0, launch_id=f"d{deployment.pk}-test", host="127.0.0.1", port=port, base_url="x"
    )
    for index in cards:
        GpuReservation.objects.create(rig=rig, gpu=rig.gpus.get(index=index), replica=replica)
    return deployment


@pytest.mark.parametrize(
    ("slug", "least", "most"),
    [
        ("mixtral-8x22b-tp4", 40_144, 56_992),
        ("r1-distill-70b-tp4", 131_536, 143_328),
        ("qwen25-coder-32b-2xtp2", 84_320, 91_696),
        ("qwen25-coder-32b-tp4", 242_384, 257_136),
    ],
)
def test_the_shipped_profiles_fit_with_the_tokens_that_were_counted_by_hand(
    rig: Any, slug: str, least: int, most: int
) -> None:
    load_shipped()
    found = plan(profile_get(slug).current, rig).forecast
    assert found.verdict is Verdict.FITS
    for boot in (found.estimate.first_boot, found.estimate.later_boots):
        assert boot is not None
        assert boot.kv_cache_tokens.low < most
        assert boot.kv_cache_tokens.high > least


def test_what_does_not_fit_forbids_the_switch_before_anything_is_stopped(
    mixtral: Profile, rig: Any, olivia: Any
) -> None:
    other = running(rig, profile_get("qwen25-coder-32b-tp4"), (0, 1, 2, 3))
    longer(mixtral, olivia, max_model_len=65536)
    context = job_claim(switch_request(profile=mixtral, actor=actor_of(olivia)).pk)
    assert context is not None
    context.run()
    job = context.job
    job.refresh_from_db()
    assert job.state == JobState.FAILED
    assert "one request of 65,536 tokens needs 3.50 GiB" in job.summary
    assert "Raise the utilisation to" in job.summary
    other.refresh_from_db()
    assert other.status == Status.READY


def test_the_nearest_change_is_one_click_and_fits(
    client: Client, mixtral: Profile, rig: Any, olivia: Any, charlie: Any
) -> None:
    longer(mixtral, olivia, max_model_len=65536)
    client.force_login(charlie)
    page = client.get("/profiles/mixtral-8x22b-tp4/").content.decode()
    assert "Does not fit." in page
    assert "/change/" not in page
    client.force_login(olivia)
    page = client.get("/profiles/mixtral-8x22b-tp4/").content.decode()
    assert "/profiles/mixtral-8x22b-tp4/change/" in page
    found = plan(mixtral.current, rig).forecast
    for suggestion in found.suggestions:
        sent = {"values": json.dumps({"options": suggestion.options}), "note": suggestion.sentence}
        assert client.post("/profiles/mixtral-8x22b-tp4/change/", sent).status_code == 302
        version = mixtral.current
        assert version.note == suggestion.sentence
        assert plan(version, rig).forecast.verdict is Verdict.FITS
    assert client.post("/profiles/mixtral-8x22b-tp4/change/", {"values": '{"model": 1}'}).status_code == 422
    assert client.post("/profiles/mixtral-8x22b-tp4/change/", {"values": "nonsense"}).status_code == 422


def test_a_strangers_process_on_a_card_counts_and_what_is_replaced_does_not(
    mixtral: Profile, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rig_state, "latest", lambda _: frame(rig, {2: 3.0}))
    found = plan(mixtral.current, rig)
    assert found.forecast.verdict is Verdict.DOES_NOT_FIT
    assert "of GPU 2" in found.forecast.sentence
    assert found.refusals
    assert not found.problems, "once something is stopped the engine has the last word"

    running(rig, profile_get("qwen25-coder-32b-tp4"), (0, 1, 2, 3))
    monkeypatch.setattr(
        rig_state, "latest", lambda _: frame(rig, dict.fromkeys(range(4), 22.0), dict.fromkeys(range(4), 21.9))
    )
    found = plan(mixtral.current, rig)
    assert [d.version.profile.slug for d in found.in_the_way] == ["qwen25-coder-32b-tp4"]
    assert found.forecast.verdict is Verdict.FITS
    assert all(m.in_use_bytes is not None and m.in_use_bytes < 0.2 * GIB for m in found.forecast.memory)


def test_a_card_that_a_stranger_fills_is_left_for_an_empty_one(
    rig: Any, olivia: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_shipped()
    profile = profile_get("qwen25-coder-32b-2xtp2")
    version = profile_update(profile, actor=actor_of(olivia), replicas=1).current
    pairs = [{gpu.index for gpu in rig.gpus.filter(pk__in=plan(version, rig).replica_gpus[0])}]
    monkeypatch.setattr(rig_state, "latest", lambda _: frame(rig, {min(pairs[0]): 12.0}))
    found = plan(version, rig)
    pairs.append({gpu.index for gpu in rig.gpus.filter(pk__in=found.replica_gpus[0])})
    assert found.fits, found.refusals
    assert found.nvlinked
    assert not pairs[0] & pairs[1]
    assert {c.index for c in found.forecast.cards[:2]} == pairs[1]
    assert found.servers == found.replica_gpus
    assert len(found.bindings) == 1


def test_on_the_rig_itself_only_the_replaced_processes_count_as_free(
    mixtral: Profile, rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(rig, profile_get("qwen25-coder-32b-tp4"), (0, 1, 2, 3))
    monkeypatch.setattr(
        rig_state, "latest", lambda _: frame(rig, dict.fromkeys(range(4), 22.0), dict.fromkeys(range(4), 22.0))
    )
    monkeypatch.setattr(rig_state, "_without", lambda pids, uuids: dict.fromkeys(uuids, 4 * GIB))
    monkeypatch.setattr("django.conf.settings.RIG_NAME", rig.slug)
    found = plan(mixtral.current, rig)
    assert found.forecast.verdict is Verdict.DOES_NOT_FIT
    assert {m.in_use_bytes for m in found.forecast.memory} == {4 * GIB}


def test_the_gpus_of_somebody_who_stays_are_no_room_for_advice(rig: Any) -> None:
    load_shipped()
    running(rig, profile_get("r1-distill-70b-tp4"), (0, 1))
    found = plan(profile_get("qwen25-coder-32b-2xtp2").current, rig)
    assert found.in_the_way, "four cards are needed"
    memory = {c.index: m for c, m in zip(found.forecast.cards, found.forecast.memory, strict=True)}
    assert all(m.in_use_bytes != m.total_bytes for m in memory.values())


def test_gemma_on_the_cpu_is_answered_from_the_hosts_memory(rig: Any) -> None:
    load_shipped()
    version = profile_get("gemma-3-270m-cpu").current
    found = plan(version, rig).forecast
    assert found.verdict is Verdict.FITS
    assert found.estimate.host_memory is not None
    assert 0.2 * GIB < found.estimate.host_memory.low < found.estimate.host_memory.high < 3 * GIB
    rig.host_memory_bytes = 128 * 2**20
    assert plan(version, rig).forecast.verdict is Verdict.DOES_NOT_FIT


def test_the_api_and_the_command_line_tell_the_parts(
    client: Client, mixtral: Profile, rig: Any, charlie: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.force_login(charlie)
    told = client.get("/api/v1/profiles/mixtral-8x22b-tp4/plan").json()["fit"]
    assert told["verdict"] == "fits"
    assert [g["index"] for g in told["gpus"]] == [0, 1, 2, 3]
    for gpu in told["gpus"]:
        for part in ("weights", "kv_cache", "activation", "cuda_graphs", "overhead", "slack"):
            assert gpu[part]["low"] <= gpu[part]["high"] <= gpu[part]["low"] + 1.5 * GIB
    assert told["next_boot"] == "first"
    assert told["first_boot"]["kv_cache_tokens"]["low"] <= told["later_boots"]["kv_cache_tokens"]["low"]
    assert told["gpus"][0]["total_bytes"] == int(24 * GIB * 23.55 / 24)
    monkeypatch.setattr("django.conf.settings.RIG_NAME", rig.slug)
    with pytest.raises(SystemExit) as ended:
        call_command("plan", "mixtral-8x22b-tp4")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "first boot (this is next)" in text
    assert "GPU 3: weights 17." in text


@pytest.mark.parametrize(
    "slug", ["mixtral-8x22b-tp4", "r1-distill-70b-tp4", "qwen25-coder-32b-2xtp2", "qwen25-coder-32b-tp4"]
)
def test_the_simulated_engine_boots_with_what_the_plan_said(rig: Any, slug: str) -> None:
    load_shipped()
    found = plan(profile_get(slug).current, rig).forecast
    expected, boot = expected_memory(found), found.estimate.next_boot
    assert expected is not None
    assert boot is not None
    booted = plan_cache(
        total_bytes=found.memory[0].total_bytes,
        utilization=0.90,
        weights_bytes=0,
        kv_bytes_per_token=1,
        gpus=1,
        expected=expected,
    )
    assert boot.available_kv.low <= booted.available_bytes <= boot.available_kv.high
    assert boot.kv_cache_tokens.low - 16 <= booted.tokens <= boot.kv_cache_tokens.high + 16
    assert booted.longest_request_tokens >= (found.estimate.max_model_len or 0)


def test_an_automatic_context_is_shortened_and_then_fits(mixtral: Profile, rig: Any, olivia: Any) -> None:
    longer(mixtral, olivia, max_model_len="auto")
    found = plan(mixtral.current, rig).forecast
    assert found.verdict is Verdict.FITS
    assert found.estimate.max_model_len is not None
    assert 30_000 < found.estimate.max_model_len < 65_536
    assert "shortens the context" in found.sentence


def test_bindings_are_shown_with_reasons_and_really_launched(
    client: Client, rig: Any, charlie: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_shipped()
    rig.gpus.filter(index__gte=2).update(numa_node=1)
    rig.gpus.filter(index__lt=2).update(numa_node=0)
    rig.hardware_source = "nvml"
    rig.save()
    EngineInstall.objects.create(
        rig_name=rig.slug, name="vllm", engine="vllm", version="0.33.0", command=["/opt/vllm", "serve"]
    )
    host = NumaHost({0: "0-7", 1: "8-15"}, numactl=True)
    monkeypatch.setattr(plan_module, "numa_host", lambda _: host)
    the_plan = plan(profile_get("qwen25-coder-32b-2xtp2").current, rig)
    assert the_plan.fits, the_plan.refusals
    made = launches(the_plan, preview_slots(the_plan))
    assert [launch.argv[:4] for launch in made] == [
        ("numactl", "--cpunodebind=0", "--preferred=0", "/opt/vllm"),
        ("numactl", "--cpunodebind=1", "--preferred=1", "/opt/vllm"),
    ]
    assert {launch.env["NCCL_P2P_LEVEL"] for launch in made} == {"NVL"}
    client.force_login(charlie)
    told = client.get("/api/v1/profiles/qwen25-coder-32b-2xtp2/plan").json()
    assert [b["gpus"] for b in told["bindings"]] == [[0, 1], [2, 3]]
    assert told["command_lines"][1][0] == "numactl"
    assert "hang on NUMA node 1" in client.get("/profiles/qwen25-coder-32b-2xtp2/").content.decode()
    rig.links.all().update(active_lanes=0)
    made = launches(dead := plan(profile_get("qwen25-coder-32b-2xtp2").current, rig), preview_slots(dead))
    assert all("NCCL_P2P_LEVEL" not in launch.env and launch.env["NCCL_P2P_DISABLE"] == "1" for launch in made)
    assert any("is dead" in warning for warning in dead.warnings)


def test_a_sleeper_takes_its_residue_and_is_stopped_where_that_is_too_much(
    mixtral: Profile, rig: Any, olivia: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = running(rig, profile_get("qwen25-coder-32b-tp4"), (0, 1, 2, 3))
    Deployment.objects.filter(pk=asleep.pk).update(status=Status.SLEEPING)
    GpuReservation.objects.update(slot=f"{SLEEPER}{asleep.pk}")
    full = frame(rig, dict.fromkeys(range(4), 1.1), dict.fromkeys(range(4), 1.05))
    monkeypatch.setattr(rig_state, "latest", lambda _: full)
    beside = plan(longer(mixtral, olivia, gpu_memory_utilization=0.88, max_model_len=16384).current, rig)
    assert beside.forecast.verdict is not Verdict.DOES_NOT_FIT
    assert [m.sleeping_neighbours for m in beside.forecast.memory] == [1, 1, 1, 1]
    assert not any("stopped to make room" in warning for warning in beside.warnings)
    instead = plan(longer(mixtral, olivia, gpu_memory_utilization=0.95, max_model_len=32768).current, rig)
    assert instead.fits, instead.refusals
    assert any("stopped to make room" in warning for warning in instead.warnings)


def test_the_jobs_suggestion_is_the_plans_first(rig: Any, olivia: Any) -> None:
    load_shipped()
    profile = profile_get("mixtral-8x22b-tp4")
    profile_update(profile, actor=actor_of(olivia), replicas=2, tensor_parallel_size=2)
    context = job_claim(switch_request(profile=profile, actor=actor_of(olivia)).pk)
    assert context is not None
    context.run()
    context.job.refresh_from_db()
    assert context.job.result is not None
    assert context.job.result["suggested_options"] == {"replicas": 1, "tensor_parallel_size": 4}
    suggestion_apply(context.job, actor=actor_of(olivia))
    assert plan(profile.current, rig).fits


def test_an_older_vllms_sleeper_is_planned_with_the_cache_that_its_launch_asks_for(
    rig: Any, mixtral: Profile, olivia: Any
) -> None:
    """The launch gave a quantised sleeper a smaller cache than the plan knew of: it failed while loading."""
    rig.hardware_source = "nvml"
    rig.save()
    EngineInstall.objects.create(
        rig_name=rig.slug, engine="vllm", name="vllm", version="0.26.0", state="ready", command=["/opt/vllm", "serve"]
    )
    awake = plan(longer(mixtral, olivia, max_model_len=32_768).current, rig).forecast
    assert awake is not None
    assert awake.estimate.verdict is not Verdict.DOES_NOT_FIT
    asleep = plan(longer(mixtral, olivia, max_model_len=32_768, enable_sleep_mode=True).current, rig).forecast
    assert asleep is not None
    assert asleep.estimate.verdict is Verdict.DOES_NOT_FIT
    assert "one request of 32,768 tokens needs 1.75 GiB" in asleep.estimate.reason
