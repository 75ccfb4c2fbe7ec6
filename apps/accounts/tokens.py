"""How keys and links are stored. Apart from the services, which import allauth: the gateway does without it."""

from __future__ import annotations

import hashlib
import hmac

from django.conf import settings

KEYS_EPOCH = "keys"


def token_digest(token: str) -> str:
    """The keyed hash under which a key or link is stored. Keys carry 256 random bits, so a fast
    keyed hash is enough: there is no dictionary to try."""
    return hmac.new(settings.API_KEY_PEPPER.encode(), token.encode(), hashlib.sha256).hexdigest()


def people_secret(digest: str) -> str:
    """What Open WebUI signs with (``FORWARD_USER_INFO_HEADER_JWT_SECRET``) whom it sends behind the key of that digest.

    Derived, so that it is kept nowhere, ends with its key, and the gateway needs no settings of Open WebUI's.
    """
    return hmac.new(settings.API_KEY_PEPPER.encode(), b"people behind " + digest.encode(), hashlib.sha256).hexdigest()
