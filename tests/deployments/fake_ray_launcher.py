"""Stands where Ray's Python stands: opens the launcher's door and says what a file beside it says of the replicas.

Takes the launcher's own command line; ``STATES`` names a file with a JSON list of Serve's words, one per replica.
"""

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

arguments = sys.argv[1:]
port = int(arguments[arguments.index("--port") + 1])
key = os.environ["RIGPANEL_ENGINE_KEY"]
states_file = Path(os.environ["STATES"])


class Door(BaseHTTPRequestHandler):
    def answer(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        states = json.loads(states_file.read_text())
        if self.path == "/health":
            self.answer(200, {})
        elif self.headers.get("Authorization") != f"Bearer {key}":
            self.answer(401, {})
        else:
            places = [{"index": i, "state": state} for i, state in enumerate(states)]
            self.answer(200, {"status": "RUNNING", "message": "", "places": places})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = self.headers.get("Authorization") == f"Bearer {key}"
        self.answer(200 if known else 401, {"choices": [{"text": "Paris"}]})

    def log_message(self, *_: object) -> None:
        pass


sys.stdout.write("[rigpanel] warning: It listens wide.\n")
sys.stdout.flush()
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
ThreadingHTTPServer(("127.0.0.1", port), Door).serve_forever()
