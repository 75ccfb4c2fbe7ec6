"""The Ray Serve adapter and its launcher's pure parts: exact documents, and verdicts over real answers and logs."""

from __future__ import annotations

import json
import os
import socket
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from apps.engines.protocol import Cause, EngineKind, HealthProbe, InvalidOptions, LaunchContext, ReadinessState
from apps.engines.ray_serve import network
from apps.engines.ray_serve.adapter import PACKAGE_ROOT, RayServeAdapter
from apps.engines.ray_serve.cluster import Cluster
from apps.engines.ray_serve.door import METRICS
from apps.engines.ray_serve.followers import LogFollower
from apps.engines.ray_serve.launcher import make_parser
from apps.engines.ray_serve.status import GONE, application_state
from apps.engines.ray_serve.workspace import Workspace, session_root
from apps.profiles.binding import Binding, bound, with_nccl
from tests.engines.contexts import CODER, INSTALLS, ModelSpec, context, slots, written

HERE = Path(__file__).parent
NOTHING = HealthProbe(status=None)
TINY = ModelSpec(served_name="tiny", source="/models/tiny-llama", max_context_tokens=1024)
NODE = "2937228472c5289a74e73a513428c6a60d6758c176b25927b4a6c0fe"
adapter = RayServeAdapter()


def coder() -> LaunchContext:
    return context(
        CODER,
        INSTALLS[EngineKind.RAY_SERVE],
        {"max_model_len": 32768, "gpu_memory_utilization": 0.9, "max_num_seqs": 32, "max_ongoing_requests": 64},
        replicas=slots(2, replicas=2),
        tensor_parallel_size=2,
        nvlinked=True,
        cache_dir="/var/lib/rigpanel/cache",
    )


def on_the_cpu() -> LaunchContext:
    options = {"max_model_len": 512, "enforce_eager": True}
    return context(TINY, INSTALLS[EngineKind.RAY_SERVE], options, replicas=slots(0, replicas=2))


def words(given: LaunchContext) -> tuple[str, ...]:
    (launch,) = adapter.launch_specs(given)
    return launch.argv


def document(given: LaunchContext) -> dict[str, Any]:
    argv = words(given)
    return dict(json.loads(argv[argv.index("--application") + 1]))


def config(given: LaunchContext) -> dict[str, Any]:
    (one,) = document(given)["args"]["llm_configs"]
    return dict(one)


@pytest.mark.parametrize(
    ("name", "given"), [("qwen25-coder-32b-2xtp2", coder()), ("two-replicas-on-the-cpu", on_the_cpu())]
)
def test_the_launch_is_the_golden_one(name: str, given: LaunchContext) -> None:
    shown = written(adapter.launch_specs(given)).replace(str(PACKAGE_ROOT), "/opt/rigpanel")
    assert shown == (HERE / "golden" / f"ray_serve-{name}.txt").read_text()


def test_the_launcher_takes_what_the_adapter_gives() -> None:
    argv = words(coder())
    args = make_parser().parse_args(argv[argv.index("--host") :])
    assert [len(seat["cards"]) for seat in args.replica] == [2, 2]
    assert args.replica[0]["env"]["NCCL_P2P_LEVEL"] == "NVL"
    assert args.application["import_path"] == "ray.serve.llm:build_openai_app"
    assert args.network == "private"


def test_each_replica_takes_the_one_place_of_a_raylet_with_all_its_cards() -> None:
    group = config(coder())["placement_group_config"]
    assert group["strategy"] == "STRICT_PACK"
    assert group["bundles"] == [{"CPU": 1.0, "GPU": 1.0, "rigpanel_place": 1.0}, {"CPU": 1.0, "GPU": 1.0}]


def test_each_replica_is_bound_to_the_numa_node_of_its_own_cards(tmp_path: Path) -> None:
    """The launcher as a whole is not: it would take all replicas to the first one's node."""
    prefixes = [("numactl", "--cpunodebind=0"), ("numactl", "--cpunodebind=1")]
    nccl = [{"NCCL_P2P_LEVEL": "NVL"}, {"NCCL_P2P_DISABLE": "1"}]
    bindings = [Binding(prefix, env) for prefix, env in zip(prefixes, nccl, strict=True)]
    given = replace(coder(), replicas=with_nccl(slots(2, replicas=2), bindings))
    (launch,) = bound(adapter.launch_specs(given), bindings)
    assert launch.argv[0] == "/opt/ray/bin/python"
    seats = make_parser().parse_args(launch.argv[launch.argv.index("--host") :]).replica
    assert [seat["env"] for seat in seats] == nccl
    cluster = Cluster(Workspace.make(private=True, root=tmp_path / "rays"), seats)
    assert [tuple(cluster.arguments(i)[:2]) for i in (0, 1)] == prefixes


