"""Rigs and their cards, as the sampler last saw them."""

from __future__ import annotations

from django.db import models
from django.utils import timezone

CUDA_SHARE_IF_UNKNOWN = 23.55 / 24  # 24,112 MiB of 24,576 were read on a 3090-class card under driver 580


class Rig(models.Model):
    """One machine with GPUs; ``slug`` names its queues. ``ran_nvml`` remembers that real cards were
    seen here once: such a rig never turns into a simulation by itself."""

    slug = models.SlugField(max_length=63, unique=True)
    hardware_source = models.CharField(max_length=16, blank=True)  # nvml, simulated, replay
    hardware_error = models.TextField(blank=True)
    ran_nvml = models.BooleanField(default=False)
    driver_version = models.CharField(max_length=64, blank=True)
    cuda_version = models.CharField(max_length=32, blank=True)
    host_memory_bytes = models.BigIntegerField(null=True)
    cpu_count = models.IntegerField(null=True)
    power_supply_watts = models.IntegerField(null=True, default=1600)
    created_at = models.DateTimeField(default=timezone.now)
    inventory_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return self.slug

    @property
    def is_simulated(self) -> bool:
        return self.hardware_source == "simulated"

    @property
    def control_queue(self) -> str:
        return f"rig.{self.slug}.control"

    @property
    def verify_queue(self) -> str:
        return f"rig.{self.slug}.verify"


class Gpu(models.Model):
    """A card in its slot. One that is gone keeps its row with ``present`` false; ``retired_at`` is set
    once another card sits in its place or the rig's hardware became another (simulated, then real)."""

    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="gpus")
    index = models.IntegerField()
    uuid = models.CharField(max_length=64)
    name = models.CharField(max_length=100)
    memory_total_bytes = models.BigIntegerField(null=True)
    memory_reserved_bytes = models.BigIntegerField(null=True)
    pci_bus_id = models.CharField(max_length=32, blank=True)
    pcie_width_max = models.IntegerField(null=True)
    pcie_gen_max = models.IntegerField(null=True)
    numa_node = models.IntegerField(null=True)
    power_limit_default_watts = models.FloatField(null=True)
    power_limit_min_watts = models.FloatField(null=True)
    power_limit_max_watts = models.FloatField(null=True)
    temperature_slowdown_celsius = models.IntegerField(null=True)
    temperature_shutdown_celsius = models.IntegerField(null=True)
    compute_capability = models.CharField(max_length=8, blank=True)
    persistence_mode = models.BooleanField(null=True)
    present = models.BooleanField(default=True)
    retired_at = models.DateTimeField(null=True)
    last_seen_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["index", "id"]
        constraints = [models.UniqueConstraint(fields=["rig", "uuid"], name="one_row_per_card")]

    def __str__(self) -> str:
        return f"GPU {self.index}"

    @property
    def cuda_total_bytes(self) -> int | None:
        """What CUDA reports as the card's memory, which is what engines take their share of: the driver's total
        without what the driver keeps.

        Read on an H200: 143,771 MiB less 615 reserved are the 139.8 GiB that CUDA showed; a 3090 under driver 590
        reserves 450 of 24,576 MiB, which leaves 23.56 GiB. Where the driver does not tell, the 3090's share is taken.
        """
        if self.memory_total_bytes is None:
            return None
        if self.memory_reserved_bytes is None:
            return int(self.memory_total_bytes * CUDA_SHARE_IF_UNKNOWN)
        return self.memory_total_bytes - self.memory_reserved_bytes

    @property
    def short_name(self) -> str:
        return self.name.replace("NVIDIA", "").replace("GeForce", "").replace("RTX", "").strip()


class Link(models.Model):
    """A bridge between two cards; ``second`` is null when the far end was not reported."""

    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="links")
    first = models.ForeignKey(Gpu, on_delete=models.CASCADE, related_name="+")
    second = models.ForeignKey(Gpu, on_delete=models.CASCADE, null=True, related_name="+")
    active_lanes = models.IntegerField()
    total_lanes = models.IntegerField()
    gigabytes_per_second_per_lane = models.FloatField(null=True)

    def __str__(self) -> str:
        return f"{self.first} ↔ {self.second or 'unknown'}"

    @property
    def gigabytes_per_second(self) -> float | None:
        if self.gigabytes_per_second_per_lane is None:
            return None
        return self.active_lanes * self.gigabytes_per_second_per_lane
