from django.urls import path

from apps.deployments.policies import views

app_name = "policies"
urlpatterns = [
    path("", views.page, name="page"),
    path("pins/", views.pin, name="pin"),
    path("pins/<int:pk>/release/", views.release, name="release"),
    path("cards/<int:pk>/allow/", views.allow, name="allow"),
    path("requests/", views.wish, name="wish"),
    path("requests/<int:pk>/approve/", views.approve, name="approve"),
    path("requests/<int:pk>/decline/", views.decline, name="decline"),
    path("requests/<int:pk>/withdraw/", views.withdraw, name="withdraw"),
    path("calendar/", views.slot_add, name="slot"),
    path("calendar/<int:pk>/remove/", views.slot_remove, name="slot-remove"),
    path("rig/", views.rig_policy, name="rig"),
]
