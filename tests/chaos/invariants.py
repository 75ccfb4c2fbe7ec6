"""What must hold whenever nothing is under way: asked of the database's rows and of the real processes.

``problems`` looks at one rig from outside: rows by plain SQL (the same for a panel's database file and for the test's
own connection), processes by /proc. It knows nothing of how the panel works, only of what it promises.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from apps.runners.processes import all_processes, is_alive

Row = dict[str, Any]
Query = Callable[[str], list[Row]]
FINAL_JOB = ("succeeded", "failed", "errored", "cancelled")
ENDED = ("stopped", "failed")
SERVING = ("ready", "degraded")


def engine_processes(marker: bytes) -> dict[int, list[str]]:
    """pid → command line of every living process that an engine launch of this panel started."""
    found = {}
    for pid, stat in all_processes().items():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if is_alive(stat) and b"RIGPANEL_LAUNCH_ID=" in environment and marker in environment + line:
            found[pid] = line.decode(errors="replace").split("\0")
    return found


def argument(line: list[str], name: str) -> str:
    return line[line.index(name) + 1] if name in line else ""


def problems(query: Query, engines: dict[int, list[str]]) -> list[str]:
    """Sentences, one per promise that is broken; empty when all is well. Nothing may be under way when it is called."""
    return [
        *one_owner_per_card(query, engines),
        *no_orphan(query, engines),
        *no_lost_job(query),
        *nothing_is_stuck(query),
        *what_runs_was_asked_for(query),
        *every_end_has_a_sentence(query),
        *routes_lead_where_they_say(query),
        *pins_hold(query),
    ]


def one_owner_per_card(query: Query, engines: dict[int, list[str]]) -> list[str]:
    found = []
    rows = query(
        "SELECT gpu_id, slot, COUNT(*) AS n FROM deployments_gpureservation"
        " WHERE released_at IS NULL AND gpu_id IS NOT NULL GROUP BY gpu_id, slot HAVING COUNT(*) > 1"
    )
    found += [f"card {r['gpu_id']} ({r['slot']}) has {r['n']} live reservations" for r in rows]
    # Sleepers keep a little of their cards, beside whoever serves there.
    asleep = {
        str(r["port"])
        for r in query(
            "SELECT r.port FROM deployments_replica r JOIN deployments_deployment d ON d.id = r.deployment_id"
            " WHERE r.released_at IS NULL AND d.status = 'sleeping'"
        )
    }
    cards: Counter[str] = Counter()
    for line in engines.values():
        if argument(line, "--port") in asleep:
            continue
        cards.update(u for u in argument(line, "--gpu-uuids").split(",") if u)
    found += [f"card {uuid} is used by {n} engine processes" for uuid, n in cards.items() if n > 1]
    return found


def no_orphan(query: Query, engines: dict[int, list[str]]) -> list[str]:
    """Every engine process belongs to a live replica, and every serving replica has its process."""
    rows = query(
        "SELECT r.port, r.handle, d.status, d.id FROM deployments_replica r"
        " JOIN deployments_deployment d ON d.id = r.deployment_id WHERE r.released_at IS NULL"
    )
    known = {}
    for row in rows:
        handle = json.loads(row["handle"]) if isinstance(row["handle"], str) else row["handle"]
        if handle:
            known[int(handle["engine_pid"])] = row
    listening = {pid: line for pid, line in engines.items() if "--port" in line}
    found = [
        f"engine process {pid} belongs to nobody: {' '.join(line)[:160]}"
        for pid, line in listening.items()
        if pid not in known and not any(argument(line, "--port") == str(r["port"]) for r in rows)
    ]
    ports = Counter(argument(line, "--port") for line in listening.values())
    found += [f"port {port} has {n} engine processes" for port, n in ports.items() if n > 1]
    found += [
        f"deployment {row['id']} is {row['status']}, but its engine {pid} does not live"
        for pid, row in known.items()
        if row["status"] in ("ready", "sleeping") and pid not in engines
    ]
    return found


def no_lost_job(query: Query) -> list[str]:
    rows = query("SELECT id, kind, state, result FROM jobs_job")
    return [f"job {r['id']} ({r['kind']}) is {r['state']}" for r in rows if r["state"] not in FINAL_JOB]


def nothing_is_stuck(query: Query) -> list[str]:
    rows = query("SELECT id, status FROM deployments_deployment")
    found = [
        f"deployment {r['id']} is {r['status']} while nothing is under way"
        for r in rows
        if r["status"] not in (*ENDED, *SERVING, "sleeping")
    ]
    replicas = query(
        "SELECT d.id, d.status, r.healthy FROM deployments_replica r"
        " JOIN deployments_deployment d ON d.id = r.deployment_id WHERE d.status IN ('ready', 'degraded')"
    )
    away = {r["id"] for r in replicas if not r["healthy"]}
    found += [
        f"deployment {pk} is {status} and {'a replica' if pk in away else 'no replica'} of it is away"
        for pk, status in {(r["id"], r["status"]) for r in replicas}
        if (status == "degraded") != (pk in away)
    ]
    held = query("SELECT served_name, held_by_job_id FROM deployments_route WHERE state = 'held'")
    found += [f"requests for {r['served_name']} wait for job {r['held_by_job_id']}" for r in held]
    live = query(
        "SELECT g.id FROM deployments_gpureservation g JOIN deployments_replica r ON r.id = g.replica_id"
        " JOIN deployments_deployment d ON d.id = r.deployment_id"
        " WHERE g.released_at IS NULL AND d.status IN ('stopped', 'failed')"
    )
    found += [f"reservation {r['id']} outlives its deployment" for r in live]
    return found


def what_runs_was_asked_for(query: Query) -> list[str]:
    """``desired`` and ``status`` agree; the last wish runs, or somebody can read why not."""
    rows = query("SELECT id, status, desired, status_reason FROM deployments_deployment ORDER BY id")
    found = [
        f"deployment {r['id']} is {r['status']} though it should be stopped"
        for r in rows
        if r["status"] in SERVING and r["desired"] != "serving"
    ]
    found += [
        f"deployment {r['id']} should serve and is {r['status']} ({r['status_reason']})"
        for r in rows
        if r["status"] in ENDED and r["desired"] == "serving"
    ]
    by_id = {r["id"]: r for r in rows}
    last = query("SELECT id, state, deployment_id FROM jobs_job WHERE kind = 'switch' ORDER BY id DESC LIMIT 1")
    for job in last:
        deployment = by_id.get(job["deployment_id"])
        if job["state"] == "succeeded" and deployment is None:
            found.append(f"job {job['id']} succeeded, and there is no deployment of it")
        elif job["state"] == "succeeded" and deployment["status"] in ENDED and not deployment["status_reason"]:
            found.append(f"job {job['id']} succeeded, its deployment is gone without a reason")
    return found


def every_end_has_a_sentence(query: Query) -> list[str]:
    found = []
    for row in query("SELECT id, state, result FROM jobs_job"):
        result = json.loads(row["result"]) if isinstance(row["result"], str) else row["result"]
        if row["state"] in FINAL_JOB and not (result or {}).get("summary"):
            found.append(f"job {row['id']} is {row['state']} without a sentence")
        if row["state"] == "errored":
            found.append(f"job {row['id']} errored: {(result or {}).get('summary')}")
    for row in query("SELECT id, status, status_reason FROM deployments_deployment"):
        if row["status"] in ENDED and not row["status_reason"]:
            found.append(f"deployment {row['id']} is {row['status']} without a reason")
    return found


def routes_lead_where_they_say(query: Query) -> list[str]:
    rows = query(
        "SELECT r.served_name, d.served_name AS actual, d.status, d.id FROM deployments_route r"
        " LEFT JOIN deployments_deployment d ON d.id = r.deployment_id WHERE r.state = 'open'"
    )
    found = [
        f"the route {r['served_name']} leads to {r['actual'] or 'nobody'} ({r['status']})"
        for r in rows
        if r["actual"] != r["served_name"] or r["status"] not in SERVING
    ]
    served = {r["id"] for r in rows}
    ready = query("SELECT id, served_name FROM deployments_deployment WHERE status = 'ready'")
    found += [f"deployment {r['id']} is ready and gets no requests" for r in ready if r["id"] not in served]
    return found


def pins_hold(query: Query) -> list[str]:
    """Nobody but its owner replaced or stopped what was pinned, unless it is on record that they passed over the pin.

    What came first is told by the audit chain, since the clock is set now and then. Members' pins are short enough to
    end by such a step, so those of a day and less are left out."""
    entries = query(
        "SELECT action, actor_id, object_id FROM audit_auditentry WHERE action IN ('pin.create', 'pin.release',"
        " 'pin.override', 'job.switch', 'job.stop') ORDER BY sequence"
    )
    if not any(entry["action"] == "pin.create" for entry in entries):
        return []
    pins = {
        str(r["id"]): r
        for r in query("SELECT id, profile_id, created_at, until FROM deployments_pin")
        if _days(r["created_at"], r["until"]) > 2
    }
    jobs = {str(r["id"]): r for r in query("SELECT id, kind, deployment_id, params, data FROM jobs_job")}
    profiles = {
        r["id"]: r["profile_id"]
        for r in query(
            "SELECT d.id, v.profile_id FROM deployments_deployment d"
            " JOIN profiles_profileversion v ON v.id = d.version_id"
        )
    }
    found, owners, passed = [], dict[int, str](), set[str]()  # profile → whose pin is in force; who has just passed one
    for entry in entries:
        who, what = entry["actor_id"], str(entry["object_id"])
        if entry["action"] == "pin.create" and what in pins:
            owners[pins[what]["profile_id"]] = who
        elif entry["action"] == "pin.release" and what in pins:
            owners.pop(pins[what]["profile_id"], None)
        elif entry["action"] == "pin.override":
            passed.add(who)
        elif entry["action"].startswith("job."):
            job = jobs.get(what, {})
            data = json.loads(job["data"]) if isinstance(job.get("data"), str) else job.get("data") or {}
            gone = data.get("replaced", []) if entry["action"] == "job.switch" else [job.get("deployment_id")]
            target = profiles.get(job.get("deployment_id")) if entry["action"] == "job.switch" else None
            broken = [
                p for d in gone if (p := profiles.get(d)) is not None and p != target and owners.get(p, who) != who
            ]
            if broken and who not in passed:
                found.append(f"job {what} of {who} replaced what is pinned by {[owners[p] for p in broken]}")
            passed.discard(who)
    return found


def _days(begin: Any, end: Any) -> float:
    """Between two times as a database gives them."""
    first, last = (datetime.fromisoformat(t) if isinstance(t, str) else t for t in (begin, end))
    return (last - first).total_seconds() / 86400.0


def told(found: Iterable[str]) -> str:
    return "\n".join(f"  - {one}" for one in found)
