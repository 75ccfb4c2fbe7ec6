"""``manage.py verify``: check this rig. Exit 0 done, 1 a check failed or nobody works, 2 wrong usage."""

from __future__ import annotations

import json
import sys
from typing import Any

import redis
from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

from apps.common.actors import COMMAND_LINE
from apps.common.errors import ApplicationError
from apps.common.store import last_heartbeat
from apps.jobs.console import finish, job_dict
from apps.jobs.models import Job
from apps.jobs.waiting import wait_for
from apps.rigs.selectors import rig_here
from apps.verification.models import VerificationRun
from apps.verification.services import verify_request

WAIT_LIMIT_SECONDS = 3600.0


class Command(BaseCommand):
    help = "Check this rig and show expected beside measured."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--suite", default="quick", help="which checks: quick")
        parser.add_argument("--reason", default="", help="why, for the history")
        parser.add_argument("--wait", action="store_true", help="wait for the results and show them")
        parser.add_argument("--json", action="store_true", help="print the job, with the results, as JSON")

    def handle(self, *args: Any, **options: Any) -> None:
        if not worker_is_up():
            print(
                f"The verify worker of {settings.RIG_NAME} does not run, so nobody would do the work. "
                "Start the panel first: make up.",
                file=sys.stderr,
            )
            sys.exit(1)
        try:
            job = verify_request(suite=options["suite"], rig=rig_here(), actor=COMMAND_LINE, reason=options["reason"])
        except ApplicationError as error:
            print(error.message, file=sys.stderr)
            sys.exit(2 if error.code == "unknown_suite" else 1)
        if options["wait"]:
            job = wait_for(job, limit_seconds=WAIT_LIMIT_SECONDS, tell=lambda _: None)
        if options["json"]:
            print(json.dumps(job_dict(job) | {"results": results_of(job)}))
        elif options["wait"]:
            for result in results_of(job):
                print(
                    f"{result['verdict']:<8} {result['title']:<18} {result['measured']} (expected {result['expected']})"
                )
                if result["advice"]:
                    print(f"{'':<27} {result['advice']}")
        if options["json"]:
            if job.is_final and job.state != "succeeded":
                print(job.summary, file=sys.stderr)
                sys.exit(1)
            sys.exit(0)
        sys.exit(finish(job, wait=False, as_json=False))


def results_of(job: Job) -> list[dict[str, str]]:
    run = VerificationRun.objects.filter(job=job).first()
    rows = run.results.all() if run else ()
    return [
        {
            "check": r.check_name,
            "title": r.title,
            "verdict": r.verdict,
            "expected": r.expected,
            "measured": r.measured,
            "advice": r.advice,
        }
        for r in rows
    ]


def worker_is_up() -> bool:
    try:
        return last_heartbeat("verify", settings.RIG_NAME) is not None
    except redis.RedisError:
        return False
