"""The panel's own settings over a throw-away data directory and in-memory messages.

``RIGPANEL_TEST_DATABASE_URL`` and ``RIGPANEL_TEST_REDIS_URL`` run the same suite on PostgreSQL and Redis.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

from tests.panel import free_ports

_data_dir = tempfile.mkdtemp(prefix="rp-test-", dir="/tmp")
atexit.register(shutil.rmtree, _data_dir, ignore_errors=True)
# What this machine's environment or .env says about a real panel must not reach the tests. Set to nothing
# instead of removed: .env fills in what is missing.
for _name in list(os.environ):
    if _name.startswith("RIGPANEL_") and not _name.startswith(
        ("RIGPANEL_TEST_", "RIGPANEL_REQUIRE_", "RIGPANEL_NIGHTLY")
    ):
        del os.environ[_name]
_worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
_redis_url = os.environ.get("RIGPANEL_TEST_REDIS_URL", "")
_ports = free_ports(20)  # engines of two test runs on one machine must not meet
os.environ.update(
    RIGPANEL_DATA_DIR=_data_dir,
    RIGPANEL_ENGINE_PORTS=f"{_ports[0]}-{_ports[-1]}",
    RIGPANEL_RIG="bench-01",
    RIGPANEL_HARDWARE="simulated",
    RIGPANEL_HOST="127.0.0.1",
    RIGPANEL_PORT="8080",
    RIGPANEL_GATEWAY_PORT="8000",
    RIGPANEL_PUBLIC_URL="",
    RIGPANEL_EMAIL_URL="",
    RIGPANEL_ADMIN_EMAIL="",
    RIGPANEL_ADMIN_PASSWORD="",
    RIGPANEL_DATABASE_URL=os.environ.get("RIGPANEL_TEST_DATABASE_URL", ""),
    # A database number of its own for each half of a parallel run.
    RIGPANEL_REDIS_URL=f"{_redis_url.rstrip('/')}/{1 + int(_worker.removeprefix('gw'))}" if _redis_url else "",
)

from rigpanel.settings import *  # noqa: E402, F403

if _redis_url:
    CHANNEL_LAYERS["default"]["CONFIG"]["prefix"] = f"rigpanel-{_worker}"  # noqa: F405
else:
    CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
# Sign-in in nearly every test: a slow hash would cost minutes and prove nothing.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
CELERY_BROKER_URL = "memory://"
STATIC_ROOT.mkdir(exist_ok=True)  # noqa: F405 - whitenoise warns about a missing one, and warnings are errors here
