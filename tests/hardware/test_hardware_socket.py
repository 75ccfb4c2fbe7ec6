"""The sampler's socket: many clients, rude clients, dying clients, and one owner of the cards."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from apps.hardware.client import HardwareClient
from apps.hardware.protocol import HardwareError, HostReading, Inventory, Reading
from apps.hardware.replay import ReplayDriver
from apps.hardware.server import LINE_LIMIT_BYTES, HardwareServer
from apps.hardware.simulated import SimulatedDriver, SimulatedRig
from apps.hardware.simulated_slots import MEMORY_IDLE_BYTES

GIB = 1 << 30
SAMPLE = Path(__file__).parents[2] / "apps" / "hardware" / "samples" / "sim-4x3090.jsonl"


@pytest.fixture
def path() -> Iterator[Path]:
    """A short one: socket paths end at 107 bytes."""
    folder = tempfile.mkdtemp(dir="/tmp")
    yield Path(folder) / "hw.sock"
    shutil.rmtree(folder)


@pytest.fixture
def rig() -> SimulatedRig:
    return SimulatedRig(host=lambda: HostReading(None, None, None))


@pytest.fixture
def server(path: Path, rig: SimulatedRig) -> Iterator[HardwareServer]:
    with HardwareServer(SimulatedDriver(rig), path) as serving:
        yield serving


class Raw:
    """A client that may send anything."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")

    def send(self, line: bytes) -> dict[str, Any]:
        self.socket.sendall(line + b"\n")
        answer: dict[str, Any] = json.loads(self.file.readline())
        return answer

    def ask(self, **request: Any) -> dict[str, Any]:
        return self.send(json.dumps(request).encode())

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline, "it did not happen within 30 s"
        time.sleep(0.02)


def hold(memory: int = GIB) -> list[dict[str, object]]:
    return [{"index": 0, "memory_used_bytes": memory, "utilization": 0.5}]


def used(rig: SimulatedRig) -> int:
    memory = rig.read().gpus[0].memory_used_bytes
    assert memory is not None
    return memory - MEMORY_IDLE_BYTES


def test_only_the_owner_may_use_the_socket(server: HardwareServer, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_client_reads_the_same_cards_as_the_sampler(server: HardwareServer, path: Path) -> None:
    client = HardwareClient(path)
    assert client.inventory() == server.inventory()
    assert [gpu.uuid for gpu in client.read().gpus] == [gpu.uuid for gpu in server.read().gpus]
    client.close()


def test_a_hold_ends_with_its_connection(server: HardwareServer, path: Path, rig: SimulatedRig) -> None:
    client = HardwareClient(path)
    client.hold(4242, "engine", hold())
    assert used(rig) == GIB
    client.close()
    until(lambda: used(rig) == 0)


def test_killing_an_engine_frees_its_memory(server: HardwareServer, path: Path, rig: SimulatedRig) -> None:
    code = (
        "import sys, time; from apps.hardware.client import HardwareClient; import os;"
        "c = HardwareClient(sys.argv[1]); "
        "c.hold(os.getpid(), 'engine', [{'index': 0, 'memory_used_bytes': 2**30, 'utilization': 1}]); time.sleep(600)"
    )
    engine = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[2])
    try:
        until(lambda: used(rig) == GIB)
        assert [process.pid for process in rig.read().gpus[0].processes or ()] == [engine.pid]
    finally:
        engine.send_signal(signal.SIGKILL)
        engine.wait(30)
    until(lambda: used(rig) == 0)


def test_a_second_hold_on_a_connection_replaces_the_first(
    server: HardwareServer, path: Path, rig: SimulatedRig
) -> None:
    client = HardwareClient(path)
    client.hold(1, "x", hold(2 * GIB))
    client.hold(1, "x", hold(3 * GIB))
    assert used(rig) == 3 * GIB
    client.release()
    assert used(rig) == 0
    client.close()


def test_one_client_cannot_release_what_another_holds(server: HardwareServer, path: Path, rig: SimulatedRig) -> None:
    alice, bob = HardwareClient(path), HardwareClient(path)
    alice.hold(1, "x", hold())
    bob.release()
    bob.close()
    assert alice.read().gpus[0].processes
    assert used(rig) == GIB
    alice.close()


def test_out_of_memory_is_told_in_words(server: HardwareServer, path: Path) -> None:
    client = HardwareClient(path)
    with pytest.raises(HardwareError, match="Out of memory on GPU 0"):
        client.hold(1, "x", hold(30 * GIB))
    client.close()


