"""How an install tells higher apps what it brought: connect in ``AppConfig.ready``."""

from __future__ import annotations

from django.dispatch import Signal

weights_arrived = Signal()  # model_slug, rig_name, path, size_bytes