def test_streams_are_not_held_back_unless_somebody_asks() -> None:
    assert config(coder())["experimental_configs"] == {"stream_batching_interval_ms": 0}
    slow = replace(coder(), options={"stream_batching_interval_ms": 20})
    assert config(slow)["experimental_configs"] == {"stream_batching_interval_ms": 20}
    assert "stream_batching_interval_ms" not in config(slow)["engine_kwargs"]


def test_what_serve_sets_itself_is_not_among_the_engines_arguments() -> None:
    given = config(coder())["engine_kwargs"]
    assert not {"model", "served_model_name", "distributed_executor_backend", "max_ongoing_requests"} & set(given)
    assert given["enable_auto_tool_choice"] is True
    assert given["tool_call_parser"] == "hermes"


@pytest.mark.parametrize("asked", ["auto", -1])
def test_a_context_as_long_as_fits_is_a_number_to_the_engine(asked: object) -> None:
    """``auto`` is a word of vLLM's command line alone; its argument class takes -1 for it."""
    automatic = replace(coder(), options={"max_model_len": asked})
    assert config(automatic)["engine_kwargs"]["max_model_len"] == -1


def test_cards_without_a_bridge_do_without_vllms_own_all_reduce() -> None:
    assert "disable_custom_all_reduce" not in config(coder())["engine_kwargs"]
    assert config(replace(coder(), nvlinked=False))["engine_kwargs"]["disable_custom_all_reduce"] is True


def test_weights_that_are_still_to_be_fetched_keep_the_hosts_network() -> None:
    hub = replace(coder(), model=replace(CODER, source="Qwen/Qwen2.5-Coder-32B-Instruct-AWQ"))
    argv = words(hub)
    assert argv[argv.index("--network") + 1] == "host"
    assert "HF_HUB_OFFLINE" not in config(hub)["runtime_env"]["env_vars"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_replicas": 2}, "the profile's layout"),
        ({"accelerator_type": "RTX 3090"}, "pins the cards"),
        ({"data_parallel": True}, "choose engine vllm"),
        ({"worker_cls": "mine.Worker"}, "load code of its own"),
        ({"max_ongoing_request": 3}, "Did you mean max_ongoing_requests"),
        ({"swap_space": 4}, "no longer has --swap-space"),
        ({"max_ongoing_requests": 0}, "greater than or equal to 1"),
    ],
)
def test_a_wrong_option_is_explained(options: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidOptions, match=said):
        adapter.check(options)


# -- what Serve's REST API says --------------------------------------------------------------------


@pytest.fixture
def answer() -> dict[str, Any]:
    """Recorded from Ray 2.60 with two replicas on their way."""
    return dict(json.loads((HERE / "data" / "ray-serve-applications.json").read_text()))


def replicas_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = answer["applications"]["tiny"]["deployments"]["LLMServer:tiny"]["replicas"]
    return found


def test_replicas_of_the_model_are_read_and_the_ingress_is_not_one(answer: dict[str, Any]) -> None:
    state = application_state(answer, "tiny", {}, 2)
    assert (state.status, state.running) == ("DEPLOYING", 0)
    assert [(p.index, p.state, p.pid) for p in state.places] == [(0, "STARTING", 611), (1, "STARTING", 610)]
    assert "taken more than 30s to initialize" in state.message


def test_a_replica_is_known_by_the_raylet_it_runs_on(answer: dict[str, Any]) -> None:
    first, second = replicas_of(answer)
    first["node_id"], second["node_id"] = "b", "a"
    second["state"] = "RUNNING"
    state = application_state(answer, "tiny", {"a": 0, "b": 1}, 2)
    assert [(p.state, p.pid) for p in state.places] == [("RUNNING", 610), ("STARTING", 611)]


def test_a_replica_that_is_away_leaves_its_place_empty(answer: dict[str, Any]) -> None:
    first, second = replicas_of(answer)
    second["node_id"] = "b"
    second["state"] = "RUNNING"
    replicas_of(answer).remove(first)
    state = application_state(answer, "tiny", {NODE: 0, "b": 1}, 2)
    assert [p.state for p in state.places] == [GONE, "RUNNING"]


