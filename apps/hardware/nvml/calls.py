"""The calls into NVIDIA's library. The only module that imports ``pynvml``.

What a card refuses is ``None``. Refusals come in several kinds: a GeForce says "not supported" to
memory temperature and ECC, a passively cooled H200 says "invalid argument" to its fan speed, a
card in a virtual machine says either to NVLink. Being refused is not free (0.6 ms for the fan of
an H200), so a refused call rests for a minute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pynvml

from apps.hardware.protocol import HardwareError

_REFUSED_SECONDS = 60.0
_DRIVER_GONE = (pynvml.NVML_ERROR_UNINITIALIZED, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
_REFUSALS = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_DEPRECATED,
)

THROTTLE_BITS = (
    (pynvml.nvmlClocksEventReasonGpuIdle, "gpu_idle"),
    (pynvml.nvmlClocksEventReasonApplicationsClocksSetting, "applications_clocks"),
    (pynvml.nvmlClocksEventReasonSwPowerCap, "sw_power_cap"),
    (pynvml.nvmlClocksEventReasonHwSlowdown, "hw_slowdown"),
    (pynvml.nvmlClocksEventReasonSyncBoost, "sync_boost"),
    (pynvml.nvmlClocksEventReasonSwThermalSlowdown, "sw_thermal"),
    (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "hw_thermal"),
    (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "hw_power_brake"),
    (pynvml.nvmlClocksEventReasonDisplayClockSetting, "display_clocks"),
)

# By NVML_VALUE_TYPE_*: the member of the value union that holds the number.
_VALUE_MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")

Field = tuple[int, int]  # NVML field id, scope (the lane; 0 where the field has none)

POWER_INSTANT: Field = (pynvml.NVML_FI_DEV_POWER_INSTANT, 0)
POWER_AVERAGE: Field = (pynvml.NVML_FI_DEV_POWER_AVERAGE, 0)
MEMORY_TEMPERATURE: Field = (pynvml.NVML_FI_DEV_MEMORY_TEMP, 0)
PCIE_TX: Field = (pynvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, 0)
PCIE_RX: Field = (pynvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, 0)

TEMPERATURE_CORE = pynvml.NVML_TEMPERATURE_GPU
THRESHOLD_SLOWDOWN = pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
THRESHOLD_SHUTDOWN = pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN
CLOCK_SM = pynvml.NVML_CLOCK_SM
CLOCK_MEMORY = pynvml.NVML_CLOCK_MEM
MEMORY_INFO_V2 = pynvml.nvmlMemory_v2
ENABLED = pynvml.NVML_FEATURE_ENABLED
PERFORMANCE_STATE_UNKNOWN = pynvml.NVML_PSTATE_UNKNOWN
NVLINK_LANES_MAX = pynvml.NVML_NVLINK_MAX_LINKS
NVLINK_SWITCH = pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH  # what a lane's far end is


def nvlink_sent(lane: int) -> Field:
    """Counter in KiB."""
    return (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, lane)


def nvlink_received(lane: int) -> Field:
    """Counter in KiB."""
    return (pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, lane)


def nvlink_speeds(lane: int) -> list[Field]:
    """Fields with a lane's speed in MB/s, best first: one per lane up to 5, a scoped one on Hopper, a common one."""
    scoped: list[Field] = [
        (pynvml.NVML_FI_DEV_NVLINK_GET_SPEED, lane),
        (pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON, 0),
    ]
    return [(pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_L0 + lane, 0), *scoped] if lane <= 5 else scoped


class LostError(Exception):
    """This card fell off the bus."""


class DriverGoneError(Exception):
    """The driver was unloaded under us."""


class Handle:
    """One card: calls to it, and what it refused lately."""

    def __init__(self, index: int, uuid: str, device: Any, monotonic: Callable[[], float], library: Any) -> None:
        self.index = index
        self.uuid = uuid
        self._device = device
        self._monotonic = monotonic
        self._library = library
        self._refused_until: dict[object, float] = {}

    def ask(self, function: str, *arguments: Any) -> Any:
        """Call ``function`` for the card; ``None`` when it refuses. Raises LostError and DriverGoneError."""
        request = (function, arguments)
        if self._refused_until.get(request, float("-inf")) > self._monotonic():
            return None
        try:
            return getattr(self._library, function)(self._device, *arguments)
        except pynvml.NVMLError as error:
            self._note(request, error.value)
            return None

    def set_power_limit(self, milliwatts: int) -> int | None:
        """The error of the driver, or None when the limit is set. Raises LostError and DriverGoneError."""
        try:
            self._library.nvmlDeviceSetPowerManagementLimit(self._device, milliwatts)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise LostError from None
            if error.value in _DRIVER_GONE:
                raise DriverGoneError from None
            return int(error.value)
        return None

    def fields(self, wanted: Iterable[Field]) -> dict[Field, int]:
        """One call for many fields; those the card refuses are absent. Raises like ``ask``."""
        moment = self._monotonic()
        asked = [item for item in wanted if self._refused_until.get(item, float("-inf")) <= moment]
        if not asked:
            return {}
        try:
            values = self._library.nvmlDeviceGetFieldValues(self._device, asked)
        except pynvml.NVMLError as error:
            for item in asked:
                self._note(item, error.value)
            return {}
        answered = {}
        for item, value in zip(asked, values, strict=True):
            if value.nvmlReturn != pynvml.NVML_SUCCESS:
                self._note(item, value.nvmlReturn)
            elif value.valueType < len(_VALUE_MEMBERS):
                answered[item] = int(getattr(value.value, _VALUE_MEMBERS[value.valueType]))
        return answered

    def _note(self, request: object, error: int) -> None:
        if error == pynvml.NVML_ERROR_GPU_IS_LOST:
            raise LostError
        if error in _DRIVER_GONE:
            raise DriverGoneError
        if error in _REFUSALS:  # a timeout or "unknown error" may pass: those are asked again at once
            self._refused_until[request] = self._monotonic() + _REFUSED_SECONDS


