"""What the scripts share: the ``--json`` option, and the machine that figures were taken on."""

from __future__ import annotations

import argparse
import os
from typing import Any


def parser(usage: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true")
    return made


def machine() -> dict[str, Any]:
    """Call it before anything is measured."""
    return {"cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)}
