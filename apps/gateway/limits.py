"""The gateway's limits in one place, so that a test can shorten them and a reader find them."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Times in seconds, sizes in bytes.

    ``body_bytes``            largest request body; more is 413
    ``buffered_bytes``        of all bodies that are held in memory at once; more is 503
    ``json_elements``         commas, braces and brackets of one body; see ``protocol.parse_body``
    ``upload_bytes``          largest multipart body (audio), which streams through; more is 413
    ``body_s``                for a client to send its body; in an upload, between two pieces
    ``wait_s``                how long a request waits for a held route (RIGPANEL_GATEWAY_WAIT_S)
    ``comment_after_s``       a waiting stream gets its status line and first comment after this. Until then its
                              answer can still be any status; afterwards errors can only be events
    ``comment_every_s``       then a comment this often
    ``stale_s``               how long known keys and routes are used while the database does not answer
    ``poll_s``                between two looks at the epochs; hints from the store make it sooner
    ``menu_s``                how old the list of models that could be loaded may be; routes are younger
    ``report_s``              between two reports of in-flight counts while something drains
    ``counts_s``              between two reports of changed counts otherwise: pages show them and ask before they cut
    ``heartbeat_s``           between two signs of life otherwise
    ``connect_s``             to connect to an engine. There is no limit on its first token
    """

    body_bytes: int = 32 * MIB
    buffered_bytes: int = 512 * MIB
    json_elements: int = 2_000_000
    upload_bytes: int = 512 * MIB
    body_s: float = 120.0
    wait_s: float = 120.0
    comment_after_s: float = 1.0
    comment_every_s: float = 5.0
    stale_s: float = 300.0
    poll_s: float = 0.5
    menu_s: float = 5.0
    report_s: float = 0.2
    counts_s: float = 1.0
    heartbeat_s: float = 5.0
    connect_s: float = 3.0
