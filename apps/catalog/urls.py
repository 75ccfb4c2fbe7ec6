from django.urls import path

from apps.catalog import views
from apps.catalog.weights import views as weights

app_name = "catalog"
urlpatterns = [
    path("", views.model_list_page, name="list"),
    path("new/", views.model_new, name="new"),
    path("disk/", weights.disk, name="disk"),
    path("disk/delete/", weights.delete, name="disk-delete"),
    path("disk/token/", weights.token, name="token"),
    path("<slug:slug>/", views.model_detail, name="detail"),
    path("<slug:slug>/edit/", views.model_edit, name="edit"),
    path("<slug:slug>/delete/", views.model_delete_view, name="delete"),
    path("<slug:slug>/download/", weights.download, name="download"),
    path("<slug:slug>/weights/", weights.register, name="register"),
    path("<slug:slug>/weights/forget/", weights.forget, name="forget"),
]
