# SPDX-License-Identifier: Apache-2.0
"""`cloister quote` on quotes of the simulated platform, whose collateral is under a development root."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.cli.quote import answer_cases, parse_time
from cloister.errors import CloisterError, Code
from cloister.tdx.conformance import MAX_CASE_SIZE
from cloister.tdx.intelroot import intel_root
from cloister.tdx.quote import MAX_QUOTE_SIZE
from cloister.tlv import sha384
from cloister_sim import SimulatedPlatform
from fakes.cli_runner import Ran, run
from fakes.forged_collateral import SERIALS, World, serial
from fakes.forged_rows_policy import attributes

CASES = Path(__file__).parents[1] / "vectors" / "tdx" / "cases.jsonl"
MEMBERS = {
    "verdict", "policy", "check", "reason", "simulated", "root_sha256", "time", "tee", "quote_version", "fmspc",
    "pce_id", "platform_instance_id", "pck_ca", "status", "launch_status", "current_status", "tcb_date",
    "tcb_evaluation_number", "earliest_expiry", "collateral", "advisories", "warnings", "checks", "policy_checks",
}  # fmt: skip


@dataclass
class Files:
    """A quote, collateral and root in files."""

    directory: Path
    now: datetime

    def path(self, name: str) -> Path:
        return self.directory / name

    def verify(self, *options: object, now: datetime | None = None) -> Ran:
        at = f"{now or self.now:%Y-%m-%dT%H:%M:%SZ}"
        return run(
            "quote", "verify", self.path("quote.bin"), "--collateral", self.path("collateral.json"), "--root",
            self.path("root.pem"), "--state", self.path("state"), "--at", at, *options,
        )  # fmt: skip


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"))


@pytest.fixture
def files(platform: SimulatedPlatform, tmp_path: Path) -> Files:
    now = datetime.now(UTC).replace(microsecond=0)
    (tmp_path / "quote.bin").write_bytes(platform.launch(sha384(b"image")).quote(b"r" * 64))
    (tmp_path / "collateral.json").write_bytes(platform.collateral(now).to_json())
    (tmp_path / "root.pem").write_bytes(platform.root_pem)
    return Files(tmp_path, now)


def forged(world: World, directory: Path) -> Files:
    root = x509.load_der_x509_certificate(world.platform.root_der)
    (directory / "quote.bin").write_bytes(world.quote())
    (directory / "collateral.json").write_bytes(world.collateral().to_json())
    (directory / "root.pem").write_bytes(root.public_bytes(Encoding.PEM))
    return Files(directory, world.now)


@pytest.mark.parametrize("command", ["show", "verify", "conformance"])
def test_every_command_has_help_and_json(command: str) -> None:
    ran = run("quote", command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out


class TestShow:
    def test_an_enclaves_quote_is_shown_too(self, tmp_path: Path) -> None:
        files = forged(World().of_enclave(), tmp_path)
        ran = run("quote", "show", files.path("quote.bin"), "--json")
        assert ran.code == 0
        assert ran.document["header"]["TEE type"] == "0x0 (SGX)"
        assert len(ran.document["enclave"]["mr_enclave"]) == 64

    def test_a_td_15_shows_what_it_has_more(self, tmp_path: Path) -> None:
        files = forged(World().of_module(current=b"\5\1"), tmp_path)
        ran = run("quote", "show", files.path("quote.bin"))
        assert ran.code == 0
        assert "mr_service_td" in ran.out
        assert ran.err == "Not verified: this is what the quote claims.\n"

    @pytest.mark.parametrize("data", [b"", b"x" * 600, bytes(MAX_QUOTE_SIZE + 1), b"04000200"])
    def test_what_is_no_quote_is_refused_with_the_row(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "x.bin").write_bytes(data)
        ran = run("quote", "show", tmp_path / "x.bin")
        assert ran.code == 3
        assert "  why: H" in ran.err

    def test_a_file_that_is_not_there_is_code_5(self, tmp_path: Path) -> None:
        assert run("quote", "show", tmp_path / "none").code == 5
        assert run("quote", "verify", tmp_path / "none").code == 5
        assert run("quote", "verify", tmp_path).code == 5


class TestVerify:
    def test_an_up_to_date_platform_is_accepted_check_by_check(self, files: Files) -> None:
        ran = files.verify("--json")
        assert ran.code == 0
        document = ran.document
        assert set(document) == MEMBERS
        assert (document["verdict"], document["status"], document["simulated"]) == ("accept", "UpToDate", True)
        assert document["earliest_expiry"] == f"{files.now + timedelta(days=30):%Y-%m-%dT%H:%M:%SZ}"
        assert {row["name"] for row in document["checks"]} >= {"X1", "P2", "R1", "T1", "E3", "M1-M3"}
        assert {row["name"] for row in document["policy_checks"]} >= {"A1", "A11", "status"}
        assert all(row["ok"] for row in document["checks"] + document["policy_checks"])

    def test_a_person_reads_the_same(self, files: Files) -> None:
        ran = files.verify()
        assert ran.code == 0
        assert "accepted (default): UpToDate" in ran.out
        assert re.search(r"fmspc +[0-9a-f]{12}", ran.out)
        assert "SIMULATED" in ran.err

    def test_under_intels_root_a_development_quote_is_rejected_and_nothing_is_fetched(self, files: Files) -> None:
        ran = run("quote", "verify", files.path("quote.bin"), "--state", files.path("state"), "--json")
        assert ran.code == 3
        assert (ran.document["verdict"], ran.document["check"]) == ("reject", "P2")
        assert "--root" in ran.document["error"]["todo"]
        assert ran.document["checks"][-1]["ok"] is False
        assert "fetching" not in ran.err
        assert not files.path("state").exists()

    def test_a_flipped_bit_is_rejected_before_collateral_is_looked_for(self, files: Files) -> None:
        data = bytearray(files.path("quote.bin").read_bytes())
        data[100] ^= 1
        files.path("quote.bin").write_bytes(data)
        files.path("collateral.json").write_bytes(b"no collateral")
        ran = files.verify("--json")
        assert ran.code == 3
        assert ran.document["check"] == "E3"
        assert ran.document["exit_code"] == 3
        assert ran.document["error"]["code"] == "CLO-1201"
        assert [row["name"] for row in ran.document["checks"] if not row["ok"]] == ["E3"]
        assert ran.err.startswith("SIMULATED")

    def test_the_default_policy_refuses_a_debug_td_that_is_authentic(self, tmp_path: Path) -> None:
        world = World()
        world.body = attributes(1)
        files = forged(world, tmp_path)
        ran = files.verify("--json")
        assert ran.code == 3
        assert (ran.document["check"], ran.document["error"]["code"]) == ("A1", "CLO-1206")
        assert ran.document["status"] == "UpToDate"
        assert files.verify("--policy", "verify").code == 0

    def test_collateral_that_was_forged_is_a_rejection(self, tmp_path: Path) -> None:
        world = World()
        world.sign_with["tcb_info"] = "leaf"
        ran = forged(world, tmp_path).verify("--json")
        assert (ran.code, ran.document["check"]) == (3, "T2")

    def test_a_revoked_platform_is_a_rejection_even_if_the_list_is_old(self, tmp_path: Path) -> None:
        world = World()
        world.revoked["ca"] = [serial(SERIALS["leaf"])]
        for end in (world.now + timedelta(days=1), world.now - timedelta(hours=1)):
            world.parts["pck_crl"] = world.crl("ca", end=end)
            ran = forged(world, tmp_path).verify("--json")
            assert (ran.code, ran.document["check"]) == (3, "R4")

    @pytest.mark.parametrize("policy", ["none", "VERIFY", ""])
    def test_there_is_no_third_policy(self, files: Files, policy: str) -> None:
        assert files.verify("--policy", policy).code == 2


class TestTime:
    def test_collateral_of_another_time_is_no_verdict(self, files: Files) -> None:
        for days, code in ((31, "CLO-1220"), (-1, "CLO-1221")):
            ran = files.verify("--json", now=files.now + timedelta(days=days))
            assert ran.code == 6
            assert ran.document["error"]["code"] == code
            assert "--collateral" in ran.document["error"]["todo"]
            assert "verdict" not in ran.document

    def test_expired_collateral_says_since_when_and_what_to_run(
        self, platform: SimulatedPlatform, files: Files
    ) -> None:
        old = platform.collateral(datetime.now(UTC) - timedelta(days=33, hours=1))
        files.path("collateral.json").write_bytes(old.to_json())
        ran = run(
            "quote", "verify", files.path("quote.bin"), "--collateral", files.path("collateral.json"), "--root",
            files.path("root.pem"), "--state", files.path("state"),
        )  # fmt: skip
        assert ran.code == 6
        assert re.search(r"collateral for FMSPC [0-9a-f]{12} expired 3 days ago", ran.err)
        assert "do:  run `cloister collateral fetch`" in ran.err

    def test_a_time_is_read_with_its_zone(self) -> None:
        wanted = datetime(2026, 11, 1, 12, tzinfo=UTC)
        for text in ("2026-11-01T12:00:00Z", "2026-11-01T13:00:00+01:00", str(int(wanted.timestamp()))):
            assert parse_time(text) == wanted

    @pytest.mark.parametrize("text", ["2026-11-01", "2026-11-01T12:00:00", "yesterday", "", "-1", "1e9", "9" * 12])
    def test_a_time_without_a_zone_or_meaning_is_refused(self, text: str) -> None:
        with pytest.raises(CloisterError) as caught:
            parse_time(text)
        assert caught.value.code is Code.ARGUMENT_INVALID

    def test_a_clock_that_was_never_set_accepts_nothing(self, files: Files) -> None:
        ran = files.verify("--json", now=datetime.fromtimestamp(0, UTC))
        assert (ran.code, ran.document["check"]) == (3, "X1")


class TestCollateral:
    @pytest.mark.parametrize("text", [b"", b"{}", b"[]", b'{"format": "x"}', b"\xff", b"[" * 10_000])
    def test_a_file_that_is_none_is_said_to_be_none(self, files: Files, text: bytes) -> None:
        files.path("collateral.json").write_bytes(text)
        ran = files.verify("--json")
        assert ran.code == 3
        assert ran.document["error"]["code"] == "CLO-1224"
        assert "verdict" not in ran.document

    def test_without_any_the_error_says_what_to_name(self, files: Files) -> None:
        ran = run(
            "quote", "verify", files.path("quote.bin"), "--root", files.path("root.pem"), "--state", files.path("state")
        )
        assert ran.code == 5
        assert "no collateral for FMSPC" in ran.err
        assert "--collateral" in ran.err

    def test_a_root_file_that_holds_none_is_refused(self, files: Files) -> None:
        files.path("root.pem").write_bytes(b"no certificate")
        assert files.verify().code == 2


class TestReport:
    def test_it_is_one_file_without_scripts_or_references(self, files: Files) -> None:
        out = files.path("report.html")
        assert files.verify("--html", out).code == 0
        text = out.read_text()
        assert "✓ Accepted" in text
        assert "Development root" in text
        assert "mr_seam" in text
        for forbidden in ("<script", "http://", "https://", "src=", "href=", "@import", "url("):
            assert forbidden not in text.lower()

    def test_a_rejection_has_its_report_too(self, files: Files) -> None:
        out = files.path("report.html")
        files.path("quote.bin").write_bytes(files.path("quote.bin").read_bytes()[:-2000])
        assert files.verify("--html", out).code == 3
        assert "✗ Rejected" in out.read_text()
        assert "Not applied" in out.read_text()

    def test_a_name_cannot_put_markup_into_it(self, files: Files) -> None:
        hostile = files.path("<script>x\u202e.bin")
        hostile.write_bytes(files.path("quote.bin").read_bytes())
        out = files.path("report.html")
        assert run("quote", "verify", hostile, "--state", files.path("state"), "--html", out).code == 3
        assert "<script" not in out.read_text()
        assert "\u202e" not in out.read_text()

    def test_a_report_that_cannot_be_written_is_an_error(self, files: Files) -> None:
        assert files.verify("--html", files.path("nowhere") / "report.html").code == 5


class TestConformance:
    def test_every_line_has_its_answer_in_order(self) -> None:
        pinned = [json.loads(line) for line in CASES.read_text().splitlines()]
        cases = b"".join(json.dumps(case["case"]).encode() + b"\n" for case in pinned)
        done = subprocess.run(
            [sys.executable, "-m", "cloister.cli.main", "quote", "conformance"], input=cases, capture_output=True,
            check=True,
        )  # fmt: skip
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        for answer in answers:
            answer.pop("error")
        assert answers == [case["answer"] for case in pinned]

    def test_an_answer_comes_before_the_next_case_is_sent(self) -> None:
        program = [sys.executable, "-m", "cloister.cli.main", "quote", "conformance"]
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            for number in range(3):
                process.stdin.write(b'{"id": %d}\n' % number)
                process.stdin.flush()
                assert json.loads(process.stdout.readline())["id"] == number
            process.stdin.close()
            assert process.wait(10) == 0

    def test_lines_that_are_no_cases_are_answered_and_end_nothing(self) -> None:
        answers = io.BytesIO()
        answer_cases(io.BytesIO(b"\n{}\nnot json\n\xff\n" + b'{"id": 7}'), answers)
        found = [json.loads(line) for line in answers.getvalue().splitlines()]
        assert [answer["verdict"] for answer in found] == [None] * 5
        assert found[-1]["id"] == 7

    def test_a_line_beyond_the_limit_has_one_answer(self) -> None:
        answers = io.BytesIO()
        answer_cases(io.BytesIO(b"x" * (MAX_CASE_SIZE + (3 << 20)) + b'\n{"id": 1}\n'), answers)
        first, second = (json.loads(line) for line in answers.getvalue().splitlines())
        assert "at most" in first["error"]
        assert second["id"] == 1


def test_the_pinned_root_is_intels() -> None:
    root = intel_root()
    assert root.fingerprint.hex() == "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
    assert not root.simulated
