"""All valid keys and people in memory: a lookup costs one HMAC, and a bad key leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from django.db.models import F, Q

from apps.accounts.models import ApiKey, User
from apps.accounts.tokens import people_secret, token_digest
from apps.common.networks import Network
from apps.common.roles import Role
from apps.gateway.identity import networks_of

KEY_PREFIX = "rp-"
KEY_LENGTH_MAX = 200
USE_NOTED_EVERY_S = 60.0
ROLES_THAT_MAY = [role for role in Role if role.covers(Role.MEMBER)]


@dataclass(frozen=True, slots=True)
class Key:
    """``expires_at`` is a POSIX time. ``models`` and ``networks`` limit it where they are not empty.

    ``people_secret`` is what the names behind a shared key are signed with; empty for a key of one person."""

    id: int
    user_id: int
    expires_at: float | None
    role: str
    models: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()
    people_secret: str = ""


@dataclass(frozen=True, slots=True)
class Person:
    """``may``: active, and at least a member."""

    user_id: int
    role: str
    may: bool


@dataclass(frozen=True, slots=True)
class Known:
    """Everybody and every key: by digest, and by address."""

    keys: dict[str, Key]
    people: dict[str, Person]


def keys_load() -> Known:
    """Every key that is valid now (expiry is looked at again per request), and everybody whom Open WebUI may name."""
    people = {
        email.lower(): Person(pk, role, is_active and role in ROLES_THAT_MAY)
        for pk, email, role, is_active in User.objects.values_list("pk", "email", "role", "is_active").iterator()
    }
    rows = (
        ApiKey.objects.filter(revoked_at=None, user__is_active=True, user__role__in=ROLES_THAT_MAY)
        .annotate(role=F("user__role"))
        .only("digest", "user_id", "expires_at", "allowed_models", "allowed_networks", "names_people")
    )
    keys = {
        row.digest: Key(
            row.pk,
            row.user_id,
            None if row.expires_at is None else row.expires_at.timestamp(),
            row.role,
            frozenset(row.allowed_models),
            networks_of(row.allowed_networks),
            people_secret(row.digest) if row.names_people else "",
        )
        for row in rows.iterator()
    }
    return Known(keys, people)


def note_uses(uses: Mapping[int, datetime]) -> None:
    """Write when keys were last used; a later time that another gateway wrote stays."""
    for key_id, at in uses.items():
        unwritten = Q(last_used_at=None) | Q(last_used_at__lt=at)
        ApiKey.objects.filter(unwritten, pk=key_id).update(last_used_at=at)


def is_like_a_key(token: str) -> bool:
    return token.startswith(KEY_PREFIX) and len(token) <= KEY_LENGTH_MAX


class KeyCache:
    def __init__(self) -> None:
        self.epoch: int | None = None
        self.confirmed_at: float | None = None  # time.monotonic()
        self._keys: dict[str, Key] = {}
        self._ids: dict[int, Key] = {}
        self._may: dict[int, Person] = {}  # by their ids
        self._people: dict[str, Person] = {}
        self.on_gone: Callable[[set[int], set[int]], None] = lambda key_ids, user_ids: None
        self._noted: dict[int, float] = {}  # key id: time.monotonic() of the last noted use
        self._uses: dict[int, datetime] = {}  # not written yet

    def apply(self, epoch: int, known: Known) -> None:
        """Go by these from now on, and tell whose keys were revoked and who may not use the gateway any more."""
        had = self._ids.keys()
        might = self._may.keys()
        self.epoch = epoch
        self._keys, self._people = known.keys, known.people
        self._ids = {key.id: key for key in known.keys.values()}
        self._may = {person.user_id: person for person in known.people.values() if person.may}
        has, may = self._ids.keys(), self._may.keys()
        self._noted = {key_id: at for key_id, at in self._noted.items() if key_id in has}
        if had - has or might - may:
            self.on_gone(had - has, might - may)

    def person(self, email: str) -> Person | None:
        return self._people.get(email)

    def lookup(self, token: str) -> Key | None:
        """The key, if it is valid at this moment."""
        if not is_like_a_key(token):
            return None
        key = self._keys.get(token_digest(token))
        if key is None or (key.expires_at is not None and key.expires_at <= time.time()):
            return None
        return key

    def role(self, key: Key, user_id: int) -> str | None:
        """By now, of whom the key was used by: the body may have come for two minutes. None when it is not among those
        that are valid any more (expiry aside), or may not be used by them."""
        known = self._ids.get(key.id)
        if known is None or user_id == key.user_id:
            return None if known is None else known.role
        person = self._may.get(user_id)
        return None if person is None else person.role

    def used(self, key: Key) -> None:
        """Remember the use, to be written off the hot path; at most once a minute per key."""
        now = time.monotonic()
        noted = self._noted.get(key.id)
        if noted is None or now - noted >= USE_NOTED_EVERY_S:
            self._noted[key.id] = now
            self._uses[key.id] = datetime.now(UTC)

    def take_uses(self) -> dict[int, datetime]:
        """Uses to be written; hand them to ``give_back`` when that failed."""
        uses, self._uses = self._uses, {}
        return uses

    def give_back(self, uses: Mapping[int, datetime]) -> None:
        self._uses = {**uses, **self._uses}

    def __len__(self) -> int:
        return len(self._keys)