def test_a_fault_over_the_socket_shows_in_the_reading(server: HardwareServer, path: Path) -> None:
    client = HardwareClient(path)
    client.fault("width", 2, width=8)
    assert client.read().gpus[2].pcie_width == 8
    client.fault("clear")
    assert client.read().gpus[2].pcie_width == 16
    client.close()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"hello",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"op": "format_disk"}',
        b'{"op": ["read"]}',
        b'{"op": "hold"}',
        b'{"op": "hold", "pid": 1, "gpus": [7]}',
        b'{"op": "hold", "pid": null, "gpus": []}',
        b'{"op": "hold", "pid": 1, "gpus": [{"index": 0, "memory_used_bytes": 1e400}]}',
        b'{"op": "fault"}',
        b'{"op": "fault", "kind": "lost", "gpu": {}}',
        b'{"op": "fault", "kind": "lost", "gpu": 0, "self": 1}',
        b'{"op": "fault", "kind": "width", "gpu": 0, "width": []}',
        b"[" * 100_000,
    ],
)
def test_a_line_that_makes_no_sense_gets_a_sentence_and_the_next_is_answered(
    server: HardwareServer, path: Path, line: bytes
) -> None:
    raw = Raw(path)
    answer = raw.send(line)
    assert answer["ok"] is False
    assert answer["error"].endswith(".")
    assert "failed on this request" not in answer["error"], "a refusal, not a bug"
    assert raw.ask(op="read")["ok"] is True
    raw.close()


def test_a_line_without_end_is_cut_off_and_others_are_still_served(server: HardwareServer, path: Path) -> None:
    raw = Raw(path)
    # One byte too many and no newline: all of it is read, so the answer arrives before the close.
    raw.socket.sendall(b"x" * (LINE_LIMIT_BYTES + 1))
    assert json.loads(raw.file.readline())["ok"] is False
    assert raw.file.readline() == b""
    raw.close()
    other = Raw(path)
    assert other.ask(op="read")["ok"] is True
    other.close()


def test_a_client_that_dies_in_the_middle_of_a_request_changes_nothing(
    server: HardwareServer, path: Path, rig: SimulatedRig
) -> None:
    raw = Raw(path)
    raw.socket.sendall(json.dumps({"op": "fault", "kind": "lost", "gpu": 0}).encode())
    raw.close()
    other = Raw(path)
    assert other.ask(op="read")["ok"] is True
    other.close()
    time.sleep(0.1)
    assert not rig.read().gpus[0].lost


