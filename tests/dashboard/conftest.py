from __future__ import annotations

from tests.telemetry.conftest import live_store, valkey_server

__all__ = ["live_store", "valkey_server"]
