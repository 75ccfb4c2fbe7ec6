"""Links that let people in: made absolute, and sent by mail where a mail server is set."""

from __future__ import annotations

import structlog
from django.conf import settings
from django.core.mail import send_mail

log = structlog.get_logger(__name__)


def absolute(path: str) -> str:
    return f"{settings.PUBLIC_URL}{path}"


def mail_link(address: str, subject: str, sentence: str, link: str) -> bool:
    """Send a link; False when no mail server is set or it refused: the link can be copied instead."""
    if not settings.EMAIL_ENABLED or not address:
        return False
    try:
        send_mail(f"rigpanel: {subject}", f"{sentence}\n\n{link}\n", settings.DEFAULT_FROM_EMAIL, [address])
    except Exception as error:  # smtplib, socket and ssl errors alike; the page shows the link to copy
        log.warning("mail not sent", subject=subject, error=str(error))
        return False
    return True
