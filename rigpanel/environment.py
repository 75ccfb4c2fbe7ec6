"""Reads the environment: ``NAME``, ``NAME_FILE`` for secrets, the data directory and its secrets.

Django-free, so that a wrong value is one clear sentence and never a traceback from settings.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

# A unix socket's path has at most 108 bytes with its closing NUL (unix(7), sun_path).
SOCKET_PATH_MAX_BYTES = 107
LONGEST_SOCKET_NAME = "supervisor.sock.1234567"
NOT_SHOWN = "what it is now is not shown, since it may hold a password."


class ConfigError(Exception):
    """A setting is wrong; the message says which, why and what to do."""


def env(name: str, default: str = "") -> str:
    """The value of ``name``, or the stripped content of the file that ``name_FILE`` points to."""
    file = os.environ.get(f"{name}_FILE", "")
    if file:
        try:
            return Path(file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"{name}_FILE points to {file}, which cannot be read: {error.strerror}.") from None
    return os.environ.get(name) or default


def env_port(name: str, default: int) -> int:
    raw = env(name, str(default))
    if not raw.isdecimal() or not 1 <= int(raw) <= 65535:
        raise ConfigError(f"{name} must be a port number from 1 to 65535, not {raw!r}.")
    return int(raw)


def env_seconds(name: str, default: float, *, most: float) -> float:
    raw = env(name, str(default))
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:  # also not "nan"
        raise ConfigError(f"{name} must be a number of seconds from 0 to {most:g}, not {raw!r}.")
    return value


def env_price(name: str) -> float | None:
    raw = env(name)
    if not raw:
        return None
    try:
        value = float(raw)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:  # also not "nan"
        raise ConfigError(f"{name} must be the price of a kWh, such as 0.32, not {raw!r}.")
    return value


def env_time_zone(name: str, default: str) -> ZoneInfo:
    raw = env(name, default)
    try:
        return ZoneInfo(raw)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ConfigError(f"{name} must be a time zone such as Europe/Berlin, not {raw!r}.") from None


def env_port_range(name: str, default: str) -> range:
    raw = env(name, default)
    first, dash, last = raw.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and 1024 <= int(first) <= int(last) <= 65535):
        raise ConfigError(f"{name} must look like 28100-28199 (two ports from 1024 to 65535), not {raw!r}.")
    return range(int(first), int(last) + 1)


def env_url(name: str, default: str) -> str:
    raw = env(name, default).rstrip("/")
    parts = urlsplit(raw)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{name} must be an http or https address such as http://rig:8080, not {raw!r}.")
    return raw


def env_choice(name: str, default: str, *choices: str) -> str:
    """One of ``choices``; of them ``replay:FILE`` stands for ``replay:`` and any file."""
    raw = env(name, default).strip()
    for choice in choices:
        prefix, colon, _ = choice.partition(":")
        if raw == choice or (colon and raw.startswith(prefix + colon) and raw != prefix + colon):
            return raw
    raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {raw!r}.")


def env_networks(name: str) -> tuple[IPv4Network | IPv6Network, ...]:
    """Addresses or networks with commas between them; an address is a network of one."""
    found = []
    for text in filter(None, (part.strip() for part in env(name).split(","))):
        try:
            found.append(ip_network(text, strict=False))
        except ValueError:
            raise ConfigError(
                f"{name} must be addresses or networks such as 10.0.0.1 or 10.0.0.0/24, with commas between them, "
                f"not {text!r}."
            ) from None
    return tuple(found)


def env_database(name: str) -> dict[str, Any]:
    """PostgreSQL as Django wants it told; empty when nothing is set."""
    raw = env(name)
    if not raw:
        return {}
    import environ

    wrong = ConfigError(f"{name} must look like postgres://user:password@host:5432/name; {NOT_SHOWN}")
    if raw.partition("://")[0] not in ("postgres", "postgresql"):
        raise wrong
    try:
        found: dict[str, Any] = environ.Env.db_url_config(raw)
    except ValueError:  # such as a port that is no number
        raise wrong from None
    if not found["NAME"]:
        raise wrong
    return found


def env_email(name: str) -> dict[str, Any]:
    """Django's settings for e-mail; empty when nothing is set."""
    raw = env(name)
    if not raw:
        return {}
    import environ

    wrong = ConfigError(f"{name} must look like smtp+tls://user:password@mail.example:587; {NOT_SHOWN}")
    scheme = raw.partition("://")[0]
    if scheme not in environ.Env.EMAIL_SCHEMES:
        raise wrong
    try:
        found: dict[str, Any] = environ.Env.email_url_config(raw)
    except ValueError:
        raise wrong from None
    if scheme.startswith("smtp") and not found["EMAIL_HOST"]:
        raise wrong
    return found


