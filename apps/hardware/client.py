"""The cards as seen by every process but the sampler: a GpuDriver over the sampler's socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from apps.hardware.codec import inventory_from_dict, reading_from_dict
from apps.hardware.protocol import HardwareError, Inventory, Reading, Refused


class HardwareClient:
    """Connects with the first call and again with the next one after the sampler was away.

    Threads may share it. A hold lives as long as the connection; after a reconnect the client
    asks for it again before anything else, because a real card would not have forgotten.
    """

    source = "sampler"

    def __init__(self, socket_path: str | Path, timeout: float = 5.0) -> None:
        self._path = str(socket_path)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._file: BinaryIO | None = None
        self._held: dict[str, Any] | None = None

    def inventory(self) -> Inventory:
        """Raises HardwareError when the sampler is not there or cannot reach the cards."""
        return inventory_from_dict(self._ask({"op": "inventory"}).get("inventory"))

    def read(self) -> Reading:
        """Raises HardwareError when the sampler is not there or cannot reach the cards."""
        return reading_from_dict(self._ask({"op": "read"}).get("reading"))

    def set_power_limit(self, gpu_uuid: str, watts: float) -> Refused | None:
        """Raises HardwareError when the sampler is not there or cannot reach the cards."""
        reason = self._ask({"op": "set_power_limit", "gpu_uuid": gpu_uuid, "watts": watts}).get("refused")
        return Refused(str(reason)) if reason else None

    def hold(self, pid: int, name: str, gpus: Sequence[Mapping[str, object]]) -> None:
        """Put a process on simulated cards in place of this client's earlier hold (see ``server``)."""
        request = {"op": "hold", "pid": pid, "name": name, "gpus": [dict(gpu) for gpu in gpus]}
        self._ask(request)
        self._held = request

    def release(self) -> None:
        """Give back what this client holds."""
        self._held = None
        self._ask({"op": "release"})

    def fault(self, kind: str, gpu: int | None = None, **details: object) -> None:
        """Break or mend a simulated card (see ``SimulatedRig.fault``)."""
        self._ask({"op": "fault", "kind": kind, "gpu": gpu} | details)

    def close(self) -> None:
        """Disconnect, which ends a hold; a later call connects anew."""
        with self._lock:
            self._held = None
            self._disconnect()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            fresh = self._socket is None
            try:
                answer = self._exchange(request)
            except _Gone:
                self._disconnect()
                if fresh:
                    raise HardwareError(self._sentence("ended the connection")) from None
                # The sampler was restarted since the last call. All operations may be repeated.
                try:
                    answer = self._exchange(request)
                except _Gone:
                    self._disconnect()
                    raise HardwareError(self._sentence("ended the connection")) from None
        if answer.get("ok") is not True:
            raise HardwareError(str(answer.get("error", "The sampler refused without a reason.")))
        return answer

    def _connect(self) -> tuple[socket.socket, BinaryIO]:
        if self._socket is not None and self._file is not None:
            return self._socket, self._file
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self._timeout)
        try:
            connection.connect(self._path)
        except OSError as error:
            connection.close()
            raise HardwareError(self._sentence("is not running")) from error
        self._socket = connection
        self._file = connection.makefile("rb")
        if self._held is not None:
            self._exchange(self._held)
        return self._socket, self._file

    def _exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        connection, answers = self._connect()
        try:
            connection.sendall(json.dumps(request).encode() + b"\n")
            line = answers.readline()
        except TimeoutError as error:
            # A late answer would be taken for that of the next request.
            self._disconnect()
            sentence = self._sentence(f"did not answer within {self._timeout:g} s; the driver may hang")
            raise HardwareError(sentence) from error
        except OSError as error:
            raise _Gone from error
        if not line.endswith(b"\n"):
            raise _Gone
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._disconnect()
            raise HardwareError(f"What listens on {self._path} does not speak as a sampler does.")
        return answer

    def _disconnect(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._socket is not None:
            self._socket.close()
        self._socket = self._file = None

    def _sentence(self, what: str) -> str:
        return f"The cards cannot be read: the sampler on {self._path} {what}. Start it with the panel (make up)."


class _Gone(Exception):
    """The other end closed the connection."""
