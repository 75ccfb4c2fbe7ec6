"""How a higher app, which keeps something about a key, learns that another takes its place."""

from __future__ import annotations

from django.dispatch import Signal

key_rotated = Signal()  # old, new, actor; sent inside the transaction that makes the new one
