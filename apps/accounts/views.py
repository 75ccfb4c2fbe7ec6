"""Coming in by a link, and the team's page."""

from __future__ import annotations

from typing import Any

from allauth.core import ratelimit
from django.conf import settings
from django.contrib import messages
from django.contrib.auth import login
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_http_methods, require_POST, require_safe

from apps.accounts import services
from apps.accounts.forms import ForgotForm, InviteForm, JoinForm, MemberForm, NewPasswordForm
from apps.accounts.links import absolute, mail_link
from apps.accounts.models import User
from apps.accounts.selectors import (
    invitation_get,
    invitations_open,
    reset_user,
    user_get,
    user_list,
    with_second_factor,
)
from apps.common.access import public, role_required
from apps.common.actors import PANEL, actor_of
from apps.common.errors import ApplicationError, Invalid
from apps.common.roles import Role

BACKEND = "allauth.account.auth_backends.AuthenticationBackend"


@public
@never_cache
@sensitive_post_parameters("password", "password_again")
@require_http_methods(["GET", "HEAD", "POST"])
def join(request: HttpRequest, token: str) -> HttpResponse:
    """An invitation or the first owner's set-up link. Opening it uses nothing up: chat programs
    fetch links to preview them."""
    invitation = services.invitation_open(token)
    if invitation is None:
        return render(request, "accounts/link_spent.html", {"kind": "invitation"}, status=404)
    if request.user.is_authenticated:
        return render(request, "accounts/join_signed_in.html", {"invitation": invitation}, status=409)
    form = JoinForm(request.POST or None, invitation=invitation)
    if request.method == "POST":
        if limited := too_many(request, action="signup"):
            return limited
        if form.is_valid():
            data = form.cleaned_data
            try:
                user = services.invitation_accept(
                    token, email=data["email"], password=data["password"], name=data["name"].strip()
                )
            except ApplicationError as error:
                _add_errors(form, error)
            else:
                login(request, user, backend=BACKEND)
                return redirect("/")
    context = {"form": form, "invitation": invitation}
    return render(request, "accounts/join.html", context, status=422 if form.errors else 200)


@public
@never_cache
@sensitive_post_parameters("password", "password_again")
@require_http_methods(["GET", "HEAD", "POST"])
def reset(request: HttpRequest, uid: str, token: str) -> HttpResponse:
    """Set a new password. The link is spent with it, because it is signed over the old one's hash."""
    user = reset_user(uid, token)
    if user is None:
        return render(request, "accounts/link_spent.html", {"kind": "reset"}, status=404)
    form = NewPasswordForm(request.POST or None, user=user)
    if request.method == "POST":
        if limited := too_many(request, action="reset_password_from_key"):
            return limited
        if form.is_valid():
            services.password_set(user, form.cleaned_data["password"], actor=actor_of(user))
            # To sign-in rather than in: a link must not get past somebody's second factor.
            messages.success(request, "The new password is set and every other session has ended. Sign in with it.")
            return redirect("account_login")
    return render(request, "accounts/reset.html", {"form": form, "person": user}, status=422 if form.errors else 200)


@public
@never_cache
@require_http_methods(["GET", "HEAD", "POST"])
def forgot(request: HttpRequest) -> HttpResponse:
    """Mails a reset link where a mail server is set; elsewhere says who can make one."""
    form = ForgotForm(request.POST or None) if settings.EMAIL_ENABLED else None
    if form is not None and request.method == "POST" and form.is_valid():
        address = form.cleaned_data["email"].lower()
        if limited := too_many(request, action="reset_password", key=address):
            return limited
        user = User.objects.filter(email=address, is_active=True).first()
        if user is not None:
            link = absolute(services.reset_path(user, actor=PANEL))
            mail_link(user.email, "set a new password", "Somebody, we hope you, asked for this link:", link)
        # The same answer for strangers: it does not tell who is on the team.
        return render(request, "accounts/forgot.html", {"sent_to": address})
    status = 422 if form is not None and form.errors else 200
    return render(request, "accounts/forgot.html", {"form": form}, status=status)


@role_required(Role.VIEWER)
@require_safe
def team(request: HttpRequest) -> HttpResponse:
    """Everybody sees who shares the rig; the rest of the page is the owners'."""
    return _team(request)


