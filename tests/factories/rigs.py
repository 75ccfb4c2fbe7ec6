"""Rigs and cards for tests."""

from __future__ import annotations

import factory
from factory.django import DjangoModelFactory

from apps.rigs.models import Gpu, Link, Rig


class RigFactory(DjangoModelFactory[Rig]):
    class Meta:
        model = Rig
        django_get_or_create = ("slug",)

    slug = "bench-01"
    hardware_source = "simulated"
    driver_version = "610.43"
    host_memory_bytes = 128 * 2**30


class GpuFactory(DjangoModelFactory[Gpu]):
    class Meta:
        model = Gpu

    rig = factory.SubFactory(RigFactory)
    index = factory.Sequence(lambda n: n)
    uuid = factory.LazyAttribute(lambda o: f"GPU-{o.rig.slug}-{o.index}")
    name = "NVIDIA GeForce RTX 3090"
    memory_total_bytes = 24 * 2**30
    pcie_width_max = 16
    pcie_gen_max = 4


def quad_3090(slug: str = "bench-01", pairs: tuple[tuple[int, int], ...] = ((0, 1), (2, 3))) -> Rig:
    rig = RigFactory(slug=slug)
    gpus = [GpuFactory(rig=rig, index=i) for i in range(4)]
    for first, second in pairs:
        Link.objects.create(
            rig=rig,
            first=gpus[first],
            second=gpus[second],
            active_lanes=4,
            total_lanes=4,
            gigabytes_per_second_per_lane=14.0625,
        )
    return rig
