"""The compose file, as far as a machine without a container engine can check it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "docker-compose.yml").read_text()


@pytest.fixture
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(TEXT)["services"])


def test_everything_that_design_names_is_a_service(services: dict[str, Any]) -> None:
    assert {"web", "gateway", "beat", "rig", "postgres", "redis", "open-webui"} <= set(services)


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
