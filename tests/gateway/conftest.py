"""A real gateway process on the tests' own database, engines of ours behind it, and people with keys."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import uvicorn
from django.conf import settings
from django.db import connection
from django.utils import timezone

from apps.accounts.services import key_create
from apps.common.actors import actor_of
from apps.common.models import Epoch
from apps.deployments import routes
from apps.deployments.models import Deployment, Replica, Status
from apps.gateway.application import Gateway
from apps.gateway.limits import Limits
from apps.gateway.observer import Observer
from apps.gateway.server import GatewayProtocol
from tests.factories.profiles import simulated_profile
from tests.gateway.helpers import Answer, Engine, LoopThread, ask, free_port, until

ROOT = Path(__file__).resolve().parents[2]


GIVEN_REDIS = "RIGPANEL_TEST_REDIS_URL" in os.environ


class GatewayProcess:
    """``python -m apps.gateway`` with the environment that leads it to the tests' database."""

    def __init__(self, **environment: str) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="rp-gw-", dir="/tmp"))
        self.log = self.folder / "gateway.log"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("RIGPANEL_", "DJANGO_"))},
            "RIGPANEL_DATA_DIR": str(self.folder),
            "RIGPANEL_PORT": "1",  # not listened on; only must differ
            "RIGPANEL_GATEWAY_PORT": str(self.port),
            "RIGPANEL_API_KEY_PEPPER": settings.API_KEY_PEPPER,
            "RIGPANEL_RIG": "bench-01",
            # The suite on SQLite shows that it needs no store, the one on Redis that the store's hints come.
            "RIGPANEL_REDIS_URL": settings.REDIS_URL if GIVEN_REDIS else "unix:///tmp/rp-no-store.sock",
            "PYTHONUNBUFFERED": "1",
            "RIGPANEL_USAGE_UNREAD_S": "3600",  # a process that outlives tests must not write into their database
            **environment,
        }
        database = connection.settings_dict
        if connection.vendor == "sqlite":
            (self.folder / "rigpanel.sqlite3").symlink_to(database["NAME"])
        else:
            who = f"{quote(database['USER'])}:{quote(database['PASSWORD'])}"
            where = f"{quote(database['HOST'], safe='')}:{database['PORT'] or 5432}"
            self.environment["RIGPANEL_DATABASE_URL"] = f"postgres://{who}@{where}/{database['NAME']}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "apps.gateway"], cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )
        until(self.answers, f"the gateway did not come up; its log: {self.log.read_text()[-2000:]}")

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        try:
            return self.ask("GET", "/healthz").status == 200
        except OSError:
            return False

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop_only(self) -> None:
        """Its folder stays."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self) -> None:
        self.stop_only()
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        return ask(self.port, method, path, body, **more)

    def metric(self, name: str) -> float | None:
        """The value of a sample, with its labels as they are written; None when there is none."""
        for line in self.ask("GET", "/metrics").body.decode().splitlines():
            sample, _, value = line.rpartition(" ")
            if sample == name:
                return float(value)
        return None

    @property
    def resident_bytes(self) -> float:
        value = self.metric("rigpanel_gateway_resident_memory_bytes")
        assert value is not None
        return value


class House:
    """What stands behind the gateway: changes routes as deployments does, and waits until they are applied."""

    def __init__(self, rig: Any, loop: LoopThread) -> None:
        self.rig = rig
        self.loop = loop
        self.engines: list[Engine] = []

    def engine(self, model: str, **more: Any) -> Engine:
        engine = Engine(model, key=f"engine-key-{len(self.engines)}", **more)
        self.loop.run(engine.start())
        self.engines.append(engine)
        return engine

    def deploy(self, served_name: str, *engines: Engine) -> Deployment:
        """A ready deployment with these engines as its replicas; no route yet."""
        slug = f"{served_name}-{Deployment.objects.count()}".lower()
        deployment = Deployment.objects.create(
            rig=self.rig, version=simulated_profile(slug).current, served_name=served_name, status=Status.READY
        )
        for index, engine in enumerate(engines):
            Replica.objects.create(
                deployment=deployment,
                index=index,
                launch_id=f"d{deployment.pk}-r{index}",
                host="127.0.0.1",
                port=engine.port,
                base_url=engine.base_url,
                engine_key=engine.key,
                healthy=True,
            )
        return deployment

    def serve(self, gateway: GatewayProcess, served_name: str, *engines: Engine) -> Deployment:
        deployment = self.deploy(served_name, *engines)
        routes.open_to(deployment)
        self.applied(gateway)
        return deployment

    def retire(self, deployment: Deployment) -> None:
        """Its engines are gone and their ports are free."""
        deployment.replicas.update(released_at=timezone.now(), healthy=False)

    def applied(self, gateway: GatewayProcess) -> None:
        """Wait until the gateway goes by the present routes and keys."""
        for name in ("routes", "keys"):
            epoch = Epoch.current(name)
            sample = f'rigpanel_gateway_epoch{{name="{name}"}}'
            until(lambda s=sample, e=epoch: gateway.metric(s) == e, f"{name} epoch {epoch} was not applied")  # type: ignore[misc]


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="package")
def shared_process(django_db_setup: None, django_db_blocker: Any) -> Iterator[GatewayProcess]:
    """One process for all tests here that do not end it: they differ by random epochs. Other packages' tests must not
    meet it: it reports itself into the database that they look into."""
    process = GatewayProcess()
    process.start()
    yield process
    process.stop()
    with django_db_blocker.unblock():  # what it reported after the last test's tables were emptied
        routes.GatewayProcess.objects.all().delete()


@pytest.fixture
def house(transactional_db: None, rig: Any, loop_thread: LoopThread) -> Iterator[House]:
    for name in ("routes", "keys"):
        # After another test's tables were emptied the same small numbers would mean other routes.
        Epoch.objects.create(name=name, value=random.randrange(10**6, 10**12))
    house = House(rig, loop_thread)
    yield house
    for engine in house.engines:
        loop_thread.run(engine.release())
        loop_thread.run(engine.stop())


@pytest.fixture
def bobs_key(house: House, bob: Any) -> str:
    return key_create(bob, name="laptop", actor=actor_of(bob))[1]


@pytest.fixture
def gateway(house: House, bobs_key: str, shared_process: GatewayProcess) -> GatewayProcess:
    house.applied(shared_process)
    return shared_process


@pytest.fixture
def own_process(house: House) -> Iterator[Callable[..., GatewayProcess]]:
    """Starts processes that a test may end."""
    started: list[GatewayProcess] = []

    def start(**environment: str) -> GatewayProcess:
        process = GatewayProcess(**environment)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.stop()


@pytest.fixture
def within(house: House, loop_thread: LoopThread) -> Iterator[Callable[..., Any]]:
    """Starts a gateway inside of the test's process, with shortened limits, behind a real uvicorn."""
    servers: list[tuple[uvicorn.Server, Any]] = []

    def start(observer: Observer | None = None, **limits: Any) -> Any:
        gateway = Gateway(Limits(**limits), observer)
        config = uvicorn.Config(
            gateway, port=free_port(), http=GatewayProtocol, ws="none", lifespan="on", log_config=None, access_log=False
        )
        server = uvicorn.Server(config)
        servers.append((server, loop_thread.spawn(server.serve())))
        until(lambda: server.started, "the server did not start")
        return Within(gateway, config.port)

    yield start
    for server, served in servers:
        server.should_exit = True
        served.result(60)


class Within:
    def __init__(self, gateway: Gateway, port: int) -> None:
        self.gateway = gateway
        self.port = port

    def ask(self, method: str, path: str, body: Any = None, **more: Any) -> Answer:
        return ask(self.port, method, path, body, **more)

    def metric(self, name: str) -> float | None:
        return GatewayProcess.metric(self, name)  # type: ignore[arg-type]
