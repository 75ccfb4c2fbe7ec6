"""Who asks: the person behind a shared key, and where a request comes from."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import Sequence
from hashlib import sha256
from ipaddress import ip_network
from typing import Any

from apps.common.networks import Network, is_within
from apps.gateway import errors
from apps.gateway.protocol import RawHeaders

USER_HEADER = b"x-openwebui-user-jwt"
TASK_HEADER = b"x-openwebui-task"
ISSUER = "open-webui"
TOKEN_LENGTH_MAX = 4096
CLOCK_SKEW_S = 60.0


def networks_of(texts: Sequence[str]) -> tuple[Network, ...]:
    return tuple(ip_network(text, strict=False) for text in texts)


def named_person(headers: RawHeaders, secret: str) -> str | None:
    """The address of the person that Open WebUI names, signed with its key's secret; None when it names nobody.

    Raises 401 for a name that is not properly signed: something is set up wrongly, or somebody tries.
    """
    values = [value for name, value in headers if name == USER_HEADER]
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > TOKEN_LENGTH_MAX:
        raise errors.person_refused("The header X-OpenWebUI-User-Jwt is there twice or too long.")
    claims = _claims(values[0], secret.encode())
    now = time.time()
    expires_at, not_before = claims.get("exp"), claims.get("nbf", 0)
    if not isinstance(expires_at, int | float) or expires_at + CLOCK_SKEW_S < now:
        raise errors.person_refused("It has expired; are the clocks of both machines right?")
    if not isinstance(not_before, int | float) or not_before - CLOCK_SKEW_S > now:
        raise errors.person_refused("It is not valid yet; are the clocks of both machines right?")
    if claims.get("iss") != ISSUER:
        raise errors.person_refused("It was not issued by Open WebUI.")
    email = claims.get("email")
    if not isinstance(email, str) or not email:
        raise errors.person_refused("It names no address.")
    return email.lower()


def _claims(token: bytes, secret: bytes) -> dict[str, Any]:
    """The claims of an HS256 token. The algorithm is ours to say, not the token's: RFC 8725 §3.1."""
    signed, _, signature = token.rpartition(b".")
    head, _, body = signed.partition(b".")
    try:
        algorithm = json.loads(_decoded(head)).get("alg")
        expected = hmac.new(secret, signed, sha256).digest()
        genuine = algorithm == "HS256" and hmac.compare_digest(expected, _decoded(signature))
        claims = json.loads(_decoded(body)) if genuine else None
    except (ValueError, AttributeError, RecursionError):
        claims = None
    if not isinstance(claims, dict):
        raise errors.person_refused(
            "Its signature is wrong; FORWARD_USER_INFO_HEADER_JWT_SECRET must be what the panel showed with the key."
        )
    return claims


def _decoded(part: bytes) -> bytes:
    return base64.b64decode(part + b"=" * (-len(part) % 4), altchars=b"-_", validate=True)


def origin(client: tuple[str, int] | None, headers: RawHeaders, trusted: Sequence[Network]) -> str:
    """The address that a request comes from. What proxies wrote counts only where a trusted one wrote it: read from the
    right, the first address that is no trusted proxy's."""
    address = client[0] if client else ""
    # Some proxies add a line of their own below the client's instead of adding to it: together they are one list.
    forwarded = b",".join(value for name, value in headers if name == b"x-forwarded-for")
    if not forwarded or not is_within(address, trusted):
        return address
    for text in reversed(forwarded.decode("latin-1").split(",")):
        address = text.strip()
        if not is_within(address, trusted):
            break
    return address