def test_a_replica_that_stops_does_not_hide_its_successor(answer: dict[str, Any]) -> None:
    first, second = replicas_of(answer)
    first["state"], second["state"] = "STOPPING", "RUNNING"
    assert application_state(answer, "tiny", {NODE: 0}, 2).places[0].state == "RUNNING"


def test_the_only_deployment_of_an_application_holds_the_model(answer: dict[str, Any]) -> None:
    application = answer["applications"]["tiny"]
    ingress = application["deployments"].pop("OpenAiIngress")
    application["deployments"] = {"OpenAiIngress": ingress}
    assert application_state(answer, "tiny", {}, 1).running == 1


def test_an_application_that_serve_does_not_know_is_no_state(answer: dict[str, Any]) -> None:
    with pytest.raises(KeyError):
        application_state(answer, "another", {}, 2)


def test_the_state_document_becomes_a_report(answer: dict[str, Any]) -> None:
    state = application_state(answer, "tiny", {}, 2)
    report = adapter.parse_report(json.dumps({**state.to_dict(), "ready": True}))
    assert report is not None
    assert [(one.index, one.healthy, one.state) for one in report.replicas] == [
        (0, False, "starting"),
        (1, False, "starting"),
    ]
    assert adapter.parse_report("[]") is None


# -- its log ---------------------------------------------------------------------------------------

BOOT = """[rigpanel] Ray is in a network of its own, with only loopback
[rigpanel] starting Ray's head
[rigpanel] Ray's head answers
[rigpanel] 2 raylets joined
[rigpanel] application submitted
[rigpanel] application DEPLOYING: replica 0 GONE, replica 1 GONE
[rigpanel] application DEPLOYING: replica 0 STARTING, replica 1 STARTING
(pid 611) INFO 11-26 10:00:00 [core.py:1] Initializing a V1 LLM engine (v0.32.0) with config: model='/models/tiny'
(pid 611) INFO 11-26 10:00:09 [x.py:1] Loading safetensors checkpoint shards:  50% Completed | 1/2
"""


def test_the_phases_go_forward_from_rays_own_into_vllms() -> None:
    seen = [("", 0.0)]
    for end in range(1, len(BOOT.splitlines()) + 1):
        now = adapter.readiness("\n".join(BOOT.splitlines()[:end]) + "\n", NOTHING)
        assert now.state is ReadinessState.WAITING
        assert now.fraction >= seen[-1][1]
        if now.phase != seen[-1][0]:
            seen.append((now.phase, now.fraction))
    assert [phase for phase, _ in seen[1:]] == [
        "process",
        "ray head",
        "raylets",
        "application",
        "replicas",
        "config",
        "weights",
    ]


def test_only_the_launchers_own_word_is_a_failed_start() -> None:
    """A replica's try that failed is Serve's to repeat."""
    tried = BOOT + "(pid 611) RuntimeError: Engine core initialization failed. See root cause above.\n"
    assert adapter.readiness(tried, NOTHING).state is ReadinessState.WAITING
    ended = tried + "[rigpanel] failed: Serve gave up on the application.\n"
    assert adapter.readiness(ended, NOTHING).state is ReadinessState.FAILED


