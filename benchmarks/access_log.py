"""What the gateway's log line takes, beside the same line by structlog.

    .venv/bin/python -OO benchmarks/access_log.py [--together N]

Both are written to /dev/null by the handlers that the panel configures, in turns, so that other load on the machine
meets both. ``--together``: how many requests end within the tenth of a second after which their lines are written.
Compare the ratio, not the times.
"""

from __future__ import annotations

import argparse
import logging.config
import os
import statistics
import sys
import timeit
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
TURNS = 101
LINES = 600


async def main() -> None:
    parser = argparse.ArgumentParser(description="The gateway's log line beside structlog's.")
    parser.add_argument("--together", type=int, default=30)
    together: int = parser.parse_args().together

    import structlog

    from apps.gateway.access_log import AccessLog
    from rigpanel.logs import logging_config

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    logging.config.dictConfig(logging_config(debug=False))
    ours, theirs = AccessLog(), structlog.get_logger("apps.gateway.application")
    id, path, model = "req-0123456789abcdef01234567", "/v1/chat/completions", "coder"

    def by_hand() -> None:
        for _ in range(together):
            ours.request(
                request_id=id, method="POST", path=path, model=model, key_id=3, user_id=4, status=200, outcome="ok",
                sent_bytes=1200, duration_s=0.0123,
            )  # fmt: skip
        ours.flush()

    def by_structlog() -> None:
        for _ in range(together):
            theirs.info(
                "request", request_id=id, method="POST", path=path, model=model, key=3, user=4, status=200,
                outcome="ok", bytes=1200, ms=12.3,
            )  # fmt: skip

    number = max(1, LINES // together)
    pairs = [(timeit.timeit(by_hand, number=number), timeit.timeit(by_structlog, number=number)) for _ in range(TURNS)]
    lines = number * together
    print(f"by hand                 {statistics.median(p[0] for p in pairs) / lines * 1e6:6.1f} µs a line")
    print(f"structlog               {statistics.median(p[1] for p in pairs) / lines * 1e6:6.1f} µs a line")
    print(f"structlog / by hand     {statistics.median(p[1] / p[0] for p in pairs):6.1f}")


uvloop.run(main())
