"""The panel's processes come up, come back and go away."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time

import psutil
import pytest

from tests.panel import NAMES, REPOSITORY, Panel, wait_for

pytestmark = pytest.mark.processes
PROCESSES = NAMES[1:]  # what the supervisor keeps alive


def test_a_started_panel_names_every_part_and_prints_its_address_with_a_one_time_link(running_panel: Panel) -> None:
    answer = running_panel.readyz()
    assert answer.status == 200
    parts = answer.json["parts"]
    assert list(parts) == ["database", "broker", "control", "verify", "beat", "sampler", "gateway"]
    assert all(part["ok"] for part in parts.values())
    text = wait_for("the address", lambda: t if "/join/" in (t := running_panel.said()) else "")
    assert f"http://127.0.0.1:{running_panel.port}/join/" in text
    assert f"http://127.0.0.1:{running_panel.gateway_port}/v1" in text


def test_a_calm_start_leaves_no_traceback_and_no_error_in_the_logs(running_panel: Panel) -> None:
    logs = running_panel.logs()
    assert "Traceback" not in logs
    assert not re.findall(r"level='(?:error|critical)'.*", logs)
    assert not re.findall(r" CRIT .*", logs)


def test_the_sampler_loads_only_the_apps_that_it_needs(running_panel: Panel) -> None:
    """Though `up` names the panel's settings for all that it starts."""
    for name, settings in (("sampler", "rigpanel.settings_sampler"), ("web", "rigpanel.settings")):
        assert psutil.Process(running_panel.pid(name)).environ()["DJANGO_SETTINGS_MODULE"] == settings


def test_no_secret_is_on_a_command_line_or_readable_by_others(running_panel: Panel) -> None:
    secrets = [p.read_text().strip() for p in (running_panel.data / "secrets").iterdir()]
    assert secrets
    for name in NAMES:
        line = " ".join(psutil.Process(running_panel.pid(name)).cmdline())
        assert not any(secret in line for secret in secrets)
    assert running_panel.data.stat().st_mode & 0o077 == 0


def test_a_second_up_with_the_same_data_directory_says_so_in_one_sentence(running_panel: Panel) -> None:
    answer = running_panel.manage("up")
    assert answer.returncode == 1
    assert "already runs with the data directory" in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 1


def test_a_port_taken_by_another_panel_is_named_with_its_setting(running_panel: Panel, panel: Panel) -> None:
    answer = panel.manage("up", RIGPANEL_PORT=str(running_panel.port))
    assert answer.returncode == 1
    assert f"Port {running_panel.port} on 127.0.0.1" in answer.stderr
    assert "another rigpanel" in answer.stderr
    assert "RIGPANEL_PORT" in answer.stderr
    answer = panel.manage("up", RIGPANEL_GATEWAY_PORT=str(running_panel.gateway_port))
    assert answer.returncode == 1
    assert "RIGPANEL_GATEWAY_PORT" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_status_tells_a_script_what_runs(running_panel: Panel) -> None:
    import json

    answer = running_panel.manage("status", "--json")
    report = json.loads(answer.stdout)
    assert answer.returncode == 0
    assert report["ready"] is True
    assert {name for name, process in report["processes"].items() if process} == set(NAMES)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_killed_process_comes_back_and_everything_is_well_again(running_panel: Panel, name: str) -> None:
    killed = running_panel.pid(name)
    assert killed
    os.kill(killed, signal.SIGKILL)
    wait_for(f"a new {name}", lambda: running_panel.pid(name) not in (None, killed))
    running_panel.wait_ready()


def test_workers_take_jobs_again_after_the_store_was_killed(running_panel: Panel) -> None:
    import redis

    def consumed_at(role: str) -> float:
        import json

        client = redis.Redis(unix_socket_path=str(running_panel.data / "run" / "store.sock"), decode_responses=True)
        try:
            raw = client.get(f"rigpanel:alive:{role}:bench-01")
        except redis.RedisError:
            return 0.0
        finally:
            client.close()
        return float(json.loads(str(raw))["consumed_at"] or 0) if raw else 0.0

    workers = {role: running_panel.pid(role) for role in ("control", "verify")}
    killed, killed_at = running_panel.pid("store"), time.time()
    os.kill(killed, signal.SIGKILL)
    wait_for("a new store", lambda: running_panel.pid("store") not in (None, killed))
    back_at = time.time()
    for role in workers:
        wait_for(f"a message taken by {role}", lambda role=role: consumed_at(role) > max(killed_at, back_at))
    running_panel.wait_ready()


def test_a_worker_whose_messages_never_arrive_ends_itself(running_panel: Panel) -> None:
    """Nobody reads this queue, as with a worker that lost its place at the store without noticing."""
    code = (
        "import django; django.setup()\n"
        "from rigpanel import pulse\n"
        "pulse.HEARTBEAT_SECONDS = 0.2\n"
        "pulse.Pulse('rig.nobody.verify', concurrency=1).run()\n"
    )
    environment = running_panel.environment | {"DJANGO_SETTINGS_MODULE": "rigpanel.settings"}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == 70, answer.stderr
    assert "messages do not arrive any more" in answer.stderr


def test_what_the_store_held_survives_its_death(running_panel: Panel) -> None:
    import redis

    client = redis.Redis(unix_socket_path=str(running_panel.data / "run" / "store.sock"), decode_responses=True)
    client.set("kept", "yes")
    wait_for("the write to disk", lambda: client.info("persistence")["aof_last_write_status"] == "ok")
    client.execute_command("WAITAOF", 1, 0, 5000)
    killed = running_panel.pid("store")
    os.kill(killed, signal.SIGKILL)
    wait_for("a new store", lambda: running_panel.pid("store") not in (None, killed))

    def kept() -> str | None:
        try:
            return str(client.get("kept"))
        except redis.RedisError:
            return None

    assert wait_for("the store's answer", kept) == "yes"
    client.close()
    running_panel.wait_ready()


def test_killing_the_supervisor_takes_its_processes_along_and_the_next_up_works(panel: Panel) -> None:
    panel.start()
    pids = {name: panel.pid(name) for name in PROCESSES}
    assert panel.process is not None
    panel.process.kill()
    panel.process.wait()
    wait_for("the end of every process", lambda: not any(psutil.pid_exists(pid) for pid in pids.values()))
    panel.start()
    # Ctrl-C, as the terminal sends it.
    assert panel.interrupt() == 0
    assert not any(panel.pid(name) for name in NAMES)
    assert not (panel.data / "run" / "store.sock").exists()
    # down has nothing left to do and says so, twice.
    for _ in range(2):
        answer = panel.manage("down")
        assert answer.returncode == 0
        assert "was not running" in answer.stdout


def test_down_stops_a_running_panel(panel: Panel) -> None:
    panel.start()
    answer = panel.manage("down")
    assert answer.returncode == 0, answer.stderr
    assert panel.process is not None
    assert panel.process.wait(30) == 0
    assert not any(panel.pid(name) for name in NAMES)
    # What the database held is whole.
    connection = sqlite3.connect(panel.data / "rigpanel.sqlite3")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
