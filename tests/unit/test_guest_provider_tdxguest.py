# SPDX-License-Identifier: Apache-2.0
"""Quotes by way of /dev/tdx_guest and a quote generation service."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.providers.kernel import Kernel
from cloister.guest.providers.qgs import HOST, QgsAddress, QgsClient, read_answer
from cloister.guest.providers.tdxguest import TDX_CMD_GET_REPORT0, TdxGuestQuotes
from cloister.tdx.verify import TrustRoot, verify_quote
from cloister_sim import SimulatedPlatform, SimulatedTd
from fakes.fake_qgs import FakeQgs, answer, fake_qgs
from fakes.tdx_guest_device import FakeTdxGuest, read_td_report, td_report

REPORT_DATA = bytes(range(64))


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"))


@pytest.fixture
def td(platform: SimulatedPlatform) -> SimulatedTd:
    return platform.launch(bytes(48))


@pytest.fixture
def device(tmp_path: Path) -> Path:
    (tmp_path / "tdx_guest").touch()
    return tmp_path / "tdx_guest"


@pytest.fixture
def qgs(platform: SimulatedPlatform) -> Iterator[FakeQgs]:
    with fake_qgs(platform) as service:
        yield service


def client(qgs: FakeQgs) -> QgsClient:
    return QgsClient(QgsAddress.parse(qgs.address))


def test_the_request_number_is_that_of_the_kernels_header() -> None:
    assert TDX_CMD_GET_REPORT0 == 0xC4405401


def test_a_quote_says_what_the_td_report_says(
    td: SimulatedTd, device: Path, qgs: FakeQgs, platform: SimulatedPlatform
) -> None:
    td.extend(3, bytes(48))
    data = TdxGuestQuotes(device, FakeTdxGuest(td), client(qgs)).quote(REPORT_DATA)
    verified = verify_quote(data, roots=[TrustRoot.from_pem(platform.root_pem, simulated=True)], now=datetime.now(UTC))
    assert verified.quote.body == td.report(REPORT_DATA)


def test_the_request_has_the_layout_of_intels_library(td: SimulatedTd, device: Path, qgs: FakeQgs) -> None:
    TdxGuestQuotes(device, FakeTdxGuest(td), client(qgs)).quote(REPORT_DATA)
    (request,) = qgs.requests
    assert request[:24] == struct.pack("<HHIIIII", 1, 1, 0, 24 + 1024, 0, 1024, 0)
    assert read_td_report(request[24:]) == td.report(REPORT_DATA)


def test_an_answer_without_a_key_id_is_good_too() -> None:
    assert read_answer(answer(b"quote", key_id=b"")[4:]) == b"quote"


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ENODEV, "not a TDX TD"),
        (errno.EACCES, "may not be used"),
        (errno.EPERM, "may not be used"),
        (errno.ENOTTY, "not the device"),
        (errno.EIO, "Input/output error"),
        (errno.ENOMEM, "Cannot allocate memory"),
    ],
)
def test_a_device_that_gives_no_report_is_an_error_with_advice(
    td: SimulatedTd, device: Path, qgs: FakeQgs, number: int, why: str
) -> None:
    ioctl = FakeTdxGuest(td)
    ioctl.error = number
    with pytest.raises(CloisterError) as caught:
        TdxGuestQuotes(device, ioctl, client(qgs)).quote(REPORT_DATA)
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED
    assert why in caught.value.why
    assert caught.value.todo
    assert qgs.requests == []


def test_without_the_device_this_is_no_td(tmp_path: Path, td: SimulatedTd, qgs: FakeQgs) -> None:
    with pytest.raises(CloisterError, match="no TD report") as caught:
        TdxGuestQuotes(tmp_path / "tdx_guest", FakeTdxGuest(td), client(qgs)).quote(REPORT_DATA)
    assert "modprobe tdx_guest" in caught.value.todo


def test_an_ordinary_file_is_not_taken_for_the_device_by_the_real_ioctl(device: Path, qgs: FakeQgs) -> None:
    with pytest.raises(CloisterError) as caught:
        TdxGuestQuotes(device, Kernel().ioctl, client(qgs)).quote(REPORT_DATA)
    assert "not the device" in caught.value.why


def test_no_descriptor_is_left_open(td: SimulatedTd, device: Path) -> None:
    ioctl = FakeTdxGuest(td)
    source = TdxGuestQuotes(device, ioctl, QgsClient())
    before = len(os.listdir("/proc/self/fd"))
    for ioctl.error in (0, errno.EIO):
        with contextlib.suppress(CloisterError):
            source.report(REPORT_DATA)
    assert len(os.listdir("/proc/self/fd")) == before


def test_report_data_of_another_size_never_reaches_the_device(td: SimulatedTd, device: Path, qgs: FakeQgs) -> None:
    ioctl = FakeTdxGuest(td)
    for size in (0, 63, 65):
        with pytest.raises(ValueError, match="64 bytes"):
            TdxGuestQuotes(device, ioctl, client(qgs)).quote(bytes(size))
    assert ioctl.calls == 0


def test_a_service_that_is_down_is_an_error_that_names_where_it_should_be(tmp_path: Path, td: SimulatedTd) -> None:
    address = QgsAddress.parse(f"unix:{tmp_path}/qgs.socket")
    with pytest.raises(CloisterError) as caught:
        QgsClient(address).quote(td_report(td.report(REPORT_DATA)))
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED
    assert str(tmp_path) in caught.value.what
    assert "qgsd" in caught.value.todo


def test_addresses() -> None:
    assert QgsAddress.parse("vsock:2:4050") == HOST
    assert QgsAddress.parse("unix:/var/run/tdx-qgs/qgs.socket").family == socket.AF_UNIX
    for text in ("", "vsock", "vsock:2", "vsock:2:x", "vsock:2:99999999999", "vsock:4294967296:1", "unix:", "unix:a",
                 "unix:/" + "x" * 200, "unix:/a\nb", "tcp:host:4050", "/var/run/qgs.socket"):  # fmt: skip
        with pytest.raises(CloisterError, match="no address") as caught:
            QgsAddress.parse(text)
        assert caught.value.code is Code.CONFIG_INVALID
        assert "vsock:2:4050" in caught.value.why
