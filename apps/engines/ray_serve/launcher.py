"""One Ray Serve deployment as one process group: head, raylets, application and door.

Run with Ray's own Python: ``python -m apps.engines.ray_serve.launcher --port N --application JSON --replica JSON ...``.
It starts a Ray head and one raylet for each further replica, each seeing only its replica's cards, so that no
replica can straddle two pairs; submits the application by Serve's REST API; copies the workers' logs into its own;
opens the door (``door.py``) and watches. SIGTERM deletes the application, ends Ray and leaves nothing. When it is
killed itself, the kernel ends Ray's processes with it (PR_SET_PDEATHSIG, which Ray passes on to its own with
``--block``).

The key comes from ``RIGPANEL_ENGINE_KEY``; Ray's own token is made here, in a file. Exits with 0 after SIGTERM and with
1, after a line that begins with ``[rigpanel] failed:``, when Ray or the application ended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
from typing import Any

from aiohttp import web

from apps.engines.ray_serve.cluster import Cluster, Failed, say
from apps.engines.ray_serve.door import Door
from apps.engines.ray_serve.followers import LogFollower
from apps.engines.ray_serve.network import enter_private_network, why_not_private
from apps.engines.ray_serve.serving import Serving
from apps.engines.ray_serve.workspace import Workspace

LAST_WORDS_SECONDS = 1.0  # a failed start's reason is still on its way from a worker's file into our log


async def serve(cluster: Cluster, serving: Serving, listener: socket.socket, key: str) -> None:
    """Everything until it ends or is cancelled. Raises Failed."""
    door = Door(
        key=key,
        upstream=f"http://127.0.0.1:{cluster.ports['serve']}",
        metrics_urls=lambda: [f"http://127.0.0.1:{port}/metrics" for port in cluster.metrics_ports],
        report=serving.report,
    )
    runner = web.AppRunner(door.application(), access_log=None, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    tasks: set[asyncio.Task[None]] = set()
    try:
        say("starting Ray's head")
        await cluster.start(0)
        parts = (cluster.keep_raylets(), LogFollower(cluster.workspace.logs).run(), come_up(cluster, serving))
        tasks = {asyncio.create_task(part) for part in parts}
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(LAST_WORDS_SECONDS)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await runner.cleanup()
        await door.close()


async def come_up(cluster: Cluster, serving: Serving) -> None:
    await serving.wait_for_head()
    say("Ray's head answers")
    for index in range(1, len(cluster.seats)):
        await cluster.start(index)
    await serving.wait_for_nodes()
    say(f"{len(cluster.seats)} raylets joined")
    await serving.submit()
    say("application submitted")
    await serving.follow()


async def run(cluster: Cluster, application: dict[str, Any], listener: socket.socket, key: str) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    serving = Serving(cluster, application)
    work = asyncio.create_task(serve(cluster, serving, listener, key))
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
    code = 0
    if work.done():
        error = work.exception()
        say(f"failed: {error}" if isinstance(error, Failed) else f"failed: {error!r}")
        code = 1
    else:
        say("stopping")
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
    if serving.seen is not None and cluster.processes[0].returncode is None:
        await serving.delete()
    await cluster.stop()
    say("Ray has ended")
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ray_serve launcher", allow_abbrev=False, description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--network", choices=("private", "host"), default="private", help="private where permitted")
    parser.add_argument("--application", type=json.loads, required=True, help="one of Serve's applications, as JSON")
    parser.add_argument(
        "--replica",
        action="append",
        required=True,
        type=json.loads,
        metavar="SEAT",
        help="as JSON, see Cluster; one each",
    )
    return parser


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    key = os.environ.pop("RIGPANEL_ENGINE_KEY", "") or secrets.token_urlsafe(24)
    listener = socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
        listener.listen(128)
    except OSError as error:
        say(f"failed: [Errno {error.errno}] {error.strerror}: {args.host}:{args.port}")
        return 1
    private = False
    if args.network == "private":
        why_not = why_not_private()
        if why_not:
            say(f"no network of its own here ({why_not}); Ray's ports are on the host's")
        else:
            enter_private_network()
            private = True
            say("Ray is in a network of its own, with only loopback")
    workspace = Workspace.make(private=private)
    try:
        return asyncio.run(run(Cluster(workspace, args.replica), args.application, listener, key))
    finally:
        shutil.rmtree(workspace.directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
