#!/usr/bin/env python
"""rigpanel's command line; ``manage.py help`` lists the commands."""

from __future__ import annotations

import os
import sys


def main() -> int:
    # The sampler lives as long as the panel and needs few of its apps: 20 MB less.
    module = "rigpanel.settings_sampler" if sys.argv[1:2] == ["sampler"] else "rigpanel.settings"
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", module)
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
