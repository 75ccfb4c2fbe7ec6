"""People's pages; sign-in itself is in ``entrance.py``, without a namespace, as allauth looks for it."""

from __future__ import annotations

from django.urls import path

from apps.accounts import views

app_name = "accounts"
urlpatterns = [
    path("join/<str:token>/", views.join, name="join"),
    path("reset/<str:uid>/<str:token>/", views.reset, name="reset"),
    path("team/", views.team, name="team"),
    path("team/invite", views.invite, name="invite"),
    path("team/invitations/<int:pk>/withdraw", views.withdraw, name="withdraw"),
    path("team/<int:pk>/edit", views.member, name="member"),
    path("team/<int:pk>/reset-link", views.reset_link, name="reset_link"),
    path("team/<int:pk>/remove-second-factor", views.second_factor, name="second_factor"),
]
