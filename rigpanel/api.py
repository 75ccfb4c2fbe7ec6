"""The API at /api/v1/: one router per app, one shape of errors, and its description.

Imported by ``urls`` only, so that the workers never load the library behind it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

from django.conf import settings
from django.core.serializers.json import DjangoJSONEncoder
from django.http import HttpRequest, HttpResponse, HttpResponseNotAllowed, JsonResponse
from django.shortcuts import render
from django.urls import URLPattern, path, re_path
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_safe
from ninja import NinjaAPI, Router

from apps.accounts.api import router as people
from apps.audit.api import router as audit
from apps.catalog.api import router as models
from apps.common.access import public, role_required
from apps.common.api import ErrorOut, Needs, error_response, install_error_handlers
from apps.common.roles import Role
from apps.deployments.api import router as serving
from apps.deployments.policies.api import router as policies
from apps.deployments.policy_api import router as restarts
from apps.gateway.alias_api import router as aliases
from apps.gateway.api import router as use
from apps.installs.api import router as installs
from apps.jobs.api import router as jobs
from apps.profiles.api import router as profiles
from apps.rigs.api import router as rigs
from apps.telemetry.api import router as telemetry
from apps.verification.api import router as verification
from rigpanel.apidocs import described

PREFIX = "/api/v1"
REF_TEMPLATE = "#/components/schemas/{model}"
DESCRIPTION = """The control panel of a shared GPU rig.

Call it with a key of yours (`Authorization: Bearer rp-…`) or with the session's cookie and `X-CSRFToken`.
What takes time answers 202 with its Job; ask `GET /jobs/{job}` until `state` is *succeeded*, *failed* (the work said
no), *errored* (our bug) or *cancelled*. Lists come as `items` and `count`. Every error has the same shape."""

ROUTERS: tuple[Router, ...] = (
    rigs,
    models,
    profiles,
    serving,
    restarts,
    policies,
    aliases,
    jobs,
    telemetry,
    verification,
    installs,
    people,
    use,
    audit,
)
api = NinjaAPI(
    title="rigpanel", version="1", description=DESCRIPTION, urls_namespace="api", openapi_url=None, docs_url=None
)
install_error_handlers(api)
for router in ROUTERS:
    api.add_router("", router)


@dataclass(frozen=True, slots=True)
class OperationInfo:
    """``path`` without the types of its parameters, as OpenAPI writes it."""

    method: str
    path: str
    role: Role


@lru_cache
def operations() -> tuple[OperationInfo, ...]:
    """Everything the API offers. Raises TypeError for an operation that does not declare its role."""
    found = []
    for bound in api._get_bound_routers():
        for route, view in bound.path_operations.items():
            for operation in view.operations:
                declared = [check for check in operation.auth_callbacks if isinstance(check, Needs)]
                if len(declared) != 1 or len(operation.auth_callbacks) != 1:
                    raise TypeError(f"{operation.methods} {route} does not declare its role with needs(Role…).")
                shown = PREFIX + re.sub(r"{[^}:]+:", "{", route)
                found += [OperationInfo(method, shown, declared[0].required_role) for method in operation.methods]
    return tuple(found)


@lru_cache
def openapi_schema() -> dict[str, Any]:
    """Ninja's description, plus what it cannot know: both ways to sign in, the role per operation, the errors."""
    raw = json.dumps(api.get_openapi_schema(path_prefix=f"{PREFIX}/"), cls=DjangoJSONEncoder)
    schema: dict[str, Any] = json.loads(raw)
    components = schema.setdefault("components", {})
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "A key from /me/ or `manage.py createkey`."},
        "session": {"type": "apiKey", "in": "cookie", "name": settings.SESSION_COOKIE_NAME},
    }
    error = ErrorOut.model_json_schema(ref_template=REF_TEMPLATE)
    components["schemas"] |= {**error.pop("$defs"), "ErrorOut": error}
    components["schemas"] = dict(sorted(components["schemas"].items()))
    refusal = {"$ref": REF_TEMPLATE.format(model="ErrorOut")}
    for operation in operations():
        details = schema["paths"][operation.path][operation.method.lower()]
        details["security"] = [{"key": []}, {"session": []}]
        details["x-role"] = operation.role.value
        details["responses"]["default"] = {
            "description": "Anything else",
            "content": {"application/json": {"schema": refusal}},
        }
    return schema


@public
@require_safe
def openapi_json(request: HttpRequest) -> HttpResponse:
    return JsonResponse(openapi_schema(), json_dumps_params={"indent": 1})


@role_required(Role.VIEWER)
@require_safe
def docs(request: HttpRequest) -> HttpResponse:
    """The description as a page of ours: the usual viewers come from a CDN and need inline scripts."""
    return render(request, "api/docs.html", {"base": f"{settings.PUBLIC_URL}{PREFIX}", **described(openapi_schema())})


@public
@csrf_exempt
def nothing_here(request: HttpRequest, rest: str) -> HttpResponse:
    return error_response(404, f"There is nothing at {PREFIX}/{rest[:200]}; see {PREFIX}/docs.")


def _own_405(pattern: URLPattern) -> URLPattern:
    view = pattern.callback

    @wraps(view)
    def answered(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        response = view(request, *args, **kwargs)
        if not isinstance(response, HttpResponseNotAllowed):
            return response  # type: ignore[no-any-return]
        allowed = response.headers["Allow"]
        refusal = error_response(405, f"{request.method} does nothing here; this address takes {allowed}.")
        refusal["Allow"] = allowed
        return refusal

    pattern.callback = answered
    return pattern


urlpatterns = [
    path("openapi.json", openapi_json, name="openapi"),
    path("docs", docs, name="docs"),
    *(_own_405(pattern) for pattern in api.urls[0] if pattern.name != "api-root"),  # type: ignore[arg-type, union-attr]
    re_path(r"^(?P<rest>.*)$", nothing_here, name="nothing"),
]
