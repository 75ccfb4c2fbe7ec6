"""``python -m ray.scripts.scripts start ...``: a raylet sleeps, the head answers as Serve would.

``FAKE_RAY`` is what the application's status becomes; with ``dies`` the head ends at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

arguments = sys.argv[1:]
scenario = os.environ.get("FAKE_RAY", "RUNNING")
application: dict[str, Any] = {}


def value_of(name: str) -> str:
    return arguments[arguments.index(name) + 1]


session = Path(value_of("--temp-dir"))


def nodes() -> list[dict[str, Any]]:
    found = [json.loads(file.read_text()) for file in sorted(session.glob("node-*.json"))]
    return [node for node in found if Path(f"/proc/{node['node_id']}").exists()]


def status() -> dict[str, Any]:
    replicas = [{"node_id": n["node_id"], "replica_id": n["node_id"], "state": "RUNNING", "pid": 1} for n in nodes()]
    message = "2 replicas that have taken more than 30s to be scheduled" if scenario == "INFEASIBLE" else "it broke"
    deployment = {"name": "M", "message": "", "replicas": replicas if scenario == "RUNNING" else []}
    said = "DEPLOYING" if scenario == "INFEASIBLE" else scenario
    return {"status": said, "message": "" if said == "RUNNING" else message, "deployments": {"M": deployment}}


class Api(BaseHTTPRequestHandler):
    def answer(self, body: object) -> None:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
        content = json.dumps(body).encode()
        self.send_response(200 if self.headers.get("Authorization") == f"Bearer {token}" else 401)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        if self.path.startswith("/api/v0/nodes"):
            self.answer({"data": {"result": {"result": nodes()}}})
        elif self.path.startswith("/api/v0/placement_groups"):
            group = {"stats": {"scheduling_state": scenario}, "bundles": [{"unit_resources": {"GPU": 2.0}}]}
            self.answer({"data": {"result": {"result": [group]}}})
        else:
            self.answer({"applications": {"model": status()} if application else {}})

    def do_PUT(self) -> None:
        application.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer({})

    def do_DELETE(self) -> None:
        application.clear()
        self.answer({})

    def log_message(self, *_: object) -> None:
        pass


if scenario == "dies":
    sys.exit("gcs_server: no space in /dev/shm")
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
seen = {name: os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "NCCL_P2P_LEVEL", "BOUND")}
node = {
    "node_id": str(os.getpid()),
    "state": "ALIVE",
    "resources_total": json.loads(value_of("--resources")),
    "env": seen,
}
(session / f"node-{os.getpid()}.json").write_text(json.dumps(node))
if "--head" in arguments:
    ThreadingHTTPServer(("127.0.0.1", int(value_of("--dashboard-port"))), Api).serve_forever()
while True:
    time.sleep(60)
