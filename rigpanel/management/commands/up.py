"""``manage.py up``: prepare, then become the supervisor of the panel's processes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, NoReturn

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError, connections

from rigpanel import compiling, preflight, prepare, processes
from rigpanel.environment import ConfigError
from rigpanel.herald import announce

STARTED = time.monotonic()


class Command(BaseCommand):
    help = "Start the panel and stay in front. Ctrl-C stops it and leaves engines running."
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--prepare-only", action="store_true", help="database and static files; start nothing")
        parser.add_argument("--only", metavar="NAMES", help="of the processes only these, say control,verify,sampler")

    def handle(self, *args: Any, **options: Any) -> None:
        # Nobody listens yet, and the store is not up yet: what seeding would tell open pages goes nowhere.
        logging.getLogger("apps.common.realtime").setLevel(logging.ERROR)
        chosen = self.chosen(options["only"])
        try:
            lock = preflight.take_lock()
            self.end_leftovers()
            preflight.check_ports(chosen)
            preflight.check_store()
            preflight.check_database()
            compiled = None if options["prepare_only"] else compiling.begin()
            # A rig that joins finds a database that the panel's own machine looks after.
            setup_path = self.prepare() if options["prepare_only"] or "web" in chosen else None
            if options["prepare_only"]:
                self.say(
                    "prepared" if not setup_path else f"prepared; first account: {settings.PUBLIC_URL}{setup_path}"
                )
                return
            config = processes.write_config(os.getpid(), chosen)
        except (preflight.NotStarted, ConfigError) as error:
            self.fail(str(error))
        except DatabaseError as error:
            self.fail(f"The database said no: {str(error).strip().splitlines()[0]}")
        except OSError as error:
            self.fail(f"{error.filename or 'A file'}: {error.strerror}. Nothing was started.")
        compiling.finish(compiled)
        self.become_supervisor(lock, config, setup_path, announce_it="web" in chosen)

    def chosen(self, only: str | None) -> list[str]:
        known = [p.name for p in processes.programs()]
        if only is None:
            return known
        names = [name.strip() for name in only.split(",") if name.strip()]
        if not names or not set(names) <= set(known):
            raise CommandError(f"--only takes some of {', '.join(known)}.", returncode=2)
        return names

    def end_leftovers(self) -> None:
        left = preflight.end_leftovers()
        if left:
            self.say(f"ended what an earlier start left running: {', '.join(left)}")

    def prepare(self) -> str | None:
        prepare.migrate(self.say)
        prepare.collect_static(self.say)
        prepare.load_shipped(self.say)
        return prepare.first_owner(self.say)

    def become_supervisor(self, lock: int, config: Path, setup_path: str | None, *, announce_it: bool) -> NoReturn:
        connections.close_all()
        self.say(f"starting rigpanel {settings.VERSION}")
        processes.remember("supervisor", os.getpid())
        if announce_it and os.fork() == 0:
            os.close(lock)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            announce(STARTED, setup_path)
            os._exit(0)
        preflight.keep_lock_through_exec(lock)
        # What was needed to make the first owner is nobody's business any more.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RIGPANEL_ADMIN_")}
        # Six processes that compile every module anew at each start would take seconds longer (measured: 10 against 7).
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        os.chdir(settings.BASE_DIR)
        argv = [sys.executable, processes.LEAN, "-W", "ignore", "-m", "supervisor.supervisord", "-c", str(config)]
        os.execve(sys.executable, argv, environment)  # noqa: S606

    def say(self, text: str) -> None:
        print(f"rigpanel: {text}", flush=True)

    def fail(self, sentence: str) -> NoReturn:
        print(f"rigpanel: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1)