class Nvml:
    """The library as a whole; ``library`` is pynvml or a stand-in with the same functions."""

    def __init__(self, monotonic: Callable[[], float], library: Any = pynvml) -> None:
        self._monotonic = monotonic
        self._library = library

    def connect(self) -> list[Handle]:
        """Initialise NVML and find the cards that answer; raises HardwareError when there are none."""
        try:
            self._library.nvmlInit()
        except pynvml.NVMLError as error:
            raise HardwareError(sentence(error.value)) from error
        try:
            count = self._library.nvmlDeviceGetCount()
            handles = [handle for index in range(count) if (handle := self._open(index)) is not None]
        except pynvml.NVMLError as error:
            self.disconnect()
            raise HardwareError(sentence(error.value)) from error
        if not handles:
            self.disconnect()
            raise HardwareError(
                "The NVIDIA driver runs but no card answers. See `nvidia-smi` and the kernel log "
                "(`dmesg | grep NVRM`); cards that fell off the bus need a full power cycle."
            )
        return handles

    def disconnect(self) -> None:
        try:
            self._library.nvmlShutdown()
        except pynvml.NVMLError:
            return  # it was gone already

    def _open(self, index: int) -> Handle | None:
        try:
            device = self._library.nvmlDeviceGetHandleByIndex(index)
            uuid = str(self._library.nvmlDeviceGetUUID(device))
            return Handle(index, uuid, device, self._monotonic, self._library)
        except pynvml.NVMLError as error:
            if error.value in _DRIVER_GONE:
                raise
            return None

    def driver_version(self) -> str | None:
        try:
            return str(self._library.nvmlSystemGetDriverVersion())
        except pynvml.NVMLError:
            return None

    def cuda_version(self) -> str | None:
        """The newest CUDA that the driver can run, such as 13.1."""
        try:
            version = int(self._library.nvmlSystemGetCudaDriverVersion())
        except pynvml.NVMLError:
            return None
        return f"{version // 1000}.{version % 1000 // 10}"


def power_limit_sentence(error: int) -> str:
    """Why a card does not take a power limit."""
    if error == pynvml.NVML_ERROR_NO_PERMISSION:
        return "The driver lets only root set power limits; run the panel's sampler as root, or set them at boot."
    if error == pynvml.NVML_ERROR_NOT_SUPPORTED:
        return "This card's power limit cannot be set."
    if error == pynvml.NVML_ERROR_INVALID_ARGUMENT:
        return "The driver does not accept this power limit."
    return f"The driver refused the power limit (NVML error {error})."


def sentence(error: int) -> str:
    """What happened, what it means, what to do, for an NVML error that keeps us from all cards."""
    if error == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND:
        return (
            "No card can be read: NVIDIA's library libnvidia-ml.so.1 is not installed. Install the NVIDIA driver, "
            "or set RIGPANEL_HARDWARE=simulated to work without cards."
        )
    if error in _DRIVER_GONE:
        return (
            "No card can be read: the NVIDIA kernel driver is not loaded. Try `sudo modprobe nvidia`; if that fails, "
            "see `dmesg | grep -i nvidia` (Secure Boot and kernel updates are the usual causes)."
        )
    if error == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return (
            "No card can be read: the loaded NVIDIA kernel driver and its library have different versions, "
            "as after a driver upgrade. Reboot the rig."
        )
    if error == pynvml.NVML_ERROR_NO_PERMISSION:
        return (
            "No card can be read: this user may not open the NVIDIA device files. "
            "See the permissions of /dev/nvidiactl and /dev/nvidia0."
        )
    return f"No card can be read: NVML answered error {error}. See `nvidia-smi` and `dmesg | grep NVRM`."


DRIVER_GONE_SENTENCE = sentence(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
