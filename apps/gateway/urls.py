"""The gateway's pages in the panel."""

from __future__ import annotations

from django.urls import path

from apps.gateway import views

app_name = "gateway"
urlpatterns = [
    path("team/usage/", views.usage, name="usage"),
    path("team/quotas/", views.quotas, name="quotas"),
]
