"""The compose file, as far as a machine without a container engine can check it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rigpanel.processes import programs

ROOT = Path(__file__).resolve().parent.parent.parent
OF_THE_RIG = (
    "RIGPANEL_HARDWARE",
    "RIGPANEL_RUNNER",
    "RIGPANEL_ENGINE_PORTS",
    "RIGPANEL_ENGINE_BIND",
    "RIGPANEL_ENGINE_ADVERTISE",
    "RIGPANEL_VLLM",
    "RIGPANEL_RAY",
    "RIGPANEL_LLAMA_SERVER",
)
TEXT = (ROOT / "docker-compose.yml").read_text()


@pytest.fixture
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(TEXT)["services"])


def test_everything_that_design_names_is_a_service(services: dict[str, Any]) -> None:
    assert {"web", "gateway", "beat", "rig", "postgres", "redis", "open-webui"} <= set(services)


def test_each_process_of_the_panel_is_started_as_up_starts_it(services: dict[str, Any]) -> None:
    started = {
        program.name: list(program.argv[program.argv.index("-m") :]) for program in programs() if "-m" in program.argv
    }
    for name in ("web", "gateway", "beat"):
        assert services[name]["command"] == started[name], name
    rig = (ROOT / "deploy" / "rig.sh").read_text()
    assert {"web", "gateway", "beat", "store"} | set(re.findall(r"--only (\S+)", rig)[0].split(",")) == {
        program.name for program in programs()
    }


def test_whatever_can_be_set_reaches_the_services(services: dict[str, Any]) -> None:
    """From .env, which compose reads for itself: a container gets only what is named."""
    documents = "".join((ROOT / "docs" / name).read_text() for name in ("operations.md", "gateway.md"))
    rows = [line.split("|")[1] for line in documents.splitlines() if line.startswith("| `RIGPANEL_")]
    known = {name for row in rows for name in re.findall(r"RIGPANEL_[A-Z_]+", row)}
    inside = {"RIGPANEL_HOST", "RIGPANEL_PORT", "RIGPANEL_GATEWAY_PORT", "RIGPANEL_DATA_DIR"}  # the containers' own
    for_all = known - inside - set(OF_THE_RIG) - {"RIGPANEL_ADMIN_EMAIL", "RIGPANEL_ADMIN_PASSWORD"}
    for name in ("prepare", "web", "gateway", "beat", "rig"):
        assert for_all - set(services[name]["environment"]) == set(), name
    assert set(OF_THE_RIG) - set(services["rig"]["environment"]) == set()


def test_pages_gateway_and_rig_look_at_the_same_weights_and_secrets(services: dict[str, Any]) -> None:
    shared = {"models:/models", "secrets:/data/secrets"}
    for name in ("prepare", "web", "gateway", "rig"):
        assert shared <= set(services[name]["volumes"]), name
        assert services[name]["environment"]["RIGPANEL_MODELS_DIR"] == "/models"
    # A volume belongs at first to whom its folder in the image does.
    made = re.search(r"install -d -o rigpanel -g rigpanel -m 700 (.*)", (ROOT / "Dockerfile").read_text())
    assert made is not None
    assert {"/data", "/data/secrets", "/models", "/release"} <= set(made[1].split())


def test_an_upgrade_of_the_panel_changes_nothing_in_the_rigs_definition(services: dict[str, Any]) -> None:
    """Compose recreates a container when its definition or image changed; the engines live in this one."""
    rig = services["rig"]
    assert "build" not in rig
    assert "rigpanel" not in rig["image"]
    assert re.fullmatch(r"python:\d+\.\d+-slim-\w+", rig["image"])
    # The code's environment was made for the same Python at the same place.
    assert f"FROM {rig['image']}" in (ROOT / "Dockerfile").read_text()
    assert not any(volume.startswith("./") for volume in rig["volumes"])


def test_no_engine_port_and_no_store_is_published(services: dict[str, Any]) -> None:
    published = {name for name, service in services.items() if service.get("ports")}
    assert published == {"web", "gateway", "open-webui"}
    for name in published:
        assert all(port.startswith("${RIGPANEL_BIND:-127.0.0.1}:") for port in services[name]["ports"])


def test_no_secret_has_a_value_in_the_file() -> None:
    for name in ("POSTGRES_PASSWORD", "RIGPANEL_ADMIN_PASSWORD", "OPENWEBUI_GATEWAY_KEY", "HF_TOKEN"):
        assert all(use in (":-}", ":?set it in .env}") for use in re.findall(rf"\$\{{{name}(.*?\}})", TEXT)), name


def test_every_dependency_and_volume_is_defined(services: dict[str, Any]) -> None:
    volumes = set(yaml.safe_load(TEXT)["volumes"])
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= volumes


@pytest.mark.parametrize("script", ["rig.sh", "release.sh"])
def test_the_scripts_are_valid_for_a_plain_shell(script: str) -> None:
    subprocess.run([shutil.which("dash") or "sh", "-n", str(ROOT / "deploy" / script)], check=True)
