# SPDX-License-Identifier: Apache-2.0
"""The key of a model goes to its worker, to nobody else, and once."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloister.secret import SecretBytes
from cloister.tlv import parse_tlv
from cloister_serving.keysocket import DENIED, MESSAGE_LABEL, KeySocket, key_message
from cloister_serving.stockworker import ProcessIdentity

KEY = SecretBytes(bytes(range(32)))
MESSAGE = key_message(data_key=KEY, wrapped=b"w", key_uri="cloister-key://t/k", key_version=3, manifest=bytes(48))

# Asks for the key whenever a line comes in, and says what it got.
_ASKER = """
import socket, sys
for line in sys.stdin:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        s.connect(sys.argv[1])
        print(s.recv(65536).hex(), flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


class Asker:
    """A process that can ask for the key."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ask(self) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"ask\n")
        return (await self.process.stdout.readline()).decode().strip()


@pytest.fixture
async def askers(tmp_path: Path) -> AsyncIterator[list[Asker]]:
    command = [sys.executable, "-c", _ASKER, str(tmp_path / "key")]
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    found = [Asker(await asyncio.create_subprocess_exec(*command, **pipes)) for _ in range(2)]
    yield found
    for asker in found:
        asker.process.kill()
        await asker.process.wait()


async def test_the_worker_gets_the_key_and_an_outsider_does_not(tmp_path: Path, askers: list[Asker]) -> None:
    worker, outsider = askers
    denied: list[int] = []
    key_socket = KeySocket(tmp_path, "key")
    handing = asyncio.create_task(
        key_socket.hand_out(ProcessIdentity.of(worker.process.pid), MESSAGE, on_denied=denied.append)
    )
    assert bytes.fromhex(await outsider.ask()) == DENIED
    secret, wrapped, uri, version, manifest = parse_tlv(
        bytes.fromhex(await worker.ask()), label=MESSAGE_LABEL, fields=5
    )
    await handing
    assert (secret, wrapped, uri, manifest) == (KEY.reveal(), b"w", b"cloister-key://t/k", bytes(48))
    assert int.from_bytes(version, "big") == 3
    assert denied == [outsider.process.pid]


async def test_nobody_gets_it_twice(tmp_path: Path, askers: list[Asker]) -> None:
    worker, outsider = askers
    key_socket = KeySocket(tmp_path, "key")
    handing = asyncio.create_task(key_socket.hand_out(ProcessIdentity.of(worker.process.pid), MESSAGE))
    assert bytes.fromhex(await worker.ask()) == MESSAGE.reveal()
    await handing
    assert await worker.ask() == "FileNotFoundError"
    assert await outsider.ask() == "FileNotFoundError"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"start_time": 1}, {"uid": 4711}])
async def test_a_process_that_only_has_the_workers_id_is_denied(
    tmp_path: Path, askers: list[Asker], change: dict[str, int]
) -> None:
    worker, _ = askers
    another_life = dataclasses.replace(ProcessIdentity.of(worker.process.pid), **change)
    key_socket = KeySocket(tmp_path, "key")
    handing = asyncio.create_task(key_socket.hand_out(another_life, MESSAGE))
    assert bytes.fromhex(await worker.ask()) == DENIED
    handing.cancel()
    await asyncio.wait({handing})


async def test_those_who_connect_and_leave_do_not_stop_the_worker(tmp_path: Path, askers: list[Asker]) -> None:
    worker, _ = askers
    key_socket = KeySocket(tmp_path, "key")
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as outsider:
            outsider.connect(str(tmp_path / "key"))
    handing = asyncio.create_task(key_socket.hand_out(ProcessIdentity.of(worker.process.pid), MESSAGE))
    assert bytes.fromhex(await worker.ask()) == MESSAGE.reveal()
    await handing


def test_the_socket_is_for_this_user_only(tmp_path: Path) -> None:
    key_socket = KeySocket(tmp_path, "key")
    mode = (tmp_path / "key").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    key_socket.close()


def test_a_directory_with_a_long_name_is_no_obstacle(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 120)
    deep.mkdir()
    KeySocket(deep, "key").close()
    assert os.listdir(deep) == []
