"""What runs: deployments, their replicas, the cards they hold, and where requests go."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils import timezone

from apps.catalog.models import Model

# Django finds an app's models through this module.
from apps.deployments.policies.models import CalendarSlot, Pin, RequestState, RigPolicy, SwitchRequest  # noqa: F401
from apps.profiles.models import Profile, ProfileVersion
from apps.rigs.models import Gpu, Rig


class Status(models.TextChoices):
    PENDING = "pending", "Pending"
    PREPARING = "preparing", "Preparing"
    STARTING = "starting", "Starting"
    LOADING = "loading", "Loading"
    READY = "ready", "Ready"
    DEGRADED = "degraded", "Degraded"
    SLEEPING = "sleeping", "Sleeping"
    DRAINING = "draining", "Draining"
    STOPPING = "stopping", "Stopping"
    STOPPED = "stopped", "Stopped"
    FAILED = "failed", "Failed"


LIVE = frozenset(set(Status) - {Status.STOPPED, Status.FAILED})
SERVING = frozenset({Status.READY, Status.DEGRADED})
COMING_UP = frozenset({Status.PENDING, Status.PREPARING, Status.STARTING, Status.LOADING})
_ENDS = {Status.STOPPING, Status.FAILED}
TRANSITIONS: dict[str, frozenset[str]] = {
    Status.PENDING: frozenset({Status.PREPARING, Status.STOPPED, *_ENDS}),
    Status.PREPARING: frozenset({Status.STARTING, *_ENDS}),
    Status.STARTING: frozenset({Status.LOADING, *_ENDS}),
    Status.LOADING: frozenset({Status.READY, *_ENDS}),
    Status.READY: frozenset({Status.DEGRADED, Status.DRAINING, Status.SLEEPING, *_ENDS}),
    Status.DEGRADED: frozenset({Status.READY, Status.DRAINING, *_ENDS}),
    Status.SLEEPING: frozenset({Status.READY, Status.DRAINING, *_ENDS}),
    Status.DRAINING: frozenset({Status.READY, Status.SLEEPING, *_ENDS}),
    Status.STOPPING: frozenset({Status.STOPPED, Status.FAILED}),
}


class Desired(models.TextChoices):
    SERVING = "serving", "Serving"
    STOPPED = "stopped", "Stopped"


# Of deployments: what failed though it should serve, which is started again as its restart policy says.
COMES_BACK = Q(status=Status.FAILED, desired=Desired.SERVING)
LIVE_OR_COMES_BACK = Q(status__in=LIVE) | COMES_BACK


class Deployment(models.Model):
    """One profile version on a rig. ``desired`` is what a person asked, ``status`` what was seen.

    ``simulated`` marks that the simulated engine stands in for ``version.engine``. ``evidence`` keeps how a
    failure looked: log tail, exit code, cause, suggestion. ``sleep`` keeps how its first sleep went:
    ``first_seconds`` and ``in_use_asleep_bytes`` by card, or ``problem``, the sentence why it does not sleep.
    """

    rig = models.ForeignKey(Rig, on_delete=models.PROTECT, related_name="deployments")
    version = models.ForeignKey(ProfileVersion, on_delete=models.PROTECT, related_name="deployments")
    served_name = models.CharField(max_length=200)
    status = models.CharField(max_length=16, choices=Status.choices, default=Status.PENDING)
    desired = models.CharField(max_length=16, choices=Desired.choices, default=Desired.SERVING)
    status_reason = models.CharField(max_length=500, blank=True)
    simulated = models.BooleanField(default=False)
    engine_version = models.CharField(max_length=80, blank=True)
    started_by_name = models.CharField(max_length=200, blank=True)
    job_id = models.BigIntegerField(null=True)
    created_at = models.DateTimeField(default=timezone.now)
    ready_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)
    evidence = models.JSONField(null=True)
    cut_by_name = models.CharField(max_length=200, blank=True)  # who had the answers cut that it was draining
    sleep = models.JSONField(null=True)

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["rig", "status"], name="deployment_by_status")]

    def __str__(self) -> str:
        return f"{self.version} on {self.rig}"

    @property
    def is_live(self) -> bool:
        return self.status in LIVE

    @property
    def comes_back(self) -> bool:
        """Like ``COMES_BACK``, of one row."""
        return self.status == Status.FAILED and self.desired == Desired.SERVING

    @property
    def is_serving(self) -> bool:
        return self.status in SERVING

    @property
    def profile_name(self) -> str:
        return self.version.profile.name

    @property
    def layout(self) -> str:
        return self.version.layout


class DeploymentEvent(models.Model):
    """A status change, written in the same transaction as the change."""

    deployment = models.ForeignKey(Deployment, on_delete=models.CASCADE, related_name="events")
    at = models.DateTimeField(default=timezone.now)
    from_status = models.CharField(max_length=16)
    to_status = models.CharField(max_length=16)
    reason = models.CharField(max_length=500, blank=True)

    class Meta:
        ordering = ["id"]

    def __str__(self) -> str:
        return f"{self.from_status} → {self.to_status}"


class Replica(models.Model):
    """One replica of a deployment. ``released_at`` frees its port; ``engine_key`` is the random key of its launch
    (never shown); ``handle`` finds its process again, ``argv`` is the command line that made it. ``start_check`` is
    what the log of a start that succeeded shows: sentences in ``warnings``, values in ``facts``. ``members`` are
    ``[pid, birth mark]`` of the engine's processes when it became ready.

    Replicas of an engine that serves all of them behind one address have the first one's address, key and handle, and
    ``condition`` is the engine's own word for how each is; elsewhere it is empty.
    """

    deployment = models.ForeignKey(Deployment, on_delete=models.CASCADE, related_name="replicas")
    index = models.IntegerField()
    launch_id = models.CharField(max_length=80, unique=True)
    host = models.CharField(max_length=100)
    port = models.IntegerField()
    base_url = models.CharField(max_length=200)
    engine_key = models.CharField(max_length=100)
    handle = models.JSONField(null=True)
    argv = models.JSONField(null=True)
    start_check = models.JSONField(null=True)
    members = models.JSONField(default=list)
    healthy = models.BooleanField(default=False)
    condition = models.CharField(max_length=60, blank=True)
    released_at = models.DateTimeField(null=True)

    class Meta:
        ordering = ["index"]
        constraints = [
            models.UniqueConstraint(fields=["deployment", "index"], name="one_replica_of_an_index"),
            models.UniqueConstraint(
                fields=["host", "port"], condition=Q(released_at=None), name="one_live_replica_per_port"
            ),
        ]

    def __str__(self) -> str:
        return f"replica {self.index} of {self.deployment_id}"

    @property
    def start_warnings(self) -> list[str]:
        return list((self.start_check or {}).get("warnings", []))


WHOLE_CARD = "whole"
CPU_SLOT = "cpu"
SLEEPER = "sleep-"  # and the deployment's id: each sleeper has a slot of its own on every card that it keeps a part of


class PowerCap(models.Model):
    """A card's power limit that the panel set, with the one to put back. ``refused``: what the driver said instead."""

    gpu = models.OneToOneField(Gpu, on_delete=models.CASCADE, related_name="power_cap")
    watts = models.FloatField()
    before_watts = models.FloatField(null=True)
    refused = models.CharField(max_length=300, blank=True)
    set_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.gpu} at {self.watts:.0f} W"


