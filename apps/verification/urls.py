from django.urls import path

from apps.verification import views

app_name = "verification"
urlpatterns = [
    path("", views.run_list_page, name="list"),
    path("start/", views.start, name="start"),
    path("<int:pk>/", views.run_detail, name="detail"),
    path("<int:pk>/accept/", views.accept, name="accept"),
]
