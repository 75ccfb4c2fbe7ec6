"""``manage.py status``: processes, health, what serves and what is under way."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand
from django.db import DatabaseError

from apps.deployments.models import Deployment
from apps.jobs.models import LIVE_STATES, Job
from apps.runners.processes import memory_rss_bytes
from rigpanel.health import parts
from rigpanel.processes import process_names, running


class Command(BaseCommand):
    help = "Say what runs, how it is, what serves and what is under way. Exit 1 unless everything is well."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        report = status_report()
        print(json.dumps(report, indent=2) if options["json"] else as_text(report))
        sys.exit(0 if report["ready"] else 1)


def status_report() -> dict[str, Any]:
    """Everything a script wants to know; ``rss_bytes`` counts shared pages in each process."""
    processes: dict[str, Any] = {}
    for name in process_names():
        if name == "store" and not settings.STORE_EMBEDDED:
            continue
        stat = running(name)
        processes[name] = None if stat is None else {"pid": stat.pid, "rss_bytes": memory_rss_bytes([stat])}
    found = parts()
    report: dict[str, Any] = {
        "rig": settings.RIG_NAME,
        "version": settings.VERSION,
        "url": settings.PUBLIC_URL,
        "gateway_url": settings.GATEWAY_URL,
        "ready": all(p.ok for p in found),
        "processes": processes,
        "parts": [asdict(p) for p in found],
        "deployments": [],
        "jobs": [],
    }
    try:
        live = Deployment.objects.exclude(status__in=("stopped", "failed")).order_by("pk")
        report["deployments"] = [{"id": d.pk, "profile": str(d), "status": d.status} for d in live]
        jobs = Job.objects.filter(state__in=LIVE_STATES).order_by("pk")
        report["jobs"] = [
            {"id": j.pk, "kind": j.kind, "title": j.title, "state": j.state, "progress": j.progress} for j in jobs
        ]
    except DatabaseError:
        pass  # the part "database" says so already
    return report


def as_text(report: dict[str, Any]) -> str:
    lines = [f"rig {report['rig']}, rigpanel {report['version']}: {'ready' if report['ready'] else 'not ready'}", ""]
    for name, process in report["processes"].items():
        runs = f"pid {process['pid']}, {(process['rss_bytes'] or 0) / 2**20:.0f} MiB" if process else "not running"
        lines.append(f"  {name:<11} {runs}")
    lines.append("")
    lines += [f"  {p['name']:<11} {'ok ' if p['ok'] else 'no '} {p['sentence']}" for p in report["parts"]]
    lines.append("")
    lines += [f"  serving     {d['profile']} ({d['status']})" for d in report["deployments"]] or [
        "  serving     nothing"
    ]
    lines += [f"  job {j['id']:<7} {j['title']} ({j['state']}, {j['progress']:.0%})" for j in report["jobs"]]
    return "\n".join(lines)
