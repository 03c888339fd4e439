# SPDX-License-Identifier: Apache-2.0
"""A platform that lies: the quote generation service, the kernel's directory, the registers."""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.guest.providers.configfs import ConfigfsQuotes
from cloister.guest.providers.qgs import QgsAddress, QgsClient, read_answer
from cloister.guest.providers.registers import Registers
from cloister.guest.providers.td import TdProvider
from cloister.guest.providers.tdxguest import TdxGuestQuotes
from cloister_sim import SimulatedPlatform, SimulatedTd
from fakes.fake_qgs import FakeQgs, answer, fake_qgs
from fakes.tdx_guest_device import FakeTdxGuest, td_report
from fakes.tsm_configfs import MEASUREMENTS, REPORTS, FakeKernel, Item

REPORT_DATA = bytes(range(64))
DIGEST = b"\x05" * 48
Corruption = Callable[[bytes], Iterable[bytes | None]]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"))


@pytest.fixture
def td(platform: SimulatedPlatform) -> SimulatedTd:
    return platform.launch(bytes(48))


@pytest.fixture
def kernel(td: SimulatedTd) -> FakeKernel:
    return FakeKernel(td)


@pytest.fixture
def qgs(platform: SimulatedPlatform) -> Iterator[FakeQgs]:
    with fake_qgs(platform) as service:
        yield service


def refused(call: Callable[[], object]) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        call()
    assert caught.value.code is Code.QUOTE_PROVIDER_FAILED
    assert len(caught.value.why) <= 500
    assert caught.value.why.isprintable()
    assert caught.value.todo
    return caught.value


def provider(kernel: FakeKernel, quotes: ConfigfsQuotes | TdxGuestQuotes | None = None) -> TdProvider:
    return TdProvider(
        boot_log=kernel.td.boot_log,
        registers=Registers(MEASUREMENTS, kernel),
        quotes=quotes or ConfigfsQuotes(REPORTS, kernel, pause=lambda _: None),
        journal=None,
    )


def patched(whole: bytes, offset: int, value: int) -> bytes:
    """Return the answer with one u32 of its message changed."""
    return whole[: 4 + offset] + struct.pack("<I", value) + whole[8 + offset :]


