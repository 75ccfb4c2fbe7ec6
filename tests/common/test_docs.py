"""What the documents name exists: files, settings, commands, operations. What people can set is in the documents."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from django.core.management import get_commands

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
SETTING = re.compile(r"\bRIGPANEL_[A-Z_]*[A-Z]\b")
# Between the panel's own processes, its scripts and its tests; nobody sets them by hand.
INTERNAL = {
    "RIGPANEL_DEBUG", "RIGPANEL_ENGINE_KEY", "RIGPANEL_LAUNCH_ID", "RIGPANEL_NIGHTLY", "RIGPANEL_RELEASE",
    "RIGPANEL_REQUIRE_REAL", "RIGPANEL_SOURCE", "RIGPANEL_VENV", "RIGPANEL_WITHOUT_PAGES",
}  # fmt: skip
IN_EXAMPLES = {"RIGPANEL_KEY"}  # a variable of the reader's own shell
OF_COMPOSE = {"RIGPANEL_BIND"}  # read by docker-compose.yml alone
OF_TESTS = {"RIGPANEL_TEST_OPEN_WEBUI"}

document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def program_text() -> str:
    patterns = ("apps/**/*.py", "rigpanel/**/*.py", "deploy/*.sh", "bootstrap.py", "Makefile")
    return "\n".join(file.read_text() for pattern in patterns for file in ROOT.glob(pattern))


@pytest.fixture(scope="module")
def known_settings() -> set[str]:
    return set(SETTING.findall(program_text()))


@document
def test_every_link_leads_to_a_file(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text())
    assert [link for link in links if not (path.parent / link).exists()] == []


@document
def test_every_setting_that_is_named_exists(path: Path, known_settings: set[str]) -> None:
    named = (
        {name.removesuffix("_FILE") for name in SETTING.findall(path.read_text())} - IN_EXAMPLES - OF_COMPOSE - OF_TESTS
    )
    assert named - known_settings == set()


def test_every_setting_is_named_somewhere(known_settings: set[str]) -> None:
    named = set(SETTING.findall("\n".join(path.read_text() for path in DOCUMENTS)))
    assert known_settings - named - INTERNAL == set()


@document
def test_every_command_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    ours = {name for name, app in get_commands().items() if app.startswith(("apps.", "rigpanel")) or name == "check"}
    assert set(re.findall(r"manage\.py ([a-z]\w+)", text)) - ours == set()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)) - targets == set()


@document
def test_every_operation_that_is_named_exists(path: Path) -> None:
    operations = {
        (method.upper(), re.sub(r"\{\w+\}", "{}", address))
        for address, methods in json.loads((ROOT / "docs" / "openapi.json").read_text())["paths"].items()
        for method in methods
    }
    named = re.findall(r"\b(GET|POST|PUT|PATCH|DELETE) (/api/v1/[\w{}/-]*\w\}?)", path.read_text())
    assert [each for each in named if (each[0], re.sub(r"\{\w+\}|\b[A-Z]+\b", "{}", each[1])) not in operations] == []


def test_what_compose_sets_is_a_setting(known_settings: set[str]) -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in services.items():
        given = {key for key in service.get("environment", {}) if key.startswith("RIGPANEL_")}
        assert given - known_settings == set(), name
