"""What higher apps answer."""

from __future__ import annotations

from django.dispatch import Signal

# ``deployment_ids``; answers ``{name of a person: running answers}``.
streams_asked = Signal()
