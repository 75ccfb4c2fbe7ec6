"""The guards are tested on the same simulated rig as deployments are."""

from __future__ import annotations

from tests.deployments.conftest import sim_rig

__all__ = ["sim_rig"]
