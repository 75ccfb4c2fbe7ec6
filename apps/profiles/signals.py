"""How a higher app, which knows what runs, tells a profile's page what a switch to it would do."""

from __future__ import annotations

from django.dispatch import Signal

plan_asked = Signal()  # version, rig; a receiver answers with what templates/deployments/partials/plan.html shows
