from __future__ import annotations

from django.urls import path

from apps.audit import views

app_name = "audit"
urlpatterns = [
    path("audit/", views.audit, name="list"),
    path("audit/verify", views.verify, name="verify"),
    path("audit/export", views.export, name="export"),
]
