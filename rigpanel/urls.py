"""Where URLs lead; each app keeps its own list."""

from __future__ import annotations

from django.urls import include, path

from apps.accounts import entrance
from apps.accounts import urls as accounts
from apps.dashboard import me
from rigpanel.health import healthz, readyz
from rigpanel.metrics import metrics

handler403 = "apps.common.problems.forbidden"
handler404 = "apps.common.problems.not_found"
handler500 = "apps.common.problems.server_error"

urlpatterns = [
    path("healthz", healthz, name="healthz"),
    path("readyz", readyz, name="readyz"),
    path("metrics", metrics, name="metrics"),
    path("", include("apps.dashboard.urls")),
    *entrance.urlpatterns,
    path("", include((accounts.urlpatterns + me.urlpatterns, "accounts"))),
    path("models/", include("apps.catalog.urls")),
    path("profiles/", include("apps.profiles.urls")),
    path("installs/", include("apps.installs.urls")),
    path("verify/", include("apps.verification.urls")),
    path("", include("apps.jobs.urls")),
    path("", include("apps.audit.urls")),
    path("", include("apps.deployments.urls")),
    path("", include("apps.gateway.urls")),
    path("policies/", include("apps.deployments.policies.urls")),
    path("", include("apps.telemetry.urls")),
    path("", include("apps.gateway.alias_views")),
    path("api/v1/", include(("rigpanel.api", "api"))),  # imported here alone: workers never load it
]
