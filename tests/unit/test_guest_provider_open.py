# SPDX-License-Identifier: Apache-2.0
"""From the URI of a provider to evidence, through boot log and journal; and URIs that name none."""

from __future__ import annotations

import shutil
import struct
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.evidence import report_data_of
from cloister.guest.guest import Guest
from cloister.guest.provider import SimulatedProvider, open_provider
from cloister.guest.providers.bootlog import read_boot_log, read_boot_log_area
from cloister.guest.providers.journal import Journal
from cloister.guest.providers.kernel import OsFiles
from cloister.identity import Role
from cloister.tdx.eventlog import MAX_PAYLOAD_SIZE, EventLog
from cloister.tdx.quote import Quote
from cloister.tdx.verify import TrustRoot, verify_quote
from cloister_sim import SimulatedPlatform
from fakes.fake_qgs import fake_qgs
from fakes.real_vectors import DIRECTORY, needs_vectors
from fakes.tdx_guest_device import FakeTdxGuest
from fakes.tsm_configfs import ACPI, BOOT_ID, FakeKernel, ccel_area, ccel_table

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


def refused(code: Code = Code.QUOTE_PROVIDER_FAILED) -> pytest.RaisesExc[CloisterError]:
    return pytest.RaisesExc(CloisterError, check=lambda error: error.code is code and bool(error.todo))


class TestBootLog:
    def test_the_area_is_as_long_as_the_table_says(self, kernel: FakeKernel) -> None:
        assert read_boot_log_area(ACPI, kernel) == ccel_area(EventLog.parse(kernel.td.boot_log), 4096)

    def test_the_firmwares_log_becomes_the_log_of_rtmr0_to_2(self, kernel: FakeKernel) -> None:
        log = EventLog.parse(read_boot_log(ACPI, kernel))
        assert log == EventLog.parse(kernel.td.boot_log)
        assert log.replay() == kernel.td.report(bytes(64)).rtmrs

    def test_a_log_that_does_not_parse_is_refused_with_its_reason(self, kernel: FakeKernel) -> None:
        kernel.ccel = b"\0" * 4096
        with refused() as caught:
            read_boot_log(ACPI, kernel)
        assert "TCG2" in caught.value.why

    def test_events_of_mrtd_are_left_out(self, kernel: FakeKernel) -> None:
        record = struct.pack("<IIIH", 0, 1, 1, 12) + A + struct.pack("<I", 0)
        kernel.ccel = ccel_area(EventLog(), 65).rstrip(b"\xff") + record
        assert EventLog.parse(read_boot_log(ACPI, kernel)) == EventLog()

    def test_data_too_long_for_the_log_is_left_out_and_its_digest_kept(self, kernel: FakeKernel) -> None:
        data = b"x" * (MAX_PAYLOAD_SIZE + 1)
        part = ccel_area(EventLog(), 65)
        record = struct.pack("<IIIH", 1, 1, 1, 12) + A + struct.pack("<I", len(data)) + data
        kernel.ccel = part.rstrip(b"\xff") + record
        (event,) = EventLog.parse(read_boot_log(ACPI, kernel)).events
        assert (event.imr, event.digest, event.payload) == (0, A, b"")

    @needs_vectors
    def test_the_log_of_a_real_machine_replays_to_its_quote(self, tmp_path: Path) -> None:
        """Table and log of a Google Cloud TD, and a quote that was taken in it."""
        quote = DIRECTORY / "quotes" / "tdx10_v4_00806f050000_00b2526a.bin"
        (tmp_path / "data").mkdir()
        shutil.copy(DIRECTORY / "eventlogs" / "cos113_ccel_table.bin", tmp_path / "CCEL")
        shutil.copy(DIRECTORY / "eventlogs" / "cos113_ccel.bin", tmp_path / "data" / "CCEL")
        log = EventLog.parse(read_boot_log(tmp_path, OsFiles()))
        assert log.replay() == Quote.parse(quote.read_bytes()).body.rtmrs

    @pytest.mark.parametrize(
        ("table", "why"),
        [
            (b"", "0 bytes"),
            (ccel_table(4096)[:-1], "55 bytes"),
            (ccel_table(4096) + b"\0", "File too large"),
            (ccel_table(4096, signature=b"DSDT"), "damaged"),
            (ccel_table(4096)[:-1] + b"\1", "damaged"),
            (ccel_table(4096, kind=1), "type 1"),
            (ccel_table(0), "0 bytes"),
            (ccel_table(2**40), "1099511627776 bytes"),
            (ccel_table(4095), "File too large"),
            (ccel_table(4097), "4096 bytes"),
        ],
    )
    def test_a_table_that_is_wrong_is_refused(self, kernel: FakeKernel, table: bytes, why: str) -> None:
        read = kernel._acpi
        kernel._acpi = lambda path: table if path == ACPI / "CCEL" else read(path)  # type: ignore[method-assign]
        with refused() as caught:
            read_boot_log_area(ACPI, kernel)
        assert why in caught.value.why

    def test_without_the_table_this_is_no_td(self, kernel: FakeKernel, tmp_path: Path) -> None:
        with refused() as caught:
            read_boot_log_area(tmp_path, kernel.kernel(acpi=tmp_path).files)
        assert "TD" in caught.value.todo


