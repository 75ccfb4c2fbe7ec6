"""The cast (alice owns, olivia operates, bob is a member, charlie only looks) and their rig."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no failure: what a property test took of the clock says nothing about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


# The tests of a group keep to one worker, which so starts their panel once. A group is a file, but for those that share
# a panel over several. The longest begin first: the workers then end at about the same time.
LONGEST_FIRST = ("real-panel", "tests/chaos/test_chaos.py", "e2e", "vllm-panel", "tests/real/test_ray_serve.py")
PLAIN_FOLDERS = ("contracts", "engines", "hardware", "profiles", "runners")


@pytest.hookimpl(wrapper=True)  # marks before ``-m`` chooses; sorts after pytest-django did
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """A test is marked by the folder it lies in, so that none is forgotten. Nightly ones are left out, not skipped:
    in CI a skipped real test is a failure."""
    if os.environ.get("RIGPANEL_NIGHTLY") != "1":
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        if nightly:
            config.hook.pytest_deselected(items=nightly)
            items[:] = [item for item in items if item not in nightly]
    for item in items:
        folder = _folder(item)
        if folder in ("real", "e2e", "processes"):
            item.add_marker(folder)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item, folder)))
        if folder in PLAIN_FOLDERS and not _touches_the_store(item):
            item.add_marker("plain")
    yield
    if getattr(config.option, "loadgroup", False) and not all("@" in item.nodeid for item in items):
        raise pytest.UsageError(
            "pytest-xdist does not keep the tests of a group together with this pytest: every worker would start all "
            "of the panels. Run `make setup-dev`, which installs versions that go together."
        )
    items.sort(key=_rank)


def _folder(item: pytest.Item) -> str:
    return item.nodeid.split("/")[1] if item.nodeid.startswith("tests/") else ""


def _group(item: pytest.Item, folder: str) -> str:
    if folder == "e2e":
        return "e2e"  # one panel and one browser for all of them
    if folder == "real" and "panel" in getattr(item, "fixturenames", ()):
        return "real-panel"  # likewise the panel with the starter engine
    return item.nodeid.partition("::")[0]


def _rank(item: pytest.Item) -> int:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    if mark.args[0] in LONGEST_FIRST:
        return LONGEST_FIRST.index(mark.args[0])
    return len(LONGEST_FIRST) + (_folder(item) not in ("real", "processes"))


def _touches_the_store(item: pytest.Item) -> bool:
    return item.get_closest_marker("django_db") is not None or "db" in getattr(item, "fixturenames", ())


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """In CI a skipped real or browser test is a failure: there everything they need is installed."""
    outcome: Any = yield
    report = outcome.get_result()
    if not (report.skipped and os.environ.get("RIGPANEL_REQUIRE_REAL") == "1") or hasattr(report, "wasxfail"):
        return
    if item.nodeid.startswith(("tests/real/", "tests/e2e/")):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and RIGPANEL_REQUIRE_REAL=1 forbids that: {report.longrepr}"


@pytest.fixture(autouse=True, scope="session")
def _flush_past_append_only_triggers() -> None:
    """On SQLite Django empties tables with DELETE after a transactional test, which the append-only
    triggers rightly forbid: take them away for the flush and put the same ones back."""
    from django.db import connection

    if connection.vendor != "sqlite":
        return
    original = connection.ops.execute_sql_flush

    def execute_sql_flush(sql_list: list[str]) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'")
            triggers = cursor.fetchall()
            for name, _ in triggers:
                cursor.execute(f"DROP TRIGGER {name}")
        try:
            original(sql_list)
        finally:
            with connection.cursor() as cursor:
                for _, sql in triggers:
                    cursor.execute(sql)

    connection.ops.execute_sql_flush = execute_sql_flush


@pytest.fixture(autouse=True, scope="module")
def _no_engine_is_left() -> Iterator[None]:
    """An engine that a test leaves would hold cards and ports of all later ones."""
    yield
    ours = os.path.join(os.environ["RIGPANEL_DATA_DIR"], "engines", "")
    left = {
        p.pid: p.info["cmdline"] for p in psutil.process_iter(["cmdline"]) if ours in " ".join(p.info["cmdline"] or [])
    }
    for pid in left:
        os.killpg(pid, signal.SIGKILL)
    assert not left, f"engines that were started here and not stopped: {left}"


def _person(email: str, role: str) -> Any:
    from apps.accounts.models import User

    name = email.partition("@")[0]
    return User.objects.create_user(email, f"{name}-secret-1", role=role, name=name)


@pytest.fixture
def alice(db: None) -> Any:
    return _person("alice@lab.example", "owner")


@pytest.fixture
def olivia(db: None) -> Any:
    return _person("olivia@lab.example", "operator")


@pytest.fixture
def bob(db: None) -> Any:
    return _person("bob@lab.example", "member")


@pytest.fixture
def charlie(db: None) -> Any:
    return _person("charlie@lab.example", "viewer")


@pytest.fixture
def rig(db: None) -> Any:
    """A simulated rig ``bench-01`` with four RTX 3090s, bridged 0-1 and 2-3."""
    from tests.factories.rigs import quad_3090

    return quad_3090()


@pytest.fixture
def run_on_commit(django_capture_on_commit_callbacks: Any) -> Any:
    """``with run_on_commit(): …`` runs what was left for after commit."""
    return lambda: django_capture_on_commit_callbacks(execute=True)
