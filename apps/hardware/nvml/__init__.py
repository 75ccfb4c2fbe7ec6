"""The driver for real NVIDIA cards; ``calls`` is the only module of the panel that imports ``pynvml``."""

from apps.hardware.nvml.driver import NvmlDriver

__all__ = ["NvmlDriver"]
