from __future__ import annotations

from django.urls import include, path

from apps.dashboard import views

dashboard = [
    path("settings/", views.settings_page, name="settings"),
    path("settings/theme/", views.theme, name="theme"),
]
urlpatterns = [
    path("", views.home, name="home"),
    path("", include((dashboard, "dashboard"))),
]