class TestServiceThatLies:
    @pytest.mark.parametrize(
        ("corrupt", "why"),
        [
            (lambda whole: [], "closed"),
            (lambda whole: [whole[:3]], "closed"),
            (lambda whole: [whole[:-1]], "closed"),
            (lambda whole: [b"\0\0\0\0"], "0 bytes"),
            (lambda whole: [(23).to_bytes(4, "big"), bytes(23)], "23 bytes"),
            (lambda whole: [b"\xff\xff\xff\xff", whole[4:]], "4294967295 bytes"),
            (lambda whole: [(70_000).to_bytes(4, "big"), bytes(70_000)], "70000 bytes"),
            (lambda whole: [(len(whole) - 3).to_bytes(4, "big"), whole[4:], b"\0"], "calls itself"),
            (lambda whole: [(len(whole) - 5).to_bytes(4, "big"), whole[4:-1]], "calls itself"),
            (lambda whole: [whole[:4], b"\x02", whole[5:]], "version 2.1"),
            (lambda whole: [patched(whole, 4, 0)], "type 0"),
            (lambda whole: [patched(whole, 4, 3)], "type 3"),
            (lambda whole: [patched(whole, 8, 2**32 - 1)], "calls itself 4294967295"),
            (lambda whole: [patched(whole, 16, 17)], "an id of 17"),
            (lambda whole: [patched(whole, 16, 2**32 - 16)], "an id of 4294967280"),
            (lambda whole: [patched(whole, 20, 0)], "a quote of 0"),
            (lambda whole: [patched(whole, 20, 2**32 - 1)], "a quote of 4294967295"),
            (lambda whole: [answer(b"", error=0x12003)], "invalid parameter"),
            (lambda whole: [answer(b"", error=0xDEADBEEF)], "0xdeadbeef"),
            (lambda whole: [answer(b"")], "a quote of 0"),
        ],
    )
    def test_an_answer_that_does_not_add_up_is_refused(
        self, td: SimulatedTd, qgs: FakeQgs, corrupt: Corruption, why: str
    ) -> None:
        qgs.corrupt = corrupt
        error = refused(lambda: QgsClient(QgsAddress.parse(qgs.address)).quote(td_report(td.report(REPORT_DATA))))
        assert why in error.why
        assert "qgsd" in error.todo

    def test_a_slow_drip_ends_at_the_deadline_of_the_whole(self, td: SimulatedTd, qgs: FakeQgs) -> None:
        qgs.corrupt = lambda whole: [bytes([byte]) for byte in whole]
        ticks = itertools.count()  # each look at the clock is a second later
        client = QgsClient(QgsAddress.parse(qgs.address), clock=lambda: float(next(ticks)))
        error = refused(lambda: client.quote(td_report(td.report(REPORT_DATA))))
        assert "30 s" in error.why

    def test_silence_ends_at_the_deadline(self, td: SimulatedTd, qgs: FakeQgs) -> None:
        qgs.corrupt = lambda whole: [whole[:40], None]
        client = QgsClient(QgsAddress.parse(qgs.address), timeout_s=0.05)
        assert "0.05 s" in refused(lambda: client.quote(td_report(td.report(REPORT_DATA)))).why

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=120), st.integers(0, 60), st.binary(min_size=1, max_size=8))
    def test_nothing_but_the_one_error_escapes(self, noise: bytes, offset: int, patch: bytes) -> None:
        good = bytearray(answer(b"quote" * 5)[4:])
        good[offset : offset + len(patch)] = patch
        for message in (noise, bytes(good)):
            with contextlib.suppress(CloisterError):
                read_answer(message)

    def test_the_quote_of_another_request_is_refused(
        self, kernel: FakeKernel, tmp_path: Path, qgs: FakeQgs, platform: SimulatedPlatform
    ) -> None:
        (tmp_path / "tdx_guest").touch()
        other = answer(platform.sign(kernel.td.report(bytes(64))))
        qgs.corrupt = lambda whole: [other]
        source = TdxGuestQuotes(
            tmp_path / "tdx_guest", FakeTdxGuest(kernel.td), QgsClient(QgsAddress.parse(qgs.address))
        )
        assert "other report data" in refused(lambda: provider(kernel, source).quote(REPORT_DATA)).what

    def test_the_quote_of_another_td_is_refused(
        self, kernel: FakeKernel, tmp_path: Path, qgs: FakeQgs, platform: SimulatedPlatform
    ) -> None:
        (tmp_path / "tdx_guest").touch()
        other_td = platform.launch(b"\x01" * 48)
        qgs.corrupt = lambda whole: [answer(platform.sign(other_td.report(REPORT_DATA)))]
        source = TdxGuestQuotes(
            tmp_path / "tdx_guest", FakeTdxGuest(kernel.td), QgsClient(QgsAddress.parse(qgs.address))
        )
        assert "RTMR2" in refused(lambda: provider(kernel, source).quote(REPORT_DATA)).what

    @pytest.mark.parametrize("quote", [b"\0" * 5000, b"quote", b"\x04\0\x02\0\x81" + bytes(1000)])
    def test_bytes_that_are_no_quote_are_refused(self, kernel: FakeKernel, quote: bytes) -> None:
        kernel.forged_quote = lambda _: quote
        assert "malformed" in refused(lambda: provider(kernel).quote(REPORT_DATA)).what


class TestDeviceThatLies:
    @pytest.mark.parametrize(
        "forge",
        [
            lambda report: bytes(1024),
            lambda report: b"\0" + report[1:],
            lambda report: report[:128] + bytes(64) + report[192:],
            lambda report: report[:191] + bytes([report[191] ^ 1]) + report[192:],
            lambda report: report[:-1],
            lambda report: report + b"\0",
        ],
    )
    def test_a_td_report_over_anything_else_is_never_sent(
        self, td: SimulatedTd, tmp_path: Path, qgs: FakeQgs, forge: Callable[[bytes], bytes]
    ) -> None:
        (tmp_path / "tdx_guest").touch()
        ioctl = FakeTdxGuest(td)
        ioctl.forge = forge
        source = TdxGuestQuotes(tmp_path / "tdx_guest", ioctl, QgsClient(QgsAddress.parse(qgs.address)))
        refused(lambda: source.quote(REPORT_DATA))
        assert qgs.requests == []


