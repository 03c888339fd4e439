# SPDX-License-Identifier: Apache-2.0
"""Claims about `python -m cloister_sim`: one connection is one TD, and what a client sends reaches no other."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.tdx.eventlog import Event, EventLog
from cloister.tdx.verify import TrustRoot, verify_quote
from cloister.tlv import sha384
from cloister_sim.server import MAX_REQUEST_SIZE, MAX_TDS

IMAGE = sha384(b"image")


class Simulator:
    """The process under test, at the other end of a lifeline."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "platform"
        self.path = directory / "sim.sock"
        read_end, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [*self.argv, "--lifeline-fd", str(read_end)],
            pass_fds=[read_end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(read_end)
        assert self.process.stdout is not None
        assert "ready" in self.process.stdout.readline()

    @property
    def argv(self) -> list[str]:
        directory, path = str(self.directory), str(self.path)
        return [sys.executable, "-m", "cloister_sim", "--directory", directory, "--socket", path]

    def connect(self) -> Connection:
        return Connection(self.path)

    def close(self) -> None:
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
        self.process.communicate(timeout=30)


class Connection:
    """One TD, from the wire's side."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(30)
        self.socket.connect(str(path))

    def ask(self, body: bytes) -> bytes:
        self.socket.sendall(len(body).to_bytes(4, "big") + body)
        return self.answer()

    def answer(self) -> bytes:
        size = int.from_bytes(self._read(4), "big")
        return self._read(size)

    def ended(self) -> bool:
        return self.socket.recv(1) == b""

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "the connection ended inside an answer"
            data += part
        return data


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    running = Simulator(tmp_path_factory.mktemp("sim"))
    yield running
    running.close()


@pytest.fixture
def td(simulator: Simulator) -> Iterator[Connection]:
    connection = simulator.connect()
    assert connection.ask(b"L" + IMAGE)[:1] == b"\0"
    yield connection
    connection.socket.close()


def root(simulator: Simulator) -> TrustRoot:
    return TrustRoot.from_pem((simulator.directory / "root.pem").read_bytes(), simulated=True)


def test_a_connection_launches_extends_and_quotes(simulator: Simulator) -> None:
    connection = simulator.connect()
    answer = connection.ask(b"L" + IMAGE)
    assert answer[:1] == b"\0"
    log = EventLog.parse(answer[1:])
    event = Event.runtime("cloister.environment", bytes(48))
    log = log.appended(event)
    assert connection.ask(b"E\x03" + event.digest) == b"\0" + log.replay()[3]
    answer = connection.ask(b"Q" + b"r" * 64)
    verified = verify_quote(answer[1:], roots=[root(simulator)], now=datetime.now(UTC))
    assert verified.quote.body.rtmrs == log.replay()
    assert verified.quote.body.report_data == b"r" * 64


def test_a_td_dies_with_its_connection(simulator: Simulator) -> None:
    values = set()
    for _ in range(3):
        connection = simulator.connect()
        connection.ask(b"L" + IMAGE)
        values.add(connection.ask(b"E\x03" + b"x" * 48))
        connection.socket.close()
    assert values == {b"\0" + sha384(bytes(48) + b"x" * 48)}


def test_64_tds_run_at_once_and_apart(simulator: Simulator) -> None:
    trusted = root(simulator)

    def live(number: int) -> bytes:
        connection = simulator.connect()
        connection.ask(b"L" + sha384(bytes([number])))
        for _ in range(number):
            connection.ask(b"E\x03" + b"x" * 48)
        barrier.append(connection)  # keeps the TD alive while the others run
        quote = connection.ask(b"Q" + bytes([number]) * 64)[1:]
        return verify_quote(quote, roots=[trusted], now=datetime.now(UTC)).quote.body.rtmrs[3]

    barrier: list[Connection] = []
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(live, range(64)))
    wanted = [bytes(48)]
    for _ in range(63):
        wanted.append(sha384(wanted[-1] + b"x" * 48))
    assert found == wanted
    for connection in barrier:
        connection.socket.close()


@pytest.mark.parametrize(
    ("request_body", "text"),
    [(b"L" + IMAGE, b"launched already"), (b"E\x01" + bytes(48), b"RTMR1"), (b"E\x00" + bytes(48), b"RTMR0")],
)
def test_a_request_that_a_td_cannot_make_is_refused_and_the_td_goes_on(
    td: Connection, request_body: bytes, text: bytes
) -> None:
    answer = td.ask(request_body)
    assert answer[:1] == b"\1"
    assert text in answer
    assert td.ask(b"Q" + bytes(64))[:1] == b"\0"


@pytest.mark.parametrize("request_body", [b"E\x03" + bytes(48), b"Q" + bytes(64)])
def test_nothing_comes_before_launch(simulator: Simulator, request_body: bytes) -> None:
    connection = simulator.connect()
    answer = connection.ask(request_body)
    assert (answer[:1], b"not launched" in answer) == (b"\1", True)
    connection.socket.close()


@pytest.mark.parametrize(
    "frame",
    [
        b"\0\0\0\0",
        (MAX_REQUEST_SIZE + 1).to_bytes(4, "big"),
        b"\xff\xff\xff\xff",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0\0\0\1X",
        b"\0\0\0\1L",
        b"\0\0\0\x30L" + bytes(47),
        b"\0\0\0\x40Q" + bytes(63),
        b"\0\0\0\x31E" + bytes(48),
        b"\0\0\0\1\xff",
    ],
)
def test_a_bad_frame_ends_its_connection_and_no_other(simulator: Simulator, td: Connection, frame: bytes) -> None:
    bad = simulator.connect()
    bad.socket.sendall(frame)
    answer = bad.answer()
    assert answer[:1] == b"\1"
    assert answer[1:].decode()
    # Bytes behind the bad frame may turn the end into a reset.
    with contextlib.suppress(ConnectionResetError):
        assert bad.ended()
    assert td.ask(b"Q" + bytes(64))[:1] == b"\0"


def test_a_frame_may_come_byte_by_byte_and_frames_together(simulator: Simulator) -> None:
    connection = simulator.connect()
    for byte in b"\0\0\0\x31L" + IMAGE:
        connection.socket.sendall(bytes([byte]))
    assert connection.answer()[:1] == b"\0"
    request = b"\0\0\0\x32E\x03" + bytes(48)
    connection.socket.sendall(request * 3)
    assert len({connection.answer() for _ in range(3)}) == 3


def test_a_client_that_goes_away_inside_a_frame_harms_nobody(simulator: Simulator, td: Connection) -> None:
    for part in (b"\0", b"\0\0\0\x31", b"\0\0\0\x31L" + bytes(7)):
        gone = simulator.connect()
        gone.socket.sendall(part)
        gone.socket.close()
    assert td.ask(b"Q" + bytes(64))[:1] == b"\0"


def test_too_many_tds_are_refused_and_room_comes_back(tmp_path: Path) -> None:
    simulator = Simulator(tmp_path)
    connections = [simulator.connect() for _ in range(MAX_TDS)]
    assert all(connection.ask(b"L" + IMAGE)[:1] == b"\0" for connection in connections)
    extra = simulator.connect()
    assert b"run already" in extra.answer()
    assert extra.ended()
    for connection in connections:
        connection.socket.close()
    # The server notices the ends in its own time, and answers again then.
    while (again := simulator.connect()).ask(b"L" + IMAGE)[:1] != b"\0":
        again.socket.close()
    simulator.close()


def test_the_socket_is_for_its_owner_alone(simulator: Simulator) -> None:
    assert stat.S_IMODE(simulator.path.stat().st_mode) == 0o600


def test_it_ends_with_its_lifeline_and_takes_its_socket_along(tmp_path: Path) -> None:
    simulator = Simulator(tmp_path)
    connection = simulator.connect()
    connection.ask(b"L" + IMAGE)
    simulator.close()
    assert simulator.process.returncode == 0
    assert connection.ended()
    assert not simulator.path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_quietly_on_signals(tmp_path: Path, number: int) -> None:
    simulator = Simulator(tmp_path)
    simulator.connect().ask(b"L" + IMAGE)
    simulator.process.send_signal(number)
    _, errors = simulator.process.communicate(timeout=30)
    assert (simulator.process.returncode, errors) == (0, "")
    simulator.close()


def test_a_second_one_does_not_take_its_place(simulator: Simulator, td: Connection) -> None:
    second = subprocess.run(simulator.argv, capture_output=True, text=True, timeout=60)
    assert second.returncode == 6
    assert second.stderr.startswith("CLO-1008: ")
    assert td.ask(b"Q" + bytes(64))[:1] == b"\0"


def test_what_a_killed_one_left_is_replaced(tmp_path: Path) -> None:
    killed = Simulator(tmp_path)
    before = root(killed).certificate_der
    killed.process.kill()
    killed.close()
    assert killed.path.exists()
    simulator = Simulator(tmp_path)
    assert simulator.connect().ask(b"L" + IMAGE)[:1] == b"\0"
    assert root(simulator).certificate_der == before
    simulator.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--socket", "/nonexistent/directory/sim.sock"],
        ["--socket", "/tmp/" + "x" * 200],
        ["--lifeline-fd", "999"],
        ["--directory", "/dev/null/platform"],
    ],
)
def test_what_cannot_work_is_said_in_three_lines(simulator: Simulator, tmp_path: Path, arguments: list[str]) -> None:
    argv = [sys.executable, "-m", "cloister_sim", "--directory", str(tmp_path), "--socket", str(tmp_path / "s")]
    refused = subprocess.run([*argv, *arguments], capture_output=True, text=True, timeout=60)
    assert refused.returncode in (1, 2)
    assert refused.stderr.startswith("CLO-10")
    assert len(refused.stderr.splitlines()) == 3