@role_required(Role.OWNER)
@never_cache
@require_POST
def invite(request: HttpRequest) -> HttpResponse:
    form = InviteForm(request.POST)
    if not form.is_valid():
        return _team(request, form=form, status=422)
    address = form.cleaned_data["email"]
    try:
        invitation, path = services.invitation_create(
            role=Role(form.cleaned_data["role"]), email=address, actor=actor_of(request.user)
        )
    except ApplicationError as error:
        _add_errors(form, error)
        return _team(request, form=form, status=422)
    link = absolute(path)
    mailed = mail_link(
        address, "you are invited", f"{invitation.invited_by_name} invites you to the rig's panel:", link
    )
    # Shown in this answer only: neither session nor database keeps the link.
    new_link = {"what": f"Invitation for {address or 'anybody'} as {invitation.role}", "link": link, "mailed": mailed}
    return _team(request, new_link=new_link)


@role_required(Role.OWNER)
@require_POST
def withdraw(request: HttpRequest, pk: int) -> HttpResponse:
    services.invitation_revoke(invitation_get(pk), actor=actor_of(request.user))
    messages.success(request, "The invitation is withdrawn; its link no longer works.")
    return redirect("accounts:team")


@role_required(Role.OWNER)
@require_POST
def member(request: HttpRequest, pk: int) -> HttpResponse:
    """Change somebody's role, deactivate or reactivate them."""
    person = user_get(pk)
    form = MemberForm(request.POST)
    if not form.is_valid():
        raise Invalid(
            "That is not a role of this panel.", fields={k: [str(e) for e in v] for k, v in form.errors.items()}
        )
    role = Role(form.cleaned_data["role"]) if form.cleaned_data["role"] else None
    person = services.user_update(
        person, actor=actor_of(request.user), role=role, is_active=form.cleaned_data["is_active"]
    )
    state = (
        f"is now {person.get_role_display().lower()}"
        if person.is_active
        else "is deactivated and signed out everywhere"
    )
    messages.success(request, f"{person.display_name} {state}.")
    return redirect("accounts:team")


@role_required(Role.OWNER)
@never_cache
@require_POST
def reset_link(request: HttpRequest, pk: int) -> HttpResponse:
    person = user_get(pk)
    link = absolute(services.reset_path(person, actor=actor_of(request.user)))
    mailed = mail_link(person.email, "set a new password", "An owner of the panel made this link for you:", link)
    new_link = {"what": f"Link to set a new password for {person.email}", "link": link, "mailed": mailed}
    return _team(request, new_link=new_link)


@role_required(Role.OWNER)
@require_POST
def second_factor(request: HttpRequest, pk: int) -> HttpResponse:
    """Remove the second factor of somebody who lost it."""
    person = user_get(pk)
    services.second_factor_remove(person, actor=actor_of(request.user))
    messages.success(request, f"{person.display_name} signs in with the password alone now.")
    return redirect("accounts:team")


def _team(
    request: HttpRequest, *, form: InviteForm | None = None, new_link: dict[str, Any] | None = None, status: int = 200
) -> HttpResponse:
    owns = request.user.has_role(Role.OWNER)  # type: ignore[union-attr]
    context: dict[str, Any] = {"people": list(user_list()), "owns": owns, "roles": Role.choices}
    if not owns:
        context["people"] = [person for person in context["people"] if person.is_active]
    else:
        context |= {
            "form": form or InviteForm(),
            "invitations": list(invitations_open()),
            "new_link": new_link,
            "with_second_factor": with_second_factor(),
        }
    return render(request, "accounts/team.html", context, status=status)


def too_many(request: HttpRequest, **what: Any) -> HttpResponse | None:
    """The 429 page when allauth's limit for ``action`` is reached."""
    limited: HttpResponse | None = ratelimit.consume_or_429(request, **what)
    return limited


def _add_errors(form: Any, error: ApplicationError) -> None:
    """A service's refusal, beside the fields it is about."""
    known = {name: sentences for name, sentences in error.fields.items() if name in form.fields}
    for name, sentences in known.items():
        form.add_error(name, sentences)
    if not known:
        form.add_error("email" if error.code == "email_taken" else None, error.message)
