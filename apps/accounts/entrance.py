"""allauth's pages as they are here: who may open each, and 422 for a form with errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from allauth.account import views as account
from allauth.mfa.base import views as mfa
from allauth.mfa.recovery_codes import views as recovery_codes
from allauth.mfa.totp import views as totp
from django.http import HttpRequest, HttpResponseBase
from django.urls import path

from apps.accounts.views import forgot
from apps.common.access import public, role_required
from apps.common.roles import Role

View = Callable[..., HttpResponseBase]


def unprocessable(view: View) -> View:
    """A posted form that comes back with errors answers 422 instead of allauth's 200."""

    @wraps(view)
    def answered(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        response = view(request, *args, **kwargs)
        form = (getattr(response, "context_data", None) or {}).get("form")
        if request.method == "POST" and response.status_code == 200 and form is not None and form.errors:
            response.status_code = 422
        return response

    return answered


def everybody(view: View) -> View:
    return public(unprocessable(view))


def signed_in(view: View) -> View:
    return role_required(Role.VIEWER)(unprocessable(view))


# Only the pages that are ours to offer: no sign-up, no change of address, no social sign-in.
urlpatterns = [
    path("accounts/login/", everybody(account.login), name="account_login"),
    path("accounts/logout/", everybody(account.logout), name="account_logout"),
    path("accounts/inactive/", everybody(account.account_inactive), name="account_inactive"),
    path("accounts/password/reset/", forgot, name="account_reset_password"),
    path("accounts/2fa/authenticate/", everybody(mfa.authenticate), name="mfa_authenticate"),
    path("accounts/reauthenticate/", signed_in(account.reauthenticate), name="account_reauthenticate"),
    path("accounts/password/change/", signed_in(account.password_change), name="account_change_password"),
    path("accounts/2fa/", signed_in(mfa.index), name="mfa_index"),
    path("accounts/2fa/reauthenticate/", signed_in(mfa.reauthenticate), name="mfa_reauthenticate"),
    path("accounts/2fa/totp/activate/", signed_in(totp.activate_totp), name="mfa_activate_totp"),
    path("accounts/2fa/totp/deactivate/", signed_in(totp.deactivate_totp), name="mfa_deactivate_totp"),
    path("accounts/2fa/recovery-codes/", signed_in(recovery_codes.view_recovery_codes), name="mfa_view_recovery_codes"),
    path(
        "accounts/2fa/recovery-codes/generate/",
        signed_in(recovery_codes.generate_recovery_codes),
        name="mfa_generate_recovery_codes",
    ),
    path(
        "accounts/2fa/recovery-codes/download/",
        signed_in(recovery_codes.download_recovery_codes),
        name="mfa_download_recovery_codes",
    ),
]
