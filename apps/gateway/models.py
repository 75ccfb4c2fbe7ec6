"""What people used, and how much they may: the ledger of requests, its days, and quotas."""

from __future__ import annotations

from django.db import models
from django.db.models import Q
from django.utils import timezone

from apps.accounts.models import ApiKey, User
from apps.common.roles import Role
from apps.profiles.models import Profile

RUNNING = "running"
INTERRUPTED = "interrupted"
OK = "ok"


class UsageSpool(models.Model):
    """A file that a gateway process writes, and how far it was read. Offset and rows change in one transaction, so
    each line counts once whoever reads and whenever they are killed."""

    name = models.CharField(max_length=160, unique=True)
    offset = models.BigIntegerField(default=0)
    lines = models.BigIntegerField(default=0)
    broken_lines = models.IntegerField(default=0)
    created_at = models.DateTimeField(default=timezone.now)
    read_at = models.DateTimeField(default=timezone.now)
    finished_at = models.DateTimeField(null=True)  # its process is gone and all of it was read

    class Meta:
        indexes = [models.Index(fields=["finished_at"], name="usage_spool_finished")]

    def __str__(self) -> str:
        return self.name


class UsageRecord(models.Model):
    """One request. ``outcome`` is *running*, *ok*, *refused* (by the engine), *interrupted* (its gateway died; tokens
    unknown) or the gateway's own error code. Tokens are None where nobody told them; ``tokens_in`` includes those
    from the cache.

    People and keys without a constraint of the database: a line that names somebody who is gone must still count.
    """

    spool = models.ForeignKey(UsageSpool, on_delete=models.CASCADE, related_name="records")
    number = models.BigIntegerField()
    at = models.DateTimeField()
    user = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, db_constraint=False, related_name="+")
    key = models.ForeignKey(ApiKey, null=True, on_delete=models.SET_NULL, db_constraint=False, related_name="+")
    model = models.CharField(max_length=200)
    path = models.CharField(max_length=64)
    task = models.CharField(max_length=40, blank=True)
    deployment_id = models.BigIntegerField(null=True)
    version_id = models.BigIntegerField(null=True)
    tokens_in = models.BigIntegerField(null=True)
    tokens_out = models.BigIntegerField(null=True)
    tokens_cached = models.BigIntegerField(null=True)
    first_token_ms = models.BigIntegerField(null=True)
    waited_ms = models.BigIntegerField(null=True)
    duration_ms = models.BigIntegerField(null=True)
    status = models.IntegerField(null=True)
    outcome = models.CharField(max_length=32, default=RUNNING)
    energy_joules = models.FloatField(null=True)

    class Meta:
        ordering = ["-id"]
        constraints = [models.UniqueConstraint(fields=["spool", "number"], name="one_record_per_line")]
        indexes = [
            models.Index(fields=["at"], name="usage_by_time"),
            models.Index(fields=["user", "at"], name="usage_by_user"),
            models.Index(fields=["spool"], condition=Q(outcome=RUNNING), name="usage_running"),
        ]

    def __str__(self) -> str:
        return f"{self.at:%F %T} {self.model} {self.outcome}"


class UsageDay(models.Model):
    """A day's use of one person with one key, of one model on one deployment, in the panel's time zone.

    Written with the records, in one transaction, so that it stays true when records are pruned. ``deployment_id`` is
    0 where no engine was reached. ``unknown`` counts requests whose tokens nobody told.
    """

    day = models.DateField()
    user = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, db_constraint=False, related_name="+")
    key = models.ForeignKey(ApiKey, null=True, on_delete=models.SET_NULL, db_constraint=False, related_name="+")
    model = models.CharField(max_length=200)
    deployment_id = models.BigIntegerField(default=0)
    requests = models.BigIntegerField(default=0)
    background = models.BigIntegerField(default=0)
    failed = models.BigIntegerField(default=0)
    interrupted = models.BigIntegerField(default=0)
    unknown = models.BigIntegerField(default=0)
    refused = models.BigIntegerField(default=0)  # before they began; not among the requests
    tokens_in = models.BigIntegerField(default=0)
    tokens_out = models.BigIntegerField(default=0)
    tokens_cached = models.BigIntegerField(default=0)
    seconds = models.FloatField(default=0.0)  # of answers, added up
    energy_joules = models.FloatField(default=0.0)

    class Meta:
        ordering = ["-day"]
        constraints = [
            models.UniqueConstraint(fields=["day", "user", "key", "model", "deployment_id"], name="one_usage_per_day")
        ]
        indexes = [models.Index(fields=["user", "day"], name="usage_day_by_user")]

    def __str__(self) -> str:
        return f"{self.day} {self.model}"