def test_many_clients_are_served_at_once(server: HardwareServer, path: Path) -> None:
    clients = [HardwareClient(path, timeout=30) for _ in range(40)]
    readings: list[Reading] = []

    def read_often(client: HardwareClient) -> None:
        for _ in range(5):
            readings.append(client.read())

    threads = [threading.Thread(target=read_often, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for client in clients:
        client.close()
    assert len(readings) == 200


def test_a_client_that_does_not_read_its_answers_holds_up_nobody(server: HardwareServer, path: Path) -> None:
    rude = Raw(path)
    rude.socket.settimeout(0.5)

    def ask_without_end() -> None:
        while True:
            rude.socket.sendall(b'{"op": "read"}\n' * 1000)

    with pytest.raises(TimeoutError):
        ask_without_end()
    polite = Raw(path)
    assert polite.ask(op="read")["ok"] is True
    polite.close()
    rude.close()


class CountingDriver:
    """Counts readings and notices when two run at the same time."""

    source = "counting"

    def __init__(self, rig: SimulatedRig) -> None:
        self.rig = rig
        self.readings = 0
        self.inside = 0
        self.overlapped = False

    def inventory(self) -> Inventory:
        return self.rig.inventory()

    def read(self) -> Reading:
        self.inside += 1
        self.overlapped = self.overlapped or self.inside > 1
        time.sleep(0.01)
        self.readings += 1
        self.inside -= 1
        return self.rig.read()

    def close(self) -> None:
        """Nothing to release."""


def test_a_young_reading_is_shared_and_the_driver_is_asked_by_one_at_a_time(path: Path, rig: SimulatedRig) -> None:
    driver = CountingDriver(rig)
    with HardwareServer(driver, path) as serving:
        threads = [threading.Thread(target=serving.read) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not driver.overlapped
        assert driver.readings < 50
        before = driver.readings
        time.sleep(0.11)
        serving.read()
        assert driver.readings == before + 1


def test_cards_that_are_not_simulated_take_no_hold_and_no_fault(path: Path) -> None:
    with HardwareServer(ReplayDriver(SAMPLE), path):
        client = HardwareClient(path)
        with pytest.raises(HardwareError, match="Only simulated cards"):
            client.hold(1, "x", hold())
        with pytest.raises(HardwareError, match="Only simulated cards"):
            client.release()
        with pytest.raises(HardwareError, match="Only simulated cards"):
            client.fault("lost", 0)
        assert len(client.read().gpus) == 4
        client.close()


class BrokenDriver(CountingDriver):
    def read(self) -> Reading:
        raise HardwareError("The card hides.")


def test_the_drivers_error_reaches_the_client_in_its_words(path: Path, rig: SimulatedRig) -> None:
    with HardwareServer(BrokenDriver(rig), path):
        client = HardwareClient(path)
        with pytest.raises(HardwareError, match=r"^The card hides\.$"):
            client.read()
        client.close()


def test_a_hang_of_the_cards_is_told_after_the_timeout_and_ends(server: HardwareServer, path: Path) -> None:
    client = HardwareClient(path, timeout=0.3)
    client.fault("hang", seconds=600)
    with pytest.raises(HardwareError, match=r"did not answer within 0\.3 s"):
        client.read()
    client.fault("clear")
    until(lambda: bool(HardwareClient(path).read().gpus))
    assert client.read().gpus
    client.close()


def test_a_sampler_that_is_not_there_is_told_in_words(path: Path) -> None:
    with pytest.raises(HardwareError, match="is not running"):
        HardwareClient(path).read()


def test_a_client_finds_a_restarted_sampler_and_still_holds_its_memory(path: Path) -> None:
    client = HardwareClient(path)
    with HardwareServer(SimulatedDriver(), path):
        client.hold(1, "x", hold())
    with pytest.raises(HardwareError, match="is not running"):
        client.read()
    rig = SimulatedRig()
    with HardwareServer(SimulatedDriver(rig), path):
        assert [process.pid for process in client.read().gpus[0].processes or ()] == [1]
    client.close()


def test_a_sampler_restarted_between_two_calls_is_not_noticed(path: Path) -> None:
    client = HardwareClient(path)
    for _ in range(3):
        with HardwareServer(SimulatedDriver(), path):
            assert len(client.read().gpus) == 4
    client.close()


def test_the_socket_of_a_dead_sampler_is_replaced(path: Path, rig: SimulatedRig) -> None:
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(path))
    dead.close()
    with HardwareServer(SimulatedDriver(rig), path):
        assert HardwareClient(path).read().gpus


def test_a_second_sampler_is_refused_and_the_first_goes_on(server: HardwareServer, path: Path) -> None:
    second = HardwareServer(SimulatedDriver(), path)
    with pytest.raises(HardwareError, match="Another sampler already serves"):
        second.start()
    second.stop()
    assert HardwareClient(path).read().gpus


def test_a_listener_that_is_not_ours_is_left_alone(path: Path) -> None:
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.bind(str(path))
    stranger.listen()
    with pytest.raises(HardwareError, match="Another sampler"):
        HardwareServer(SimulatedDriver(), path).start()
    assert path.exists()
    stranger.close()


def test_a_file_in_the_sockets_place_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(HardwareError, match="not a socket"):
        HardwareServer(SimulatedDriver(), path).start()
    assert path.read_text() == "precious"


def test_a_path_that_is_too_long_is_told_in_words(path: Path) -> None:
    with pytest.raises(HardwareError, match="107 bytes"):
        HardwareServer(SimulatedDriver(), path.with_name("x" * 108)).start()


def test_a_folder_that_does_not_exist_is_told_in_words(path: Path) -> None:
    with pytest.raises(HardwareError, match="cannot be made: No such file"):
        HardwareServer(SimulatedDriver(), path.parent / "nowhere" / "hw.sock").start()


def test_stopping_removes_the_socket_ends_connections_and_may_be_repeated(path: Path, rig: SimulatedRig) -> None:
    serving = HardwareServer(SimulatedDriver(rig), path)
    serving.start()
    raw = Raw(path)
    raw.ask(op="hold", pid=1, name="x", gpus=hold())
    serving.stop()
    serving.close()
    serving.close()
    assert not path.exists()
    assert raw.file.readline() == b""
    until(lambda: used(rig) == 0)
    raw.close()


def test_what_does_not_speak_as_a_sampler_is_told_in_words(path: Path) -> None:
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stranger.bind(str(path))
    stranger.listen()

    def answer() -> None:
        connection, _ = stranger.accept()
        connection.recv(1000)
        connection.sendall(b"220 smtp ready\n")
        connection.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with pytest.raises(HardwareError, match="does not speak as a sampler does"):
        HardwareClient(path).read()
    thread.join(30)
    stranger.close()
