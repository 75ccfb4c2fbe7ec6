"""All settings, from the environment (each also as ``NAME_FILE``, a ``.env`` file works)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import environ

from rigpanel import __version__
from rigpanel.environment import (
    ConfigError,
    data_directory,
    env,
    env_choice,
    env_database,
    env_email,
    env_networks,
    env_port,
    env_port_range,
    env_price,
    env_seconds,
    env_time_zone,
    env_url,
    rig_name,
    runtime_directory,
    store_urls,
    stored_secret,
)

BASE_DIR = Path(__file__).resolve().parent.parent
environ.Env.read_env(BASE_DIR / ".env") if (BASE_DIR / ".env").is_file() else None

VERSION = __version__
DEBUG = env("RIGPANEL_DEBUG") == "1"
TESTING = "pytest" in sys.modules

# --- the rig and the outside -------------------------------------------------------------------
DATA_DIR = data_directory(BASE_DIR)
RUNTIME_DIR = runtime_directory(DATA_DIR)
RIG_NAME = rig_name()
HOST = env("RIGPANEL_HOST", "127.0.0.1")
PORT = env_port("RIGPANEL_PORT", 8080)
GATEWAY_PORT = env_port("RIGPANEL_GATEWAY_PORT", 8000)
GATEWAY_WAIT_SECONDS = env_seconds("RIGPANEL_GATEWAY_WAIT_S", 120, most=3600)
# How long a gateway leaves its ledger to the control worker before it reads it into the database by itself.
USAGE_UNREAD_SECONDS = env_seconds("RIGPANEL_USAGE_UNREAD_S", 15, most=86400)
GATEWAY_DRAIN_SECONDS = env_seconds("RIGPANEL_GATEWAY_DRAIN_S", 5, most=3600)
if PORT == GATEWAY_PORT:
    raise ConfigError(f"RIGPANEL_PORT and RIGPANEL_GATEWAY_PORT are both {PORT}; give them different ports.")
_shown_host = "localhost" if HOST in ("0.0.0.0", "::", "127.0.0.1") else HOST  # noqa: S104
if HOST == "127.0.0.1":
    _shown_host = "127.0.0.1"
PUBLIC_URL = env_url("RIGPANEL_PUBLIC_URL", f"http://{_shown_host}:{PORT}")
GATEWAY_URL = env_url("RIGPANEL_GATEWAY_URL", f"http://{_shown_host}:{GATEWAY_PORT}")
TRUSTED_PROXIES = env_networks("RIGPANEL_TRUSTED_PROXIES")
# The words of apps.hardware.detect and apps.runners.registry; importing those costs each process half a megabyte.
HARDWARE = env_choice("RIGPANEL_HARDWARE", "auto", "auto", "nvml", "simulated", "replay:FILE")
RUNNER = env_choice("RIGPANEL_RUNNER", "auto", "auto", "process", "systemd")
ENGINE_PORTS = env_port_range("RIGPANEL_ENGINE_PORTS", "28100-28199")
ENGINE_BIND = env("RIGPANEL_ENGINE_BIND", "127.0.0.1")
ENGINE_ADVERTISE = env("RIGPANEL_ENGINE_ADVERTISE", ENGINE_BIND)
ENGINE_EXECUTABLES = {
    "vllm": env("RIGPANEL_VLLM"),
    "ray_serve": env("RIGPANEL_RAY"),
    "llama_cpp": env("RIGPANEL_LLAMA_SERVER"),
}
# Without it only open repositories can be downloaded. Read by download jobs alone.
HF_TOKEN = env("RIGPANEL_HF_TOKEN")
MODELS_DIR = Path(env("RIGPANEL_MODELS_DIR", str(DATA_DIR / "models"))).expanduser()
ENGINES_DIR = DATA_DIR / "engines"
INSTALLS_DIR = DATA_DIR / "installs"
USAGE_DIR = DATA_DIR / "usage"
ENERGY_PRICE = env_price("RIGPANEL_ENERGY_PRICE")  # of a kWh; None: pages show energy without money
ENERGY_CURRENCY = env("RIGPANEL_ENERGY_CURRENCY", "EUR")[:8]
PANEL_TIME_ZONE = env_time_zone("RIGPANEL_TIME_ZONE", "UTC")  # where days and months begin, for quotas and use
LOGS_DIR = DATA_DIR / "logs"
SAMPLER_SOCKET = RUNTIME_DIR / "sampler.sock"
STORE_SOCKET = RUNTIME_DIR / "store.sock"
STORE_EMBEDDED = not env("RIGPANEL_REDIS_URL")
_store = store_urls(env("RIGPANEL_REDIS_URL"), STORE_SOCKET)
REDIS_URL = _store["redis"]

# --- Django ------------------------------------------------------------------------------------
SECRET_KEY = env("RIGPANEL_SECRET_KEY") or stored_secret(DATA_DIR, "secret_key")
# API keys are stored as keyed hashes; a key of their own lets SECRET_KEY be rotated.
API_KEY_PEPPER = env("RIGPANEL_API_KEY_PEPPER") or stored_secret(DATA_DIR, "api_key_pepper")
ROOT_URLCONF = "rigpanel.urls"
ASGI_APPLICATION = "rigpanel.asgi.application"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_USER_MODEL = "accounts.User"
LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
USE_I18N = False

_public = urlsplit(PUBLIC_URL)
HTTPS = _public.scheme == "https"
ALLOWED_HOSTS = sorted({str(_public.hostname), "127.0.0.1", "localhost", "[::1]"})
if HOST not in ("0.0.0.0", "::"):  # noqa: S104
    ALLOWED_HOSTS = sorted({*ALLOWED_HOSTS, HOST})
CSRF_TRUSTED_ORIGINS = [f"{_public.scheme}://{_public.netloc}"]
SESSION_COOKIE_NAME = "rigpanel_session"
CSRF_COOKIE_NAME = "rigpanel_csrf"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_SSL_REDIRECT = HTTPS
SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SECURE_HSTS_SECONDS = 31_536_000 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = SECURE_HSTS_PRELOAD = HTTPS
SECURE_REDIRECT_EXEMPT = [r"^healthz$", r"^readyz$", r"^metrics$"]  # probes and scrapers come over plain loopback
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"
if TRUSTED_PROXIES:
    SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "django_htmx",
    "template_partials",
    "django_tables2",
    "django_filters",
    "allauth",
    "allauth.account",
    "allauth.mfa",
    "csp",
    "apps.common",
    "apps.audit",
    "apps.accounts",
    "apps.rigs",
    "apps.jobs",
    "apps.installs",
    "apps.catalog",
    "apps.profiles",
    "apps.telemetry",
    "apps.deployments",
    "apps.verification",
    "apps.gateway",
    "apps.openwebui",
    "apps.dashboard",
    "rigpanel",  # owns the commands up, down, status, backup and restore
]
if env("RIGPANEL_WITHOUT_PAGES") == "1":
    # Workers and the sampler render nothing: each is 10 MB smaller and starts half a second sooner without these.
    for _app in ("template_partials", "django_tables2", "django_filters"):
        INSTALLED_APPS.remove(_app)
MIDDLEWARE = [
    "apps.common.middleware.TrustedProxyMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "csp.middleware.CSPMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_structlog.middlewares.RequestMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
    "allauth.account.middleware.AccountMiddleware",
    "apps.common.middleware.ApplicationErrorMiddleware",
]
TEMPLATES: list[dict[str, Any]] = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "apps.dashboard.context.shell",
            ],
        },
    }
]
CSP_SELF = "'self'"
CONTENT_SECURITY_POLICY = {
    "DIRECTIVES": {
        "default-src": ["'none'"],
        "script-src": [CSP_SELF],
        "style-src": [CSP_SELF],
        "img-src": [CSP_SELF, "data:"],
        "font-src": [CSP_SELF],
        "connect-src": [CSP_SELF],  # covers the sockets of the same origin
        "form-action": [CSP_SELF],
        "frame-ancestors": ["'none'"],
        "base-uri": ["'none'"],
        "manifest-src": [CSP_SELF],
    }
}

# --- store -------------------------------------------------------------------------------------
DATABASES: dict[str, dict[str, Any]] = {"default": env_database("RIGPANEL_DATABASE_URL")}
if DATABASES["default"]:
    DATABASES["default"]["CONN_MAX_AGE"] = 0  # web threads come and go; a kept connection per thread piles up
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
else:
    # django-tables2 takes PostgreSQL's fields along where it can: 10 MB of every process with pages, for none of ours.
    sys.modules["django.contrib.postgres"] = None  # type: ignore[assignment]
    DATABASES = {
        "default": {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": DATA_DIR / "rigpanel.sqlite3",
            "OPTIONS": {
                # Deferred transactions lose writes to "database is locked" when they upgrade their lock.
                "transaction_mode": "IMMEDIATE",
                "timeout": 20,
                "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-4000;",
            },
            "TEST": {"NAME": DATA_DIR / "test.sqlite3"},
        }
    }
CACHES = {"default": {"BACKEND": "apps.common.cache.StoreCache", "LOCATION": REDIS_URL, "KEY_PREFIX": "rigpanel-cache"}}
# Messages to pages carry no secrets and are not encrypted; channels_redis would load cryptography for that, 9 MB.
sys.modules["cryptography.fernet"] = None  # type: ignore[assignment]
CHANNEL_LAYERS: dict[str, dict[str, Any]] = {
    "default": {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [REDIS_URL], "prefix": "rigpanel"},
    }
}

# --- Celery ------------------------------------------------------------------------------------
CELERY_APP = "rigpanel.celery"
CELERY_BROKER_URL = _store["celery"]
CELERY_TASK_IGNORE_RESULT = True
CELERY_TASK_ACKS_LATE = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_TASK_SERIALIZER = "json"
CELERY_ACCEPT_CONTENT = ["json"]
CELERY_TASK_DEFAULT_QUEUE = f"rig.{RIG_NAME}.control"
CELERY_TASK_CREATE_MISSING_QUEUES = True
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_BROKER_CONNECTION_MAX_RETRIES = None
CELERY_BROKER_POOL_LIMIT = 4
# A job's truth is its row and lease; a message is a hint, so an old one may be handed out again late.
CELERY_BROKER_TRANSPORT_OPTIONS = {
    "visibility_timeout": 3600,
    "socket_connect_timeout": 2,
    "socket_timeout": 30,
    "socket_keepalive": True,
    "retry_policy": {"timeout": 2.0},
}
CELERY_WORKER_HIJACK_ROOT_LOGGER = False
CELERY_WORKER_CANCEL_LONG_RUNNING_TASKS_ON_CONNECTION_LOSS = False
CELERY_WORKER_SEND_TASK_EVENTS = False
CELERY_WORKER_ENABLE_REMOTE_CONTROL = False  # nobody uses it, and its subscription is one more thing to lose
CELERY_TASK_PUBLISH_RETRY = False  # the tick sends again; a click must not hang on a dead broker

# --- people ------------------------------------------------------------------------------------
AUTHENTICATION_BACKENDS = ["allauth.account.auth_backends.AuthenticationBackend"]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in ("UserAttributeSimilarityValidator", "MinimumLengthValidator", "CommonPasswordValidator")
]
ACCOUNT_ADAPTER = "apps.accounts.adapters.AccountAdapter"
ACCOUNT_USER_MODEL_USERNAME_FIELD = None
ACCOUNT_LOGIN_METHODS = {"email"}
ACCOUNT_SIGNUP_FIELDS = ["email*", "password1*", "password2*"]
ACCOUNT_EMAIL_VERIFICATION = "none"  # people come by invitation; no mail server is needed
ACCOUNT_SESSION_REMEMBER = True
ACCOUNT_LOGOUT_ON_GET = False
MFA_SUPPORTED_TYPES = ["totp", "recovery_codes"]
MFA_TOTP_ISSUER = f"rigpanel {RIG_NAME}"
API_KEY_OWNER = "apps.accounts.services.key_owner"  # by name: the API's helpers lie below accounts
LOGIN_URL = "account_login"
LOGIN_REDIRECT_URL = "/"
ACCOUNT_LOGOUT_REDIRECT_URL = "/accounts/login/"
PASSWORD_RESET_TIMEOUT = 3 * 24 * 3600
_email = env_email("RIGPANEL_EMAIL_URL")
EMAIL_ENABLED = bool(_email)
if EMAIL_ENABLED:
    vars().update(_email)
else:
    EMAIL_BACKEND = "django.core.mail.backends.dummy.EmailBackend"
DEFAULT_FROM_EMAIL = f"rigpanel@{_public.hostname}"
ADMIN_EMAIL = env("RIGPANEL_ADMIN_EMAIL")
ADMIN_PASSWORD = env("RIGPANEL_ADMIN_PASSWORD")

# --- static files ------------------------------------------------------------------------------
STATIC_URL = "/static/"
STATIC_ROOT = DATA_DIR / "static"
STATICFILES_DIRS: list[Any] = [BASE_DIR / "static"]
STATICFILES_FINDERS = [
    "django.contrib.staticfiles.finders.FileSystemFinder",
    "django.contrib.staticfiles.finders.AppDirectoriesFinder",
    "apps.common.storage.UplotFinder",
]
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {
        "BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"
        if TESTING
        else "apps.common.storage.ModuleStaticFilesStorage"
    },
}
WHITENOISE_USE_FINDERS = TESTING

# --- logs --------------------------------------------------------------------------------------
from rigpanel.logs import logging_config  # noqa: E402

LOGGING = logging_config(DEBUG)
LOGGING_CONFIG = "logging.config.dictConfig"
DJANGO_STRUCTLOG_CELERY_ENABLED = False
DATA_UPLOAD_MAX_MEMORY_SIZE = 2 * 1024 * 1024
MESSAGE_STORAGE = "django.contrib.messages.storage.session.SessionStorage"
DJANGO_TABLES2_TEMPLATE = "components/table.html"
SILENCED_SYSTEM_CHECKS: list[str] = []
