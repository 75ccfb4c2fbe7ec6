"""Names that stay while models change."""

from __future__ import annotations

from django.db import IntegrityError, transaction
from django.db.models import QuerySet

from apps.audit.services import record
from apps.common.actors import Actor
from apps.common.errors import Conflict, Invalid, NotFound
from apps.deployments.routes import routes_changed
from apps.gateway.models import Alias
from apps.profiles.models import Profile
from apps.profiles.selectors import profile_get

NAME_LENGTH_MAX = 100
WHATEVER_SERVES = "whatever serves"


def alias_list() -> QuerySet[Alias]:
    return Alias.objects.select_related("profile").order_by("name")


def alias_get(name: str) -> Alias:
    """Raises NotFound."""
    alias = Alias.objects.select_related("profile").filter(name=name).first()
    if alias is None:
        raise NotFound(f"There is no alias {name!r}.")
    return alias


def alias_set(*, name: str, profile: str, actor: Actor) -> Alias:
    """Make an alias, or lead an existing one elsewhere. ``profile``: a slug, or empty for whatever serves.

    Raises Invalid for a name that is none, Conflict for one that a profile serves under, NotFound for the profile."""
    name = name.strip()
    if not name or len(name) > NAME_LENGTH_MAX or not name.isprintable() or name != "".join(name.split()):
        raise Invalid(
            "An alias is one word of at most 100 characters.", fields={"name": ["Write it like coder or team/default."]}
        )
    chosen = profile_get(profile) if profile else None
    with transaction.atomic():
        if _is_served_name(name):
            raise Conflict(f"A profile serves as {name!r} already; requests for it go there.", code="name_taken")
        try:
            alias, made = Alias.objects.update_or_create(name=name, defaults={"profile": chosen})
        except IntegrityError:
            raise Conflict(f"Somebody just made the alias {name!r}.", code="name_taken") from None
        leads_to = chosen.name if chosen else WHATEVER_SERVES
        record(actor, "alias.create" if made else "alias.update", "alias", alias.pk, name, {"leads_to": leads_to})
        routes_changed()
    return alias


def alias_delete(alias: Alias, *, actor: Actor) -> None:
    with transaction.atomic():
        record(actor, "alias.delete", "alias", alias.pk, alias.name)
        alias.delete()
        routes_changed()


def _is_served_name(name: str) -> bool:
    return any(profile.current.served_name == name for profile in Profile.objects.filter(archived_at=None))
