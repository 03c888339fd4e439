# SPDX-License-Identifier: Apache-2.0
"""The platform's socket: what a TD takes from it, and what it does when the platform misbehaves."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.guest import Guest
from cloister.guest.provider import SimulatedProvider
from cloister.tdx.eventlog import Event, EventLog

GOOD_LOG = b"\x00" + EventLog((Event(0, 1, "", b"", b"\x01" * 48),)).to_json()


def frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@contextmanager
def platform(*answers: bytes) -> Iterator[str]:
    """Serve one connection: each request gets the next answer, byte for byte; then the platform hangs up."""
    with tempfile.TemporaryDirectory(prefix="clo-") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(directory) / "platform.sock")
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            thread.join()


def test_a_td_is_launched_with_its_boot_log() -> None:
    with platform(frame(GOOD_LOG)) as path:
        provider = SimulatedProvider(path, b"\x00" * 48)
        assert provider.boot_log == GOOD_LOG[1:]
        provider.close()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (frame(b"\x01no room"), "no room"),
        (frame(b"\x07\xff\xfe"), ""),
        (frame(b""), "0 bytes"),
        ((2**31).to_bytes(4, "big"), "bytes"),
        (frame(GOOD_LOG)[:20], "closed"),
        (b"", "closed"),
    ],
)
def test_a_platform_that_answers_badly_is_an_error_with_its_reason(answer: bytes, why: str) -> None:
    with platform(answer) as path, pytest.raises(CloisterError) as caught:
        SimulatedProvider(path, b"\x00" * 48)
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED
    assert why in caught.value.why


def test_a_register_value_of_another_size_is_an_error() -> None:
    with platform(frame(GOOD_LOG), frame(b"\x00" + b"\x02" * 47)) as path:
        provider = SimulatedProvider(path, b"\x00" * 48)
        with pytest.raises(CloisterError) as caught:
            provider.extend(3, b"\x00" * 48)
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED


def test_a_quote_beyond_any_size_is_an_error() -> None:
    with platform(frame(GOOD_LOG), frame(b"\x00" * 70_000)) as path:
        provider = SimulatedProvider(path, b"\x00" * 48)
        with pytest.raises(CloisterError) as caught:
            provider.quote(b"\x00" * 64)
        with pytest.raises(ValueError, match="64 bytes"):
            provider.quote(b"\x00" * 63)
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED


@pytest.mark.parametrize(
    "log", [b"\x00", b"\x00[", b"\x00" + EventLog((Event.runtime("cloister.environment", b""),)).to_json()]
)
def test_a_boot_log_that_is_none_or_of_a_used_td_is_refused(log: bytes) -> None:
    with platform(frame(log)) as path, pytest.raises(CloisterError) as caught:
        Guest(SimulatedProvider(path, b"\x00" * 48))
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED
