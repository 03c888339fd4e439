# SPDX-License-Identifier: Apache-2.0
"""A real TD as a provider: boot log, registers and journal agree, or there is nothing to be had."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.guest import Guest
from cloister.guest.providers.configfs import ConfigfsQuotes
from cloister.guest.providers.journal import Journal
from cloister.guest.providers.registers import Registers
from cloister.guest.providers.td import TdProvider
from cloister.identity import Role
from cloister.tdx.quote import Quote
from cloister.tlv import sha384
from cloister_sim import SimulatedPlatform
from fakes.tsm_configfs import BOOT_ID, MEASUREMENTS, REPORTS, FakeKernel

REPORT_DATA = bytes(range(64))
A, B, C = (bytes([n]) * 48 for n in (1, 2, 3))
OTHER_BOOT = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"))


@pytest.fixture
def kernel(platform: SimulatedPlatform) -> FakeKernel:
    return FakeKernel(platform.launch(bytes(48)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "extensions"


def opened(kernel: FakeKernel, journal: Journal | None = None) -> TdProvider:
    return TdProvider(
        boot_log=kernel.td.boot_log,
        registers=Registers(MEASUREMENTS, kernel),
        quotes=ConfigfsQuotes(REPORTS, kernel, pause=lambda _: None),
        journal=journal,
    )


def refused(code: Code = Code.QUOTE_PROVIDER_FAILED) -> pytest.RaisesExc[CloisterError]:
    return pytest.RaisesExc(CloisterError, check=lambda error: error.code is code and bool(error.todo))


def test_an_extension_is_in_the_register_and_in_the_next_quote(kernel: FakeKernel) -> None:
    td = opened(kernel)
    value = td.extend(3, A)
    assert value == sha384(bytes(48), A) == kernel.td.report(bytes(64)).rtmrs[3]
    assert Quote.parse(td.quote(REPORT_DATA)).body.rtmrs[3] == value


def test_only_what_a_td_can_extend_is_extended(kernel: FakeKernel) -> None:
    td = opened(kernel)
    for index, digest in ((0, A), (1, A), (4, A), (-1, A), (3, A[:-1]), (3, A + b"\0"), (3, b"")):
        with pytest.raises(ValueError, match="RTMR2 and RTMR3"):
            td.extend(index, digest)
    assert td.extend(2, A)


def test_a_guest_measures_seals_and_proves_itself_on_a_real_td(kernel: FakeKernel) -> None:
    guest = Guest(opened(kernel))
    guest.measure("cloister.environment", A)
    guest.seal(Role.RANK)
    evidence = guest.evidence(nonce=bytes(32), audience="a", trust_domain="t")
    assert Quote.parse(evidence.quote).body.rtmrs == guest.event_log.replay()


class TestRestart:
    def test_a_process_that_measures_the_same_goes_on_where_the_earlier_one_was(
        self, kernel: FakeKernel, path: Path
    ) -> None:
        first = opened(kernel, Journal(path, BOOT_ID))
        values = [first.extend(3, digest) for digest in (A, B)]
        first.close()
        second = opened(kernel, Journal(path, BOOT_ID))
        assert [second.extend(3, digest) for digest in (A, B)] == values
        assert kernel.td.report(bytes(64)).rtmrs[3] == values[-1], "nothing was extended twice"
        second.extend(3, C)
        assert Quote.parse(second.quote(REPORT_DATA)).body.rtmrs[3] == sha384(values[-1], C)

    def test_a_process_that_measures_something_else_gets_nothing(self, kernel: FakeKernel, path: Path) -> None:
        first = opened(kernel, Journal(path, BOOT_ID))
        first.extend(3, A)
        first.close()
        second = opened(kernel, Journal(path, BOOT_ID))
        with refused() as caught:
            second.extend(3, B)
        assert "something else" in caught.value.what
        with refused():
            second.quote(REPORT_DATA)
        with refused():
            second.extend(2, A)

    def test_there_is_no_quote_before_the_process_has_caught_up(self, kernel: FakeKernel, path: Path) -> None:
        first = opened(kernel, Journal(path, BOOT_ID))
        first.extend(3, A)
        first.extend(3, B)
        first.close()
        second = opened(kernel, Journal(path, BOOT_ID))
        second.extend(3, A)
        with refused() as caught:
            second.quote(REPORT_DATA)
        assert "1 extensions" in caught.value.why
        second.extend(3, B)
        assert second.quote(REPORT_DATA)

    def test_a_line_whose_extension_was_never_made_is_taken_back(self, kernel: FakeKernel, path: Path) -> None:
        journal = Journal(path, BOOT_ID)
        opened(kernel, journal).extend(3, A)
        journal.append(3, B)  # and the process dies
        journal.close()
        td = opened(kernel, Journal(path, BOOT_ID))
        td.extend(3, A)
        td.extend(3, C)
        td.close()
        assert Journal(path, BOOT_ID).entries == ((3, A), (3, C))

    def test_a_line_that_was_being_written_is_taken_back(self, kernel: FakeKernel, path: Path) -> None:
        first = opened(kernel, Journal(path, BOOT_ID))
        first.extend(3, A)
        first.close()
        with path.open("a") as file:
            file.write(f"3 {B.hex()}"[:50])
        td = opened(kernel, Journal(path, BOOT_ID))
        td.extend(3, A)
        td.extend(3, B)
        td.close()
        assert Journal(path, BOOT_ID).entries == ((3, A), (3, B))

    def test_without_a_journal_a_used_register_is_an_error_that_names_the_remedy(self, kernel: FakeKernel) -> None:
        opened(kernel).extend(3, A)
        with refused() as caught:
            opened(kernel)
        assert "RTMR3" in caught.value.what
        assert "journal=" in caught.value.todo

    def test_a_journal_that_does_not_give_the_register_is_not_believed(self, kernel: FakeKernel, path: Path) -> None:
        journal = Journal(path, BOOT_ID)
        for digest in (A, B):
            journal.append(3, digest)
        journal.close()
        for extension in (None, B, A):
            if extension:
                kernel.td.extend(3, extension)
            with refused() as caught, _closing(Journal(path, BOOT_ID)) as again:
                opened(kernel, again)
            assert "RTMR3" in caught.value.what

    def test_a_journal_of_another_boot_is_begun_anew(self, kernel: FakeKernel, path: Path) -> None:
        journal = Journal(path, OTHER_BOOT)
        journal.append(3, A)
        journal.close()
        td = opened(kernel, Journal(path, BOOT_ID))
        assert td.extend(3, B) == sha384(bytes(48), B)
        td.close()
        assert Journal(path, BOOT_ID).entries == ((3, B),)

    def test_registers_that_the_boot_log_does_not_give_are_refused(self, kernel: FakeKernel) -> None:
        kernel.td.extend(2, A)
        with refused() as caught:
            opened(kernel)
        assert "boot event log does not replay to RTMR2" in caught.value.what

    def test_a_closed_provider_gives_nothing(self, kernel: FakeKernel) -> None:
        td = opened(kernel)
        td.close()
        td.close()
        with refused():
            td.quote(REPORT_DATA)


class _closing:
    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __enter__(self) -> Journal:
        return self._journal

    def __exit__(self, *_: object) -> None:
        self._journal.close()


class TestJournal:
    def test_one_process_holds_it_at_a_time(self, path: Path) -> None:
        first = Journal(path, BOOT_ID)
        with refused() as caught:
            Journal(path, BOOT_ID)
        assert "another process" in caught.value.why
        first.close()
        Journal(path, BOOT_ID).close()

    def test_a_journal_as_long_as_an_event_log_is_the_longest(self, path: Path) -> None:
        path.touch(0o600)
        path.write_text(f"cloister-extensions-v1 {BOOT_ID}\n" + f"3 {A.hex()}\n" * 4096)
        journal = Journal(path, BOOT_ID)
        assert len(journal.entries) == 4096
        with refused() as caught:
            journal.append(3, A)
        assert "4096 lines" in caught.value.why

    def test_only_its_user_can_read_it(self, path: Path) -> None:
        Journal(path, BOOT_ID).close()
        assert path.stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize(
        "content",
        [
            b"some notes of mine\n",
            f"cloister-extensions-v2 {BOOT_ID}\n".encode(),
            f"cloister-extensions-v1 {BOOT_ID}\n3 {A.hex()} \n".encode(),
            f"cloister-extensions-v1 {BOOT_ID}\n1 {A.hex()}\n".encode(),
            f"cloister-extensions-v1 {BOOT_ID}\n3 {A.hex()[:-2]}\n".encode(),
            f"cloister-extensions-v1 {BOOT_ID}\n\n3 {A.hex()}\n".encode(),
            f"cloister-extensions-v1 {BOOT_ID}\n3 {A.hex().upper().replace('0', 'A')}\n".encode(),
            b"\xff\xfe\n" * 100,
            b"\n" * 1_000_000,
            f"cloister-extensions-v1 {BOOT_ID}\n".encode() + f"3 {A.hex()}\n".encode() * 4097,
        ],
    )
    def test_a_file_that_is_no_journal_is_refused_and_left_alone(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with refused():
            Journal(path, BOOT_ID)
        assert path.read_bytes() == content

    def test_a_file_that_others_could_have_written_is_refused(self, path: Path, tmp_path: Path) -> None:
        path.touch()
        path.chmod(0o666)
        (tmp_path / "link").symlink_to(tmp_path / "target")
        os.mkfifo(tmp_path / "pipe", 0o600)
        for name in (tmp_path / "link", tmp_path, tmp_path / "none" / "file"):
            with refused():
                Journal(name, BOOT_ID)
        for name in (path, tmp_path / "pipe"):
            with refused() as caught:
                Journal(name, BOOT_ID)
            assert "not a file that only this user can write" in caught.value.why
        assert not (tmp_path / "target").exists()

    def test_a_journal_that_cannot_grow_stops_before_the_register(self, kernel: FakeKernel, path: Path) -> None:
        td = opened(kernel, Journal(path, BOOT_ID))
        before = kernel.td.report(bytes(64))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))  # stands for a full tmpfs
        try:
            with refused() as caught:
                td.extend(3, A)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "journal" in caught.value.what
        assert kernel.td.report(bytes(64)) == before
        td.close()
        assert opened(kernel, Journal(path, BOOT_ID)).extend(3, A), "the torn line is taken back"
