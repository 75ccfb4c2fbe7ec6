"""What could be asked for: served models, those that a profile could serve, and aliases.

Read in a thread beside the route table and kept whole; the hot path only looks names up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from django.db.models import Exists, F, Max, OuterRef

from apps.common.roles import Role
from apps.deployments.lacks import lacking
from apps.deployments.models import COMING_UP, LIVE_OR_COMES_BACK, SERVING, Deployment, Route, RouteState, Status
from apps.deployments.policies.decide import request_may_load
from apps.deployments.policies.models import LoadBy
from apps.deployments.policies.selectors import loading_by_profile
from apps.gateway.models import Alias
from apps.profiles.models import ProfileVersion
from apps.rigs.models import Rig

LOADED, LOADING, SLEEPING, UNLOADED = "loaded", "loading", "sleeping", "unloaded"
STATES = (
    *((status, LOADED) for status in SERVING),
    (Status.SLEEPING, SLEEPING),
    *((status, LOADING) for status in COMING_UP),
    (Status.FAILED, LOADING),  # of those that are started again and that requests wait for
    *((status, UNLOADED) for status in (Status.DRAINING, Status.STOPPING)),
)


@dataclass(frozen=True, slots=True)
class Offer:
    """A profile that could serve a name. ``for_members``: they may switch to it, or their requests may load it.
    ``can_start``: its engine and its weights are on the rig; whether it fits is the plan's to say."""

    profile_id: int
    profile_name: str
    for_members: bool
    can_start: bool

    def may_be_loaded_by(self, role: str) -> bool:
        known = Role(role)
        return known.covers(Role.OPERATOR) or (known.covers(Role.MEMBER) and self.for_members)


@dataclass(frozen=True, slots=True)
class Menu:
    """``offers`` by served name, those that ran last first. ``states`` by served name; what is missing is unloaded.
    ``aliases``: to the served name and the profile, or to None for whatever serves. ``waiting``: unloaded, but to be
    started again once a card, a pin or another model allows it, and nobody can tell when."""

    offers: Mapping[str, tuple[Offer, ...]] = field(default_factory=dict)
    states: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str | None] = field(default_factory=dict)
    waiting: frozenset[str] = frozenset()

    def state(self, served_name: str) -> str:
        return self.states.get(served_name, UNLOADED)

    def resolve(self, name: str) -> str:
        """The served name that a client means; its own word where that is no alias."""
        if name in self.states or name in self.offers or name not in self.aliases:
            return name
        target = self.aliases[name]
        return (self.whatever_serves() if target is None else target) or name

    def whatever_serves(self) -> str | None:
        for wanted in (LOADED, LOADING, SLEEPING):
            found = next((name for name, state in self.states.items() if state == wanted), None)
            if found is not None:
                return found
        return min(self.waiting, default=None)  # whoever asks is told what it waits for

    def aliases_of(self, served_name: str) -> list[str]:
        return [alias for alias in self.aliases if self.resolve(alias) == served_name]

    def names(self, role: str) -> list[str]:
        """Served names that somebody of this role may ask for: what runs, and what they could have loaded."""
        running = sorted(name for name, state in self.states.items() if state != UNLOADED)
        others = (name for name in self.offers if name not in running and self.offer(name, role) is not None)
        return running + sorted(others)

    def offer(self, served_name: str, role: str) -> Offer | None:
        """The profile that somebody of this role would have loaded for that name."""
        offers = self.offers.get(served_name, ())
        return next((o for o in offers if o.can_start and o.may_be_loaded_by(role)), None)


def menu_read() -> Menu:
    """The menu of this moment. Queries do not grow with the number of profiles; each one's weights are looked for."""
    states: dict[str, str] = {}
    held = Route.objects.filter(served_name=OuterRef("served_name"), state=RouteState.HELD)
    rows = list(Deployment.objects.filter(LIVE_OR_COMES_BACK).values_list("served_name", "status", Exists(held)))
    waiting = {name for name, has, is_held in rows if has == Status.FAILED and not is_held}
    live = [(name, has) for name, has, is_held in rows if has != Status.FAILED or is_held]
    for status, state in reversed(STATES):  # loaded has the last word
        states.update({name: state for name, has in live if has == status})
    last_ran = dict(
        Deployment.objects.exclude(ready_at=None)
        .values("version__profile_id")
        .annotate(last=Max("pk"))
        .values_list("version__profile_id", "last")
    )
    newest = list(
        ProfileVersion.objects.filter(profile__archived_at=None)
        .annotate(newest=Max("profile__versions__number"))
        .filter(number=F("newest"))
        .select_related("profile", "model")
    )
    rig = Rig.objects.order_by("pk").first()
    lacks = lacking(newest, rig) if rig is not None else {}
    loading = loading_by_profile()
    offers: dict[str, list[tuple[int, Offer]]] = {}
    served: dict[int, str] = {}
    for version in newest:
        profile = version.profile
        marked = profile.members_may_switch
        by_request = request_may_load(Role.MEMBER, loading.get(profile.pk, LoadBy.MARKED), marked)
        can_start = rig is not None and version.pk not in lacks
        offer = Offer(profile.pk, profile.name, marked or by_request, can_start)
        offers.setdefault(version.served_name, []).append((last_ran.get(profile.pk, 0), offer))
        served[profile.pk] = version.served_name
    aliases = {
        alias.name: None if alias.profile_id is None else served.get(alias.profile_id, "")
        for alias in Alias.objects.all()
    }
    return Menu(
        {name: tuple(o for _, o in sorted(found, key=lambda f: -f[0])) for name, found in offers.items()},
        states,
        aliases,
        frozenset(waiting),
    )
