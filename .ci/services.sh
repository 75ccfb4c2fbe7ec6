# Sourced by .ci/run: a private PostgreSQL and Redis on loopback, in a folder that goes away with the shell.

start_services() {
    services=$(mktemp -d /tmp/rp-ci.XXXXXX)
    chmod 755 "$services"
    pg_bin=$(dirname "$(find /usr/lib/postgresql -path '*/bin/initdb' | sort -V | tail -n 1)")
    pg_port=$(free_port)
    redis_port=$(free_port)
    pg_password=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    # initdb refuses to run as root.
    if [ "$(id -u)" = 0 ]; then as_postgres="runuser -u postgres --"; else as_postgres=""; fi
    mkdir "$services/pg"
    printf '%s' "$pg_password" > "$services/pg/password"
    chmod 600 "$services/pg/password"
    if [ "$(id -u)" = 0 ]; then chown -R postgres "$services/pg"; fi
    (
        cd "$services/pg"
        $as_postgres "$pg_bin/initdb" -D "$services/pg/data" -U rigpanel --pwfile="$services/pg/password" \
            --auth=scram-sha-256 --encoding=UTF8 --locale=C --no-sync > /dev/null
        # Durability is not what is tested here; speed is.
        $as_postgres "$pg_bin/pg_ctl" -D "$services/pg/data" -s -w -l "$services/pg/log" \
            -o "-p $pg_port -c listen_addresses=127.0.0.1 -k $services/pg -c fsync=off -c full_page_writes=off -c max_connections=200" start
    )
    redis-server --port "$redis_port" --bind 127.0.0.1 --save "" --dir "$services" --daemonize yes \
        --pidfile "$services/redis.pid" --logfile "$services/redis.log" > /dev/null
    export RIGPANEL_TEST_DATABASE_URL="postgres://rigpanel:$pg_password@127.0.0.1:$pg_port/postgres"
    export RIGPANEL_TEST_REDIS_URL="redis://127.0.0.1:$redis_port"
}

stop_services() {
    [ -n "${services:-}" ] || return 0
    ( cd / && $as_postgres "$pg_bin/pg_ctl" -D "$services/pg/data" -s -m immediate stop ) || true
    if [ -f "$services/redis.pid" ]; then kill "$(cat "$services/redis.pid")" || true; fi
    rm -rf "$services"
    services=""
}

free_port() {
    .venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
