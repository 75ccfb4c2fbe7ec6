from __future__ import annotations

from django.urls import path

from apps.telemetry import views

app_name = "telemetry"
urlpatterns = [
    path("telemetry/", views.page, name="page"),
    path("telemetry/data/", views.data, name="data"),
]