class CardPause(models.Model):
    """A card that the guard took work from: nothing is loaded there by itself until it has been well for a while, or
    an operator allows it. ``why`` follows its name ("was stopped for heat"); ``well_since`` is null while it is not, or
    while nobody reads it; ``read_at`` is the last reading that was looked at."""

    gpu = models.OneToOneField(Gpu, on_delete=models.CASCADE, related_name="pause")
    at = models.DateTimeField(default=timezone.now)
    why = models.CharField(max_length=60)
    well_since = models.DateTimeField(null=True)
    read_at = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.gpu} {self.why}"


class GpuReservation(models.Model):
    """A claim on a card's slot, or (``gpu`` null) on the rig's one CPU slot. Live while ``released_at`` is null."""

    rig = models.ForeignKey(Rig, on_delete=models.PROTECT, related_name="reservations")
    gpu = models.ForeignKey(Gpu, on_delete=models.PROTECT, null=True, related_name="reservations")
    slot = models.CharField(max_length=16, default=WHOLE_CARD)
    replica = models.ForeignKey(Replica, on_delete=models.CASCADE, related_name="reservations")
    created_at = models.DateTimeField(default=timezone.now)
    released_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["gpu", "slot"],
                condition=Q(released_at=None, gpu__isnull=False),
                name="one_live_reservation_per_gpu_slot",
            ),
            models.UniqueConstraint(
                fields=["rig", "slot"],
                condition=Q(released_at=None, gpu=None),
                name="one_live_reservation_per_rig_slot",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.gpu or self.rig} {self.slot}"