FAILURES = [
    (
        '[rigpanel] failed: Ray found no place for a replica. It needs, on one raylet: {"GPU": 2.0}\n',
        Cause.UNSUPPORTED_SPLIT,
        'It needs {"GPU": 2.0}.',
    ),
    ("[rigpanel] failed: [Errno 98] Address already in use: 127.0.0.1:28100\n", Cause.PORT_BUSY, "28100"),
    (
        "ConnectionError: Ray is trying to start at 127.0.0.1:6379, but is already running at 127.0.0.1:6379. Please "
        "specify a different port using the `--port` flag of `ray start` command.\n"
        "[rigpanel] failed: Ray's head ended\n",
        Cause.PORT_BUSY,
        "already running at 127.0.0.1:6379",
    ),
    (
        "ValueError: Ray component worker_ports is trying to use a port number 18400 that is used by others.\n",
        Cause.PORT_BUSY,
        "Two parts of Ray",
    ),
    (
        "[rigpanel] failed: Ray's head refused our token (403): Forbidden: Invalid authentication token\n",
        Cause.CRASHED,
        "refused the token",
    ),
    ("(pid 7) ModuleNotFoundError: No module named 'pyarrow'\n", Cause.ENGINE_MISSING, "has no pyarrow"),
    ("/opt/ray/bin/python: Error while finding module: No module named 'ray'\n", Cause.ENGINE_MISSING, "has no ray"),
    ("(pid 7) ValueError: Unknown engine argument: performance_mode\n", Cause.BAD_FLAG, "no argument performance_mode"),
    (
        "(pid 611) ValueError: To serve at least one request with the model's max seq len (4000000), (3.81 GiB KV "
        "cache is needed, which is larger than the available KV cache memory (1.0 GiB). Based on the available "
        "memory, the estimated maximum model length is 1048448.\n"
        "[rigpanel] failed: Serve gave up on the application.\n",
        Cause.KV_CACHE_TOO_SMALL,
        "4,000,000 tokens",
    ),
    (
        "[rigpanel] failed: Serve gave up on the application.\n[rigpanel] Failed to start replica: it broke\n",
        Cause.CRASHED,
        "it broke",
    ),
    ("[rigpanel] failed: Ray's head ended with code 1.\n[rigpanel] dead\n", Cause.CRASHED, "ended with code 1"),
    ("[rigpanel] failed: Serve refused the application (400): bad schema\n", Cause.BAD_FLAG, "bad schema"),
    ("OSError: [Errno 28] No space left on device\n", Cause.DISK_FULL, "disk is full"),
    (
        "(pid 6) Error while creating shared memory segment /dev/shm/nccl-Ewj (size 33030528), error: No space left on "
        "device (28)\n",
        Cause.DISK_FULL,
        "/dev/shm",
    ),
    (
        "(pid 6) (EngineCore pid=7) ERROR 11-26 11:31:21 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
        "unexpectedly (exit code: -4), shutting down executor.\n(pid 6) vllm.v1.engine.exceptions.EngineDeadError: x\n",
        Cause.CRASHED,
        "SIGILL",
    ),
    (
        "(pid 6) (EngineCore pid=7) ERROR 11-26 11:31:21 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
        "unexpectedly (exit code: -9), shutting down executor.\n(pid 6) vllm.v1.engine.exceptions.EngineDeadError: x\n",
        Cause.KILLED,
        "killed (SIGKILL)",
    ),
    (  # Ray says itself whom it ended, and vLLM sees no more than the signal
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n"
        "(pid 6) (EngineCore pid=7) ERROR 11-26 11:31:21 [multiproc_executor.py:315] Worker proc VllmWorker-0 died "
        "unexpectedly (exit code: -9), shutting down executor.\n",
        Cause.KILLED,
        "Ray ended a replica",
    ),
]


@pytest.mark.parametrize(("log", "cause", "said"), FAILURES)
def test_a_failure_is_told_in_words(log: str, cause: Cause, said: str) -> None:
    found = adapter.diagnose(log, 1)
    assert found.cause is cause
    assert said in found.summary
    assert found.suggestion


METRIC_LINES = """# HELP ray_vllm_num_requests_running Number of requests in model execution batches.
# TYPE ray_vllm_num_requests_running gauge
ray_vllm_num_requests_running{ReplicaId="a",engine="0",model_name="tiny"} 2.0
ray_vllm_num_requests_running{ReplicaId="b",engine="0",model_name="tiny"} 1.0
ray_vllm_generation_tokens_total{ReplicaId="a",engine="0",model_name="tiny"} 120.0
ray_component_rss_mb{x="y"} 5.0
"""


def test_metrics_of_all_raylets_are_added_up() -> None:
    kept = b"".join(METRICS.findall(METRIC_LINES.encode()))
    assert b"component" not in kept
    metrics = adapter.parse_metrics(kept.decode())
    assert (metrics.requests_running, metrics.generation_tokens_total) == (3.0, 120.0)


def test_new_whole_lines_of_the_workers_are_followed(tmp_path: Path) -> None:
    log = tmp_path / "worker-0a1b-01000000-611.err"
    log.write_bytes(b":actor_name:ServeReplica\n\x1b[36mfirst\x1b[0m\nhalf")
    (tmp_path / "raylet.err").write_text("not a worker\n")
    follower = LogFollower(tmp_path)
    assert follower.look() == ["(pid 611) first"]
    assert follower.look() == []
    with open(log, "ab") as file:
        file.write(b" done\n")
    assert follower.look() == ["(pid 611) half done"]


# -- its folder and its network --------------------------------------------------------------------


