"""What Ray Serve's REST API says of an application, reduced to what the panel shows.

Only the standard library and the syntax of Python 3.10: this also runs in Ray's own environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

PLACE = "rigpanel_place"  # a custom resource: each raylet has one, each replica takes one
RUNNING = "RUNNING"
GONE = "GONE"  # our own word: Serve has no replica in this place now
MESSAGE_CHARACTERS = 4000


@dataclass(frozen=True)
class PlaceState:
    """One replica's place. ``state`` is Serve's own word (STARTING, RUNNING, STOPPING, ...) or GONE."""

    index: int
    state: str
    replica: str = ""
    pid: int | None = None


@dataclass(frozen=True)
class ApplicationState:
    """``status`` is Serve's (DEPLOYING, RUNNING, DEPLOY_FAILED, UNHEALTHY, ...), ``message`` what it says about it."""

    status: str
    message: str
    places: tuple[PlaceState, ...]

    @property
    def running(self) -> int:
        return sum(place.state == RUNNING for place in self.places)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def application_state(answer: Mapping[str, Any], name: str, nodes: Mapping[str, int], count: int) -> ApplicationState:
    """Read GET /api/serve/applications/. ``nodes`` maps Ray's node ids to the replicas' places; a replica on an
    unknown node (a raylet that was started anew a moment ago) takes a place that is free.

    Raises KeyError when Serve does not know the application.
    """
    application = answer["applications"][name]
    deployments = application.get("deployments") or {}
    messages = [application.get("message") or ""]
    messages += [d.get("message") or "" for d in deployments.values()]
    alive: dict[int, PlaceState] = {}
    homeless = []
    for replica in _model_replicas(application, deployments):
        place = nodes.get(str(replica.get("node_id")))
        if place is None or not 0 <= place < count:
            homeless.append(replica)
        elif place not in alive or replica["state"] == RUNNING:
            alive[place] = _state(place, replica)
    for replica in homeless:
        free = [index for index in range(count) if index not in alive]
        if free:
            alive[free[0]] = _state(free[0], replica)
    return ApplicationState(
        status=str(application["status"]),
        message="\n".join(dict.fromkeys(m.strip() for m in messages if m.strip()))[:MESSAGE_CHARACTERS],
        places=tuple(alive.get(index) or PlaceState(index, GONE) for index in range(count)),
    )


def _model_replicas(application: Mapping[str, Any], deployments: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Replicas of the deployment that holds the model: not the ingress, where there is another one."""
    topology = (application.get("deployment_topology") or {}).get("nodes") or {}
    models = [
        d
        for name, d in deployments.items()
        if len(deployments) == 1 or not (topology.get(name) or {}).get("is_ingress")
    ]
    if len(models) > 1:  # before Serve knows the topology
        models = [d for d in models if "Ingress" not in str(d.get("name"))]
    return [replica for d in models for replica in d.get("replicas") or []]


def _state(place: int, replica: Mapping[str, Any]) -> PlaceState:
    return PlaceState(place, str(replica["state"]), str(replica.get("replica_id") or ""), replica.get("pid"))