class TestOpen:
    def test_a_configfs_td_from_uri_to_evidence_and_again_after_a_restart(
        self, kernel: FakeKernel, path: Path, platform: SimulatedPlatform
    ) -> None:
        roots = [TrustRoot.from_pem(platform.root_pem, simulated=True)]
        for _ in range(2):
            td = open_provider(f"configfs:?journal={path}", bytes(48), kernel=kernel.kernel())
            guest = Guest(td)
            guest.measure("cloister.environment", A)
            guest.seal(Role.KEYBROKER)
            evidence = guest.evidence(nonce=bytes(32), audience="a", trust_domain="t")
            body = verify_quote(evidence.quote, roots=roots, now=datetime.now(UTC)).quote.body
            assert body.rtmrs == EventLog.parse(evidence.event_log).replay()
            assert body.report_data == report_data_of(evidence)
            guest.close()

    def test_a_restart_after_a_key_was_received_is_refused(self, kernel: FakeKernel, path: Path) -> None:
        uri = f"configfs:?journal={path}"
        guest = Guest(open_provider(uri, bytes(48), kernel=kernel.kernel()))
        guest.seal(Role.RANK)
        guest.record_key("cloister-key://tenant/data", 1, A)
        guest.close()
        guest = Guest(open_provider(uri, bytes(48), kernel=kernel.kernel()))
        guest.seal(Role.RANK)
        with refused() as caught:
            guest.evidence(nonce=bytes(32), audience="a", trust_domain="t")
        assert "keys it received" in caught.value.why

    def test_a_tdx_guest_td_from_uri_to_quote(
        self, kernel: FakeKernel, tmp_path: Path, platform: SimulatedPlatform
    ) -> None:
        (tmp_path / "tdx_guest").touch()
        changed = kernel.kernel(device=tmp_path / "tdx_guest", ioctl=FakeTdxGuest(kernel.td))
        with fake_qgs(platform) as qgs:
            td = open_provider(f"tdx-guest:?qgs={qgs.address}", bytes(48), kernel=changed)
            td.extend(3, A)
            assert Quote.parse(td.quote(REPORT_DATA)).body == kernel.td.report(REPORT_DATA)

    def test_a_path_may_be_percent_encoded(self, kernel: FakeKernel, tmp_path: Path) -> None:
        open_provider(f"configfs:?journal={tmp_path}/a%26b", bytes(48), kernel=kernel.kernel()).close()
        assert (tmp_path / "a&b").exists()

    def test_a_refused_td_lets_go_of_its_journal(self, kernel: FakeKernel, path: Path) -> None:
        kernel.td.extend(3, A)
        with refused():
            open_provider(f"configfs:?journal={path}", bytes(48), kernel=kernel.kernel())
        Journal(path, BOOT_ID).close()

    def test_a_kernel_without_a_boot_id_is_refused(self, kernel: FakeKernel, path: Path) -> None:
        kernel.boot_id = "none"
        with refused() as caught:
            open_provider(f"configfs:?journal={path}", bytes(48), kernel=kernel.kernel())
        assert "boot id" in caught.value.what


class TestUri:
    def test_an_unknown_scheme_is_refused_with_those_that_exist(self) -> None:
        for uri in ("", "tpm:", "simulated", "simulated:", "CONFIGFS:", "/run/platform.sock"):
            with refused(Code.CONFIG_INVALID) as caught:
                open_provider(uri, bytes(48))
            for scheme in ("simulated:", "configfs:", "tdx-guest:"):
                assert scheme in caught.value.why

    @pytest.mark.parametrize(
        "uri",
        [
            "configfs:/sys",
            "configfs:?qgs=vsock:2:4050",
            "configfs:?",
            "configfs:?journal",
            "configfs:?journal=",
            "configfs:?journal=/a&journal=/b",
            "tdx-guest:?qgs=tcp:1",
            "tdx-guest:?qgs=",
            "tdx-guest:?verify=no",
            "tdx-guest:qgs=unix:/a",
        ],
    )
    def test_an_option_that_does_not_exist_is_refused_before_anything_is_opened(
        self, kernel: FakeKernel, uri: str
    ) -> None:
        with refused(Code.CONFIG_INVALID):
            open_provider(uri, bytes(48), kernel=kernel.kernel())
        assert kernel.made == kernel.reads == 0

    @pytest.mark.parametrize("uri", ["configfs:", "tdx-guest:"])
    def test_outside_a_td_the_error_says_what_is_missing(self, kernel: FakeKernel, uri: str) -> None:
        kernel.measurements = False
        with refused() as caught:
            open_provider(uri, bytes(48), kernel=kernel.kernel())
        assert "6.16" in caught.value.why
        assert "modprobe tdx_guest" in caught.value.todo
        assert "simulated" in caught.value.todo

    def test_the_simulated_platform_is_still_where_it_was(self) -> None:
        with refused():
            open_provider("simulated:/nonexistent/platform.sock", bytes(48))
        assert SimulatedProvider.__module__.endswith("providers.simulated")