def test_the_token_is_in_a_file_of_its_own_and_a_dead_launchers_folder_goes(tmp_path: Path) -> None:
    root = tmp_path / "rays"
    made = Workspace.make(private=True, root=root)
    assert made.token_file.read_text() == made.token
    assert made.token_file.stat().st_mode & 0o077 == 0
    dead = root / "dead"
    dead.mkdir()
    (dead / "owner").write_text(f"{os.getpid()} 1")  # this pid, but another start: a stranger
    again = Workspace.make(private=True, root=root)
    assert not dead.exists()
    assert made.directory.exists()
    assert again.directory != made.directory


def test_rays_sockets_fit_below_any_temporary_folder() -> None:
    below = "/12345678/session_2026-11-26_11-09-23_304598_4194304/sockets/plasma_store.1"
    for temporary in ("/tmp", "/var/tmp", "/var/folders/xx/a-long-name-of-its-own"):
        assert len(f"{session_root(temporary, 65534)}{below}") <= 107


def test_the_token_is_on_no_command_line(tmp_path: Path) -> None:
    workspace = Workspace.make(private=True, root=tmp_path / "rays")
    cluster = Cluster(workspace, [{"cards": ["GPU-a", "GPU-b"]}, {"cards": ["GPU-c", "GPU-d"]}])
    for index in (0, 1):
        assert workspace.token not in " ".join(cluster.arguments(index))
    assert cluster.environment["RAY_AUTH_TOKEN_PATH"] == str(workspace.token_file)
    assert "--head" in cluster.arguments(0)
    assert "--head" not in cluster.arguments(1)
    assert cluster.arguments(1)[cluster.arguments(1).index("--num-gpus") + 1] == "2"


def test_what_listens_wider_than_loopback_is_found() -> None:
    with socket.socket() as narrow, socket.socket() as wide, socket.socket(socket.AF_INET6) as wide6:
        narrow.bind(("127.0.0.1", 0))
        wide.bind(("0.0.0.0", 0))
        wide6.bind(("::", 0))
        for one in (narrow, wide, wide6):
            one.listen()
        found = {one.port for one in network.wide_listeners([os.getpid()])}
        assert {wide.getsockname()[1], wide6.getsockname()[1]} <= found
        assert narrow.getsockname()[1] not in found


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("0100007F", True),
        ("00000000", False),
        ("0F02000A", False),
        ("00000000000000000000000001000000", True),
        ("0000000000000000FFFF00000100007F", True),
        ("00000000000000000000000000000000", False),
    ],
)
def test_the_kernels_form_of_an_address_is_read(address: str, loopback: bool) -> None:
    assert struct.pack("=I", 1) == b"\1\0\0\0", "the examples are those of a little-endian machine"
    assert network._is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["/opt/ray/core/gcs_server", "--log_dir=/tmp/x"], "gcs_server"),
        (["/opt/ray/bin/python", "-u", "/opt/ray/dashboard/dashboard.py", "--port=1"], "dashboard.py"),
        (["ray::ServeController"], "ray::ServeController"),
        (
            ["ray-dashboard-ServeHead-0 (/opt/ray/bin/python -B -c \"import x; x('/opt/site-packages')\")"],
            "ray-dashboard-ServeHead-0",
        ),
        (["/opt/ray/bin/python", "-c", "run('/opt/a b.py')"], "python"),
    ],
)
def test_who_listens_has_a_name(tmp_path: Path, words: list[str], name: str) -> None:
    (tmp_path / "cmdline").write_text("\0".join(words))
    assert network._name(tmp_path) == name


def test_the_warning_names_who_listens_where() -> None:
    said = network.wide_words([network.Listener(6379, "gcs_server"), network.Listener(7000, "raylet")])
    assert "gcs_server on 6379; raylet on 7000" in said
    assert network.wide_words([]) == ""


def test_what_the_launcher_found_wide_is_a_warning_of_the_start() -> None:
    found = adapter.check_start(BOOT + "[rigpanel] warning: Ray listens on all interfaces.\n[rigpanel] ready\n", ())
    assert found.warnings == ("Ray listens on all interfaces.",)
    assert found.facts["network"] == "private"
    assert adapter.check_start("[rigpanel] ready\n", ()).warnings == ()


def test_a_plan_warns_where_ray_gets_no_network_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "why_not_private", lambda: "")
    assert network.ray_network_warnings(private=True) == ()
    monkeypatch.setattr(network, "why_not_private", lambda: "Operation not permitted")
    (said,) = network.ray_network_warnings(private=True)
    assert "Operation not permitted" in said
    assert "firewall" in said
    (said,) = network.ray_network_warnings(private=False)
    assert "Download them first" in said
