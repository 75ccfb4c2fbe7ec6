from django.urls import path

from apps.deployments import views

app_name = "deployments"
urlpatterns = [
    path("deployments/", views.deployment_list, name="list"),
    path("profiles/<slug:slug>/restarts/", views.restarts, name="restarts"),
    path("profiles/<slug:slug>/loading/", views.loading, name="loading"),
    path("deployments/switch/", views.switch, name="switch"),
    path("deployments/<int:pk>/", views.deployment_detail, name="detail"),
    path("deployments/suggestions/<int:pk>/", views.suggestion, name="suggestion"),
    path("deployments/<int:pk>/stop/", views.stop, name="stop"),
    path("deployments/<int:pk>/cut/", views.cut, name="cut"),
]