class RouteState(models.TextChoices):
    OPEN = "open", "Open"
    HELD = "held", "Held"  # requests wait: a switch is under way


class Route(models.Model):
    """Where requests for a served name go. ``deployment`` is null while its first start is under way.

    Every change raises the epoch *routes* in the same transaction; each live gateway process then
    acknowledges that epoch (``GatewayProcess``) before anything is drained.
    """

    served_name = models.CharField(max_length=200, unique=True)
    state = models.CharField(max_length=8, choices=RouteState.choices, default=RouteState.OPEN)
    deployment = models.ForeignKey(Deployment, null=True, on_delete=models.SET_NULL, related_name="routes")
    held_by_job_id = models.BigIntegerField(null=True)
    eta_at = models.DateTimeField(null=True)

    def __str__(self) -> str:
        return f"{self.served_name} {self.state}"


class GatewayProcess(models.Model):
    """A living gateway: which route epoch it has applied and how many requests run per deployment.

    ``in_flight`` maps deployment id (text) to a count. One whose ``seen_at`` is old, or whose process is known to be
    gone, is not waited for.
    """

    key = models.CharField(max_length=120, unique=True)  # identity.process_key
    started_at = models.DateTimeField(default=timezone.now)
    seen_at = models.DateTimeField(default=timezone.now)
    acknowledged_epoch = models.BigIntegerField(default=0)
    in_flight = models.JSONField(default=dict)

    def __str__(self) -> str:
        return self.key


class RestartPolicy(models.Model):
    """What the panel does by itself when an engine of this profile dies or hangs. A profile without a row has the
    defaults. It belongs to the profile, not to its versions: how patient to be says nothing about what runs.

    ``restarts`` within ``window_seconds`` are tried (0: none), the first at once, each later one after
    ``backoff_seconds`` doubled; then the deployment stays failed. A one-token probe goes out every
    ``probe_every_seconds`` (0: never) while no tokens come, waits ``probe_limit_seconds``, and after
    ``probe_failures`` in a row without an answer the engine counts as hanging.
    """

    profile = models.OneToOneField(Profile, on_delete=models.CASCADE, related_name="restart_policy")
    restarts = models.PositiveIntegerField(default=3)
    window_seconds = models.FloatField(default=600.0)
    backoff_seconds = models.FloatField(default=10.0)
    probe_every_seconds = models.FloatField(default=60.0)
    probe_limit_seconds = models.FloatField(default=60.0)
    probe_failures = models.PositiveIntegerField(default=3)

    def __str__(self) -> str:
        return f"restarts of {self.profile}"


class Boot(models.Model):
    """What was predicted of a deployment's launch, and what the engine's own log then told.

    ``predicted`` is what people were shown, ``uncorrected`` the same without what earlier boots taught: corrections are
    learnt from that, or they would feed on themselves. Both are ``fit.Prediction`` as JSON, ``actual`` a
    ``fit.BootFacts``, null until it was ready. ``fingerprint`` is equal for launches with the same compile cache.
    """

    deployment = models.OneToOneField(Deployment, on_delete=models.CASCADE, related_name="boot")
    rig = models.ForeignKey(Rig, on_delete=models.CASCADE, related_name="+")
    model = models.ForeignKey(Model, on_delete=models.CASCADE, related_name="+")
    engine_version = models.CharField(max_length=80, blank=True)
    layout = models.CharField(max_length=40)
    fingerprint = models.CharField(max_length=64)
    predicted = models.JSONField()
    uncorrected = models.JSONField()
    actual = models.JSONField(null=True)
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["-id"]
        indexes = [models.Index(fields=["rig", "engine_version", "-id"], name="boot_by_engine")]

    def __str__(self) -> str:
        return f"boot of {self.deployment_id}"


class Throughput(models.Model):
    """Tokens per second of a deployment while ``concurrency`` requests and more ran at once (see ``history``)."""

    deployment = models.ForeignKey(Deployment, on_delete=models.CASCADE, related_name="throughput")
    concurrency = models.PositiveSmallIntegerField()
    looks = models.PositiveIntegerField(default=0)
    tokens_per_second_sum = models.FloatField(default=0.0)
    tokens_per_second_max = models.FloatField(default=0.0)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["deployment", "concurrency"], name="one_throughput_per_concurrency")
        ]

    def __str__(self) -> str:
        return f"{self.concurrency} at once on {self.deployment_id}"
