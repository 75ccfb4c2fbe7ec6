"""The rule for RIGPANEL_HARDWARE: never four healthy fakes where real cards are or were."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.hardware.detect import choose_driver, nvidia_device_present, open_driver
from apps.hardware.protocol import HardwareError


def put(root: Path, address: str, vendor: str, device_class: str) -> Path:
    device = root / "bus" / "pci" / "devices" / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{device_class}\n")
    return root


@pytest.mark.parametrize("device_class", ["0x030000", "0x030200"])
def test_an_nvidia_card_on_the_bus_is_seen(tmp_path: Path, device_class: str) -> None:
    put(tmp_path, "0000:00:1f.0", "0x8086", "0x060100")
    assert nvidia_device_present(put(tmp_path, "0000:09:00.0", "0x10de", device_class))


@pytest.mark.parametrize(
    ("vendor", "device_class"),
    [("0x10de", "0x040300"), ("0x1002", "0x030000"), ("0x8086", "0x030000")],
    ids=["the sound device of an NVIDIA card alone", "an AMD card", "an Intel card"],
)
def test_other_devices_are_not_nvidia_cards(tmp_path: Path, vendor: str, device_class: str) -> None:
    assert not nvidia_device_present(put(tmp_path, "0000:09:00.0", vendor, device_class))


def test_a_device_without_readable_attributes_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "bus" / "pci" / "devices" / "0000:00:00.0").mkdir(parents=True)
    assert not nvidia_device_present(tmp_path)


def test_a_machine_without_a_pci_bus_has_no_card(tmp_path: Path) -> None:
    assert not nvidia_device_present(tmp_path)


def test_auto_simulates_where_no_card_is_or_ever_was(tmp_path: Path) -> None:
    assert choose_driver("auto", ran_nvml_before=False, sysfs_root=tmp_path) == "simulated"


def test_auto_reads_a_card_on_the_bus(tmp_path: Path) -> None:
    put(tmp_path, "0000:09:00.0", "0x10de", "0x030000")
    assert choose_driver("auto", ran_nvml_before=False, sysfs_root=tmp_path) == "nvml"


def test_auto_never_simulates_on_a_rig_that_once_had_cards(tmp_path: Path) -> None:
    assert choose_driver("auto", ran_nvml_before=True, sysfs_root=tmp_path) == "nvml"


@pytest.mark.parametrize("setting", ["nvml", "simulated", "replay:rig.jsonl"])
def test_a_named_driver_is_taken_at_its_word(tmp_path: Path, setting: str) -> None:
    put(tmp_path, "0000:09:00.0", "0x10de", "0x030000")
    assert choose_driver(f" {setting} ", ran_nvml_before=True, sysfs_root=tmp_path) == setting


@pytest.mark.parametrize("setting", ["", "real", "AUTO", "replay:", "replay"])
def test_any_other_setting_is_refused_with_what_is_allowed(tmp_path: Path, setting: str) -> None:
    with pytest.raises(HardwareError, match="auto, nvml, simulated or replay:FILE"):
        choose_driver(setting, ran_nvml_before=False, sysfs_root=tmp_path)


def test_each_choice_opens_its_driver() -> None:
    sample = Path(__file__).parents[2] / "apps" / "hardware" / "samples" / "sim-4x3090.jsonl"
    assert open_driver("nvml").source == "nvml"
    assert open_driver("simulated").source == "simulated"
    assert open_driver(f"replay:{sample}").source == "replay"
    with pytest.raises(HardwareError, match="not a driver"):
        open_driver("auto")


def test_simulated_cards_take_their_identity_from_the_rig() -> None:
    attic, cellar = (open_driver("simulated", rig_name=name).inventory() for name in ("attic", "cellar"))
    assert {gpu.uuid for gpu in attic.gpus}.isdisjoint(gpu.uuid for gpu in cellar.gpus)