class TestDirectoryThatIsRaced:
    def test_another_writer_never_gets_its_bytes_quoted_as_ours(self, kernel: FakeKernel) -> None:
        def overwrite(item: Item) -> None:
            item.inblob, item.generation = bytes(64), item.generation + 1

        kernel.before_read = overwrite
        assert "generation" in refused(lambda: provider(kernel).quote(REPORT_DATA)).why
        assert kernel.made == 3
        assert kernel.items == {}

    def test_one_race_is_survived(self, kernel: FakeKernel) -> None:
        races = iter([True])

        def overwrite(item: Item) -> None:
            if next(races, False):
                item.inblob, item.generation = bytes(64), item.generation + 1

        kernel.before_read = overwrite
        assert provider(kernel).quote(REPORT_DATA)
        assert kernel.made == 2

    def test_a_write_that_the_kernel_refused_unseen_is_noticed(self, kernel: FakeKernel) -> None:
        kernel.refuse_writes = True
        assert "refused" in refused(lambda: provider(kernel).quote(REPORT_DATA)).why

    def test_a_cached_quote_of_an_earlier_write_is_noticed(self, kernel: FakeKernel, td: SimulatedTd) -> None:
        made = kernel.make_directory

        def make_directory(path: Path) -> None:
            made(path)
            item = kernel.items[path.name]
            item.inblob, item.outblob = bytes(64), td.quote(bytes(64))

        kernel.make_directory = make_directory  # type: ignore[method-assign]
        kernel.refuse_writes = True
        assert "generation" in refused(lambda: provider(kernel).quote(REPORT_DATA)).why

    def test_a_generation_that_keeps_step_does_not_help_a_quote_over_other_bytes(self, kernel: FakeKernel) -> None:
        kernel.forged_quote = lambda _: kernel.td.quote(bytes(64))
        assert "other report data" in refused(lambda: provider(kernel).quote(REPORT_DATA)).what

    @pytest.mark.parametrize("size", [65_537, 1_000_000])
    def test_a_quote_beyond_any_size_is_refused(self, kernel: FakeKernel, size: int) -> None:
        kernel.forged_quote = lambda _: bytes(size)
        assert "more than 65536 bytes" in refused(lambda: provider(kernel).quote(REPORT_DATA)).why

    def test_an_empty_quote_means_that_the_host_has_no_service(self, kernel: FakeKernel) -> None:
        kernel.forged_quote = lambda _: b""
        error = refused(lambda: provider(kernel).quote(REPORT_DATA))
        assert "empty" in error.why
        assert "qgsd" in error.todo


class TestRegisterThatLies:
    def test_a_register_that_does_not_change_is_noticed(self, kernel: FakeKernel) -> None:
        td = provider(kernel)
        kernel.frozen_register = True
        assert "did not change" in refused(lambda: td.extend(3, DIGEST)).why

    def test_somebody_elses_extension_beside_ours_is_noticed(self, kernel: FakeKernel) -> None:
        td = provider(kernel)
        kernel.on_extend = lambda: kernel.td.extend(3, bytes(48))
        assert "something else" in refused(lambda: td.extend(3, DIGEST)).why

    def test_somebody_elses_extension_before_ours_is_noticed(self, kernel: FakeKernel) -> None:
        td = provider(kernel)
        kernel.td.extend(3, bytes(48))
        assert "RTMR3" in refused(lambda: td.extend(3, DIGEST)).what

    def test_somebody_elses_extension_before_a_quote_is_noticed(self, kernel: FakeKernel) -> None:
        td = provider(kernel)
        kernel.td.extend(2, bytes(48))
        assert "RTMR2" in refused(lambda: td.quote(REPORT_DATA)).what

    def test_after_a_failed_extension_there_is_no_quote_and_no_other_extension(self, kernel: FakeKernel) -> None:
        td = provider(kernel)
        kernel.frozen_register = True
        refused(lambda: td.extend(3, DIGEST))
        kernel.frozen_register = False
        assert "half-way" in refused(lambda: td.extend(3, DIGEST)).why
        assert "half-way" in refused(lambda: td.quote(REPORT_DATA)).why

    @pytest.mark.parametrize(
        ("size", "why"),
        [(0, "reads as 0 bytes"), (47, "reads as 47"), (49, "File too large"), (4096, "File too large")],
    )
    def test_a_register_of_another_size_is_refused(self, kernel: FakeKernel, size: int, why: str) -> None:
        kernel.register_size = size
        assert why in refused(lambda: provider(kernel)).why
