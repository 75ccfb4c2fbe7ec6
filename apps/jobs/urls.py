from __future__ import annotations

from django.urls import path

from apps.jobs import views

app_name = "jobs"
urlpatterns = [
    path("jobs/", views.jobs, name="list"),
    path("jobs/export", views.export, name="export"),
    path("jobs/<int:pk>/", views.job, name="detail"),
    path("jobs/<int:pk>/log", views.log, name="log"),
    path("jobs/<int:pk>/cancel", views.cancel, name="cancel"),
    path("jobs/<int:pk>/part/<slug:name>", views.part, name="part"),
]
