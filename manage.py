#!/usr/bin/env python
"""rigpanel's command line; ``manage.py help`` lists the commands."""

from __future__ import annotations

import os
import sys


def main() -> int:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "rigpanel.settings")
    from apps.common.loading import loading
    from rigpanel.environment import ConfigError

    try:
        with loading():
            import django
            from django.core.management import execute_from_command_line

            django.setup()  # reads the environment now, so that a mistake in it is one sentence
        execute_from_command_line(sys.argv)
    except ConfigError as error:
        print(f"rigpanel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
