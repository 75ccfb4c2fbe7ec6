from django.urls import path

from apps.profiles import views

app_name = "profiles"
urlpatterns = [
    path("", views.profile_list_page, name="list"),
    path("new/", views.profile_new, name="new"),
    path("recipe/", views.recipe_page, name="recipe"),
    path("<slug:slug>/", views.profile_detail, name="detail"),
    path("<slug:slug>/export/", views.profile_export, name="export"),
    path("<slug:slug>/edit/", views.profile_edit, name="edit"),
    path("<slug:slug>/change/", views.change, name="change"),
    path("<slug:slug>/archive/", views.archive, name="archive"),
]
