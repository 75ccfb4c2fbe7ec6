"""The sampler's socket: everybody who wants the cards asks the one process that owns the driver.

A unix socket, mode 0600, one JSON object per line in each direction:

====================================================== =====================================
``{"op": "inventory"}``                                ``{"ok": true, "inventory": {...}}``
``{"op": "read"}``                                     ``{"ok": true, "reading": {...}}``
``{"op": "hold", "pid": N, "name": S, "gpus": [...]}`` ``{"ok": true}``, simulated only
``{"op": "release"}``                                  ``{"ok": true}``, simulated only
``{"op": "fault", "kind": S, "gpu": I, ...}``          ``{"ok": true}``, simulated only
====================================================== =====================================

``gpus`` of a hold: ``{"uuid": S or "index": I, "memory_used_bytes": N, "utilization": 0..1}``. A
hold replaces the connection's earlier one and ends with the connection, so that killing an engine
frees its memory as on a real card. ``fault`` takes the keywords of ``SimulatedRig.fault``.
Anything that cannot be done is answered ``{"ok": false, "error": "a sentence"}``.
"""

from __future__ import annotations

import contextlib
import fcntl
import inspect
import itertools
import json
import logging
import os
import socket
import socketserver
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from apps.hardware.codec import to_dict
from apps.hardware.protocol import GpuDriver, HardwareError, Inventory, Reading, Refused
from apps.hardware.simulated import SimulatedDriver, SimulatedRig

logger = logging.getLogger(__name__)

LINE_LIMIT_BYTES = 1 << 20
READING_STAYS_FRESH_SECONDS = 0.1
_PATH_LIMIT_BYTES = 107  # sockaddr_un.sun_path less its closing zero

_FAULT_KEYWORDS = frozenset(inspect.signature(SimulatedRig.fault).parameters) - {"self", "kind", "gpu"}


