from django.urls import path

from apps.installs import views

app_name = "installs"
urlpatterns = [
    path("", views.install_list_page, name="list"),
    path("install/", views.install, name="install"),
    path("<int:pk>/remove/", views.remove, name="remove"),
]
