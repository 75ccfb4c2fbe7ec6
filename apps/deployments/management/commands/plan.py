"""``manage.py plan PROFILE``: what a switch would do, without doing it."""

from __future__ import annotations

import json
import shlex
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

from apps.common.errors import ApplicationError
from apps.deployments.forecast_words import advice_lines, forecast_lines
from apps.deployments.plan import command_lines, plan
from apps.deployments.plan_told import plan_dict
from apps.engines.protocol import InvalidOptions
from apps.profiles.selectors import profile_get
from apps.rigs.selectors import rig_here


class Command(BaseCommand):
    help = "Show what a switch to a profile would do: cards, what it replaces, the exact command lines."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("profile", help="the profile's slug")
        parser.add_argument("--json", action="store_true")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            the_plan = plan(profile_get(options["profile"]).current, rig_here(), advise=True)
            lines = command_lines(the_plan) if the_plan.fits else []
        except (ApplicationError, InvalidOptions) as error:
            print(error, file=sys.stderr)
            sys.exit(1)
        if options["json"]:
            print(json.dumps(plan_dict(the_plan, lines)))
        else:
            told = plan_dict(the_plan, lines)
            print(f"{told['profile']} v{told['version']} on {told['rig']}: {told['layout']}")
            for index, gpus in enumerate(told["replicas"]):
                print(f"  replica {index}: " + (f"GPU {', '.join(map(str, gpus))}" if gpus else "CPU"))
            for told_line in (*forecast_lines(the_plan.forecast), *advice_lines(the_plan.advice)):
                print(f"  {told_line}")
            if told["wakes"]:
                print("  wakes: it sleeps there")
            print("  replaces: " + (", ".join(told["replaces"]) or "nothing"))
            if told["stops_sleepers"]:
                print("  stops, to make room: " + ", ".join(told["stops_sleepers"]))
            for warning in told["warnings"]:
                print(f"  note: {warning}")
            for reason in dict.fromkeys(r for binding in the_plan.bindings for r in binding.reasons):
                print(f"  binding: {reason}")
            for line in lines:
                print(f"  {shlex.join(line)}")
        for problem in the_plan.refusals:
            print(problem, file=sys.stderr)
        sys.exit(0 if the_plan.fits else 1)