class HardwareServer:
    """Serves a driver on a unix socket; itself a GpuDriver for the process that runs it.

    ``inventory`` and ``read`` here and from every client take turns at the driver, and a reading
    younger than 0.1 s is given to all who ask.
    """

    def __init__(self, driver: GpuDriver, socket_path: str | Path) -> None:
        self.source = driver.source
        self._driver = driver
        self._path = Path(socket_path)
        self._access = threading.Lock()
        self._last: tuple[float, Reading] | None = None  # time.monotonic, reading
        self._listener: _Listener | None = None
        self._claim: BinaryIO | None = None

    def start(self) -> None:
        """Listen, in threads of its own. Raises HardwareError when the socket cannot be had."""
        if len(os.fsencode(self._path)) > _PATH_LIMIT_BYTES:
            raise HardwareError(
                f"The socket path {self._path} is longer than {_PATH_LIMIT_BYTES} bytes, "
                "more than the system allows. Use a shorter data directory."
            )
        try:
            self._claim = _claim(self._path)
            _remove_stale(self._path)
            self._listener = _Listener(str(self._path), self)
        except OSError as error:
            self.stop()
            raise HardwareError(f"The socket {self._path} cannot be made: {error.strerror}.") from error
        except HardwareError:
            self.stop()
            raise
        threading.Thread(target=self._listener.serve_forever, args=(0.1,), name="hardware-socket", daemon=True).start()

    def stop(self) -> None:
        """Stop listening, end every connection and remove the socket; the driver stays open."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.shutdown()
            # While the claim is held nobody else has replaced the socket file.
            self._path.unlink(missing_ok=True)
            listener.server_close()
            listener.end_connections()
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.close()

    def __enter__(self) -> HardwareServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def inventory(self) -> Inventory:
        with self._access:
            return self._driver.inventory()

    def read(self) -> Reading:
        with self._access:
            last = self._last
            if last is not None and time.monotonic() - last[0] < READING_STAYS_FRESH_SECONDS:
                return last[1]
            reading = self._driver.read()
            self._last = (time.monotonic(), reading)
            return reading

    def close(self) -> None:
        """Stop serving and close the driver."""
        self.stop()
        self._driver.close()

    # Requests

    def answer(self, line: bytes, owner: str) -> dict[str, Any]:
        """The answer to one request line of the connection ``owner``; never raises."""
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise HardwareError("A request is one JSON object per line.")
            operation = self._operations().get(str(request.get("op")))
            if operation is None:
                known = ", ".join(self._operations())
                raise HardwareError(f"There is no operation {request.get('op')!r:.40}; there are {known}.")
            return {"ok": True} | operation(request, owner)
        except HardwareError as error:
            return {"ok": False, "error": str(error)}
        except (ValueError, RecursionError):
            return {"ok": False, "error": "The line is not JSON; a request is one JSON object per line."}
        except Exception:
            logger.exception("the hardware socket failed on a request")
            return {"ok": False, "error": "The sampler failed on this request; its log has the details."}

    def forget(self, owner: str) -> None:
        """The connection ended: what it held is free."""
        if isinstance(self._driver, SimulatedDriver):
            self._driver.rig.release(owner)
            self._last = None

    def _operations(self) -> dict[str, Callable[[dict[str, Any], str], dict[str, Any]]]:
        return {
            "inventory": lambda request, owner: {"inventory": to_dict(self.inventory())},
            "read": lambda request, owner: {"reading": to_dict(self.read())},
            "set_power_limit": self._set_power_limit,
            "hold": self._hold,
            "release": self._release,
            "fault": self._fault,
        }

    def set_power_limit(self, gpu_uuid: str, watts: float) -> Refused | None:
        with self._access:
            self._last = None
            return self._driver.set_power_limit(gpu_uuid, watts)

    def _set_power_limit(self, request: dict[str, Any], owner: str) -> dict[str, Any]:
        watts = request.get("watts")
        if isinstance(watts, bool) or not isinstance(watts, (int, float)) or not 1 <= watts <= 2000:
            raise HardwareError("A power limit needs watts, a number from 1 to 2000.")
        refused = self.set_power_limit(str(request.get("gpu_uuid")), float(watts))
        return {"refused": refused.reason if refused else None}

    def _hold(self, request: dict[str, Any], owner: str) -> dict[str, Any]:
        gpus = request.get("gpus")
        if not isinstance(gpus, list):
            raise HardwareError("A hold needs gpus, a list of cards.")
        self._simulated_rig("hold").hold(owner, request.get("pid"), str(request.get("name", "")), gpus)
        self._last = None  # who changes the cards sees the change in the next reading
        return {}

    def _release(self, request: dict[str, Any], owner: str) -> dict[str, Any]:
        self._simulated_rig("release").release(owner)
        self._last = None
        return {}

    def _fault(self, request: dict[str, Any], owner: str) -> dict[str, Any]:
        rig = self._simulated_rig("fault")
        keywords = {key: value for key, value in request.items() if key not in ("op", "kind", "gpu")}
        unknown = sorted(set(keywords) - _FAULT_KEYWORDS)
        if unknown:
            raise HardwareError(f"A fault has no {unknown[0]!r:.40}; it may have {', '.join(sorted(_FAULT_KEYWORDS))}.")
        rig.fault(str(request.get("kind")), request.get("gpu"), **keywords)
        self._last = None
        return {}

    def _simulated_rig(self, operation: str) -> SimulatedRig:
        # Not under self._access: the rig has its own lock, and an engine must be able to let go of
        # its memory while a reading hangs.
        if not isinstance(self._driver, SimulatedDriver):
            raise HardwareError(f"Only simulated cards take a {operation}; these are read through {self.source}.")
        return self._driver.rig


class _Listener(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, path: str, hardware: HardwareServer) -> None:
        self.hardware = hardware
        self.numbers = itertools.count(1)
        self._connections: set[socket.socket] = set()
        self._connections_lock = threading.Lock()
        super().__init__(path, _Connection)

    def server_bind(self) -> None:
        # The mode before bind is the mode of the file from its first moment (Linux); chmod for the rest.
        os.fchmod(self.fileno(), 0o600)
        super().server_bind()
        os.chmod(str(self.server_address), 0o600)

    def remember(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.add(connection)

    def drop(self, connection: socket.socket) -> None:
        with self._connections_lock:
            self._connections.discard(connection)

    def end_connections(self) -> None:
        with self._connections_lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _Connection(socketserver.StreamRequestHandler):
    server: _Listener

    def handle(self) -> None:
        owner = f"connection {next(self.server.numbers)}"
        self.server.remember(self.request)
        try:
            while line := self.rfile.readline(LINE_LIMIT_BYTES + 1):
                if len(line) > LINE_LIMIT_BYTES:
                    # Where the next request would begin is unknown, so the connection ends.
                    self._send({"ok": False, "error": "The line is longer than 1 MiB; the connection is closed."})
                    return
                if not line.endswith(b"\n"):
                    return  # the client died in the middle of a request
                self._send(self.server.hardware.answer(line, owner))
        except OSError:
            pass  # the client went away
        finally:
            self.server.drop(self.request)
            self.server.hardware.forget(owner)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def _send(self, answer: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")


def _claim(path: Path) -> BinaryIO:
    """Lock ``path``.lock for as long as the server lives, so that two starting at once cannot both win."""
    claim = Path(f"{path}.lock").open("ab")  # noqa: SIM115 - stays open while the server lives
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        claim.close()
        raise _taken(path) from error
    return claim


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that died; anything else at the path is not ours to remove."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise HardwareError(f"{path} exists and is not a socket; move it away so that the sampler can listen.")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except (TimeoutError, BlockingIOError):
            pass  # somebody listens, but is too busy to answer
    raise _taken(path)


def _taken(path: Path) -> HardwareError:
    return HardwareError(f"Another sampler already serves {path}; stop it first (one process owns the cards).")