class UsageRefusal(models.Model):
    """How often requests of one key were refused in one minute before they began, for one reason (the error's code):
    over a quota, for another model, from another network, a body that is none. A row each would let a client that does
    not stop asking fill the disk."""

    minute = models.DateTimeField()
    user = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, db_constraint=False, related_name="+")
    key = models.ForeignKey(ApiKey, null=True, on_delete=models.SET_NULL, db_constraint=False, related_name="+")
    model = models.CharField(max_length=200)
    code = models.CharField(max_length=40)
    count = models.BigIntegerField(default=0)

    class Meta:
        ordering = ["-minute", "pk"]
        constraints = [
            models.UniqueConstraint(fields=["minute", "user", "key", "model", "code"], name="one_refusal_per_minute")
        ]
        indexes = [models.Index(fields=["user", "minute"], name="usage_refusal_by_user")]

    def __str__(self) -> str:
        return f"{self.minute:%F %H:%M} {self.count} × {self.code}"


class Quota(models.Model):
    """How much somebody may use; an empty field means: no limit of its own.

    Of a *role*: what each person with that role may use. Of a *person*: takes the place of the role's, field by field.
    Of a *key*: what may go over this key, within what its person may. ``share`` is the weight in the queue under load.
    """

    role = models.CharField(max_length=16, blank=True, choices=Role.choices)
    user = models.ForeignKey(User, null=True, on_delete=models.CASCADE, related_name="quotas")
    key = models.ForeignKey(ApiKey, null=True, on_delete=models.CASCADE, related_name="quotas")
    requests_per_minute = models.PositiveIntegerField(null=True)
    tokens_per_minute = models.PositiveBigIntegerField(null=True)
    tokens_per_day = models.PositiveBigIntegerField(null=True)
    tokens_per_month = models.PositiveBigIntegerField(null=True)
    concurrent = models.PositiveIntegerField(null=True)
    share = models.PositiveIntegerField(null=True)
    updated_at = models.DateTimeField(default=timezone.now)

    class Meta:
        constraints = [
            models.CheckConstraint(
                name="a_quota_is_for_one",
                condition=(
                    Q(user=None, key=None) & ~Q(role="")
                    | Q(role="", key=None, user__isnull=False)
                    | Q(role="", user=None, key__isnull=False)
                ),
            ),
            models.UniqueConstraint(fields=["role"], condition=~Q(role=""), name="one_quota_per_role"),
            models.UniqueConstraint(fields=["user"], condition=Q(user__isnull=False), name="one_quota_per_person"),
            models.UniqueConstraint(fields=["key"], condition=Q(key__isnull=False), name="one_quota_per_key"),
        ]

    def __str__(self) -> str:
        return f"quota of {self.name}"

    @property
    def name(self) -> str:
        """Whose it is."""
        if self.key is not None:
            return f"{self.key} of {self.key.user.display_name}"
        return self.user.display_name if self.user is not None else Role(self.role).label


class Alias(models.Model):
    """A name that stays while models change: requests for it go to what its profile serves, or, without a profile, to
    whatever serves."""

    name = models.CharField(max_length=100, unique=True)
    profile = models.ForeignKey(Profile, null=True, blank=True, on_delete=models.CASCADE, related_name="aliases")
    created_at = models.DateTimeField(default=timezone.now)

    class Meta:
        ordering = ["name"]
        verbose_name_plural = "aliases"

    def __str__(self) -> str:
        return self.name
