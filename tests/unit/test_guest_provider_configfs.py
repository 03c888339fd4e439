# SPDX-License-Identifier: Apache-2.0
"""Quotes through configfs-tsm: the generation protocol, its retries, and what it says when there is no TDX."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.providers.configfs import DEADLINE_S, ConfigfsQuotes
from cloister.guest.providers.kernel import OsFiles
from cloister.tdx.quote import Quote
from cloister.tdx.verify import TrustRoot, verify_quote
from cloister_sim import SimulatedPlatform
from fakes.tsm_configfs import REPORTS, FakeKernel

REPORT_DATA = bytes(range(64))


class Clock:
    """Time that passes only when somebody pauses."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"))


@pytest.fixture
def kernel(platform: SimulatedPlatform) -> FakeKernel:
    return FakeKernel(platform.launch(bytes(48)))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quotes(kernel: FakeKernel, clock: Clock) -> ConfigfsQuotes:
    return ConfigfsQuotes(REPORTS, kernel, clock=clock, pause=clock.pause)


def refusal(quotes: ConfigfsQuotes) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        quotes.quote(REPORT_DATA)
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED
    assert caught.value.todo
    return caught.value


def test_a_quote_is_over_the_report_data_and_verifies(quotes: ConfigfsQuotes, platform: SimulatedPlatform) -> None:
    data = quotes.quote(REPORT_DATA)
    verified = verify_quote(data, roots=[TrustRoot.from_pem(platform.root_pem, simulated=True)], now=datetime.now(UTC))
    assert verified.quote.body.report_data == REPORT_DATA


def test_every_quote_has_a_directory_of_its_own_and_leaves_none(quotes: ConfigfsQuotes, kernel: FakeKernel) -> None:
    assert quotes.quote(REPORT_DATA) != quotes.quote(bytes(64))
    assert (kernel.made, kernel.items) == (2, {})


def test_the_directory_goes_when_the_quote_fails_too(quotes: ConfigfsQuotes, kernel: FakeKernel) -> None:
    kernel.provider = "sev_guest"
    refusal(quotes)
    assert (kernel.made, kernel.items) == (1, {})


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINTR, errno.ETIMEDOUT])
def test_a_quote_that_is_under_way_or_interrupted_is_waited_for(
    quotes: ConfigfsQuotes, kernel: FakeKernel, clock: Clock, number: int
) -> None:
    kernel.outblob_errors = [number] * 3
    assert Quote.parse(quotes.quote(REPORT_DATA)).body.report_data == REPORT_DATA
    assert kernel.reads == 4
    assert clock.pauses == sorted(clock.pauses)
    assert len(clock.pauses) == 3


def test_waiting_ends_at_the_deadline(quotes: ConfigfsQuotes, kernel: FakeKernel, clock: Clock) -> None:
    kernel.outblob_errors = [errno.EBUSY] * 10_000
    error = refusal(quotes)
    assert "in time" in error.why
    assert "qgsd" in error.todo
    assert clock.now <= DEADLINE_S
    assert kernel.reads <= 200


def test_another_error_is_not_waited_for(quotes: ConfigfsQuotes, kernel: FakeKernel, clock: Clock) -> None:
    kernel.outblob_errors = [errno.EIO]
    assert "Input/output error" in refusal(quotes).why
    assert clock.pauses == []


@pytest.mark.parametrize(
    ("change", "why", "todo"),
    [
        ({"mounted": False}, "configfs is not mounted", "modprobe tsm"),
        ({"registered": False}, "not a TDX TD", "modprobe tdx_guest"),
        ({"provider": "sev_guest"}, "sev_guest", "TDX TD"),
        ({"provider": "\x1b[31mtdx_guest"}, "\\x1b", "TDX TD"),
        ({"provider": "tdx_guest" * 10}, "", "dmesg"),
        ({"max_inblob": 32}, "", "dmesg"),
    ],
)
def test_what_is_missing_is_said(
    quotes: ConfigfsQuotes, kernel: FakeKernel, change: dict[str, object], why: str, todo: str
) -> None:
    for name, value in change.items():
        setattr(kernel, name, value)
    error = refusal(quotes)
    assert why in error.why
    assert error.why.isprintable()
    assert todo in error.todo


def test_report_data_of_another_size_never_reaches_the_kernel(quotes: ConfigfsQuotes, kernel: FakeKernel) -> None:
    for size in (0, 63, 65):
        with pytest.raises(ValueError, match="64 bytes"):
            quotes.quote(bytes(size))
    assert kernel.made == 0


def test_the_generation_may_wrap(quotes: ConfigfsQuotes, kernel: FakeKernel) -> None:
    made = kernel.make_directory

    def make_directory(path: Path) -> None:
        made(path)
        item = kernel.items[path.name]
        item.generation = item.read_generation = 2**64 - 1

    kernel.make_directory = make_directory  # type: ignore[method-assign]
    assert Quote.parse(quotes.quote(REPORT_DATA)).body.report_data == REPORT_DATA


class TestOsFiles:
    """The real file layer, on ordinary files."""

    def test_a_file_is_read_whole_up_to_the_limit(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x" * 100_000)
        assert OsFiles().read(tmp_path / "file", 100_000) == b"x" * 100_000
        with pytest.raises(OSError, match="more than 99999 bytes") as caught:
            OsFiles().read(tmp_path / "file", 99_999)
        assert caught.value.errno == errno.EFBIG

    def test_an_endless_file_is_not_read_to_its_end(self) -> None:
        with pytest.raises(OSError, match="more than 1000 bytes"):
            OsFiles().read(Path("/dev/zero"), 1000)

    def test_writing_makes_no_file_and_cuts_none(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            OsFiles().write(tmp_path / "inblob", b"x")
        (tmp_path / "inblob").write_bytes(b"12345")
        OsFiles().write(tmp_path / "inblob", b"abc")
        assert (tmp_path / "inblob").read_bytes() == b"abc45"

    def test_directories_come_and_go(self, tmp_path: Path) -> None:
        OsFiles().make_directory(tmp_path / "item")
        with pytest.raises(FileExistsError):
            OsFiles().make_directory(tmp_path / "item")
        OsFiles().remove_directory(tmp_path / "item")
        assert list(tmp_path.iterdir()) == []

    def test_a_real_directory_without_tsm_says_so(self, tmp_path: Path) -> None:
        error = refusal(ConfigfsQuotes(tmp_path / "tsm" / "report", OsFiles()))
        assert "modprobe tsm" in error.todo
