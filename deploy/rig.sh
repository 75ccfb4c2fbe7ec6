#!/bin/sh
# Runs in the container of a rig that upgrades never recreate: engines are processes of this container.
#
# The code does not come from this container's image but from the volume /release, where each upgrade puts a
# new folder and then moves the link "current". When it moves, the workers and the sampler are started anew
# from there. Engines run in sessions of their own and do not notice; `docker compose stop rig` ends them too.
set -eu

panel=""
started=""

stop_panel() {
    [ -n "$panel" ] || return 0
    kill -TERM "$panel" 2> /dev/null || true
    wait "$panel" 2> /dev/null || true
    panel=""
}
trap 'stop_panel; exit 0' TERM INT

while true; do
    release=$(readlink -f "${RIGPANEL_RELEASE:-/release}/current" || true)
    if [ -n "$panel" ] && ! kill -0 "$panel" 2> /dev/null; then
        panel="" # it ended by itself, say because the database was away: again, after a moment
        started=""
    fi
    if [ -n "$release" ] && [ "$release" != "$started" ]; then
        stop_panel
        cd "$release"
        .venv/bin/python manage.py up --only control,verify,sampler &
        panel=$!
        started=$release
    fi
    # In the background and waited for, so that a signal is heeded at once.
    sleep 3 &
    wait $! || true
done
