"""Which driver a rig gets: the rule behind ``RIGPANEL_HARDWARE``.

A laptop without an NVIDIA card gets the simulated rig. A machine with one, or a rig that ever
ran NVML, never does: there a missing driver is an error that somebody must see, and four healthy
simulated cards would hide it.
"""

from __future__ import annotations

from pathlib import Path

from apps.hardware.protocol import GpuDriver, HardwareError

_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"  # PCI base class 3: VGA (0x0300xx) and 3D controllers (0x0302xx)


def nvidia_device_present(sysfs_root: str | Path = "/sys") -> bool:
    """Whether an NVIDIA display or 3D controller is on the PCI bus, driver or no driver."""
    devices = Path(sysfs_root, "bus", "pci", "devices")
    try:
        found = sorted(devices.iterdir())
    except OSError:  # no PCI bus at all, as in some containers and on small ARM boards
        return False
    return any(
        _attribute(device, "vendor") == _NVIDIA_VENDOR and _attribute(device, "class").startswith(_DISPLAY_CLASS)
        for device in found
    )


def choose_driver(setting: str, *, ran_nvml_before: bool, sysfs_root: str | Path = "/sys") -> str:
    """Turn the setting into ``nvml``, ``simulated`` or ``replay:FILE``.

    ``ran_nvml_before``: this rig has been read through NVML at least once, so its cards are real
    even if the bus shows none now. Raises HardwareError for a setting that is none of the allowed.
    """
    setting = setting.strip()
    if setting == "auto":
        real = ran_nvml_before or nvidia_device_present(sysfs_root)
        return "nvml" if real else "simulated"
    if setting in ("nvml", "simulated"):
        return setting
    if setting.startswith("replay:") and setting != "replay:":
        return setting
    raise HardwareError(
        f"RIGPANEL_HARDWARE is {setting!r:.60}, which names no driver. "
        "Use auto, nvml, simulated or replay:FILE with the path of a recording."
    )


def open_driver(choice: str, *, rig_name: str = "simulated") -> GpuDriver:
    """Make the driver that ``choose_driver`` named; ``rig_name`` gives simulated cards their UUIDs.

    Raises HardwareError when a recording cannot be read; the NVML driver is reached only with its
    first call.
    """
    # Imported where needed: only a real rig loads NVIDIA's binding.
    if choice == "nvml":
        from apps.hardware.nvml import NvmlDriver

        return NvmlDriver()
    if choice == "simulated":
        from apps.hardware.simulated import SimulatedDriver, SimulatedRig

        return SimulatedDriver(SimulatedRig(name=rig_name))
    if choice.startswith("replay:"):
        from apps.hardware.replay import ReplayDriver

        return ReplayDriver(choice.removeprefix("replay:"))
    raise HardwareError(f"{choice!r:.60} is not a driver; use nvml, simulated or replay:FILE.")


def _attribute(device: Path, name: str) -> str:
    try:
        return (device / name).read_text().strip().lower()
    except (OSError, UnicodeDecodeError):
        return ""