def rig_name() -> str:
    """This machine's rig: ``RIGPANEL_RIG`` or the host's short name, as a slug."""
    raw = env("RIGPANEL_RIG", socket.gethostname().split(".")[0] or "rig").lower()
    name = "".join(c if c.isalnum() or c == "-" else "-" for c in raw).strip("-")
    if not name:
        raise ConfigError(f"RIGPANEL_RIG must have letters or digits, not {raw!r}.")
    return name[:63]


def data_directory(base: Path) -> Path:
    """``RIGPANEL_DATA_DIR``, made 0700 with its folders. Raises ConfigError if it cannot be used."""
    path = Path(env("RIGPANEL_DATA_DIR", "var")).expanduser()
    path = path if path.is_absolute() else base / path
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("run", "logs", "secrets", "engines", "models", "installs"):
            (path / name).mkdir(mode=0o700, exist_ok=True)
        probe = path / "run" / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"The data directory {path} cannot be used: {error.strerror}. "
            "Set RIGPANEL_DATA_DIR to a folder that this user may write to."
        ) from None
    return path


def runtime_directory(data_dir: Path) -> Path:
    """Where sockets lie: ``DATA_DIR/run``, or a short private folder when that path is too long."""
    run = data_dir / "run"
    if len(os.fsencode(run / LONGEST_SOCKET_NAME)) <= SOCKET_PATH_MAX_BYTES:
        return run
    digest = secrets_free_digest(str(data_dir))
    short = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"rigpanel-{os.getuid()}-{digest}"
    try:
        short.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"The folder for sockets {short} cannot be made: {error.strerror}.") from None
    if short.stat().st_uid != os.getuid():
        raise ConfigError(f"The folder for sockets {short} belongs to somebody else; remove it or set XDG_RUNTIME_DIR.")
    return short


def secrets_free_digest(text: str) -> str:
    """A short stable name for a path; not for security."""
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:10]


def stored_secret(data_dir: Path, name: str) -> str:
    """A random secret kept in ``DATA_DIR/secrets`` (0600), made on first use by whoever comes first."""
    path = data_dir / "secrets" / name
    for _ in range(2):
        try:
            value = path.read_text(encoding="utf-8").strip()
            if value:
                return value
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigError(f"The secret {path} cannot be read: {error.strerror}.") from None
        draft = path.with_name(f".{name}.{os.getpid()}")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(secrets.token_urlsafe(48))
        try:
            os.link(draft, path)  # atomic: of two first starts only one wins, both read the same value
        except FileExistsError:
            pass
        finally:
            draft.unlink(missing_ok=True)
    return path.read_text(encoding="utf-8").strip()


def store_urls(raw: str, socket_path: Path) -> dict[str, str]:
    """One setting for the store, written as each library wants it: ``redis`` (redis-py, Django,
    Channels) and ``celery``."""
    if not raw:
        return {"redis": f"unix://{quote(str(socket_path))}", "celery": f"redis+socket://{quote(str(socket_path))}"}
    try:
        scheme = urlsplit(raw).scheme
        _ = urlsplit(raw).port  # raises where it is no number
    except ValueError:
        raise ConfigError(f"RIGPANEL_REDIS_URL must look like redis://host:6379/0; {NOT_SHOWN}") from None
    if scheme == "unix":
        return {"redis": raw, "celery": raw.replace("unix://", "redis+socket://", 1)}
    if scheme in ("redis", "rediss"):
        return {"redis": raw, "celery": raw}
    raise ConfigError(f"RIGPANEL_REDIS_URL must begin with redis://, rediss:// or unix://, not {scheme or 'nothing'}.")
