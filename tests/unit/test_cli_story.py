# SPDX-License-Identifier: Apache-2.0
"""What the story is made of: configuration, policies, job events, charts, the report, and the search for plaintext."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cloister.api.trainer.v1 import trainer_pb2
from cloister.cli import demodata, stackconfig
from cloister.cli.chart import line_chart, ticks
from cloister.cli.dev import make_options
from cloister.cli.follow import JobView, raise_unless_succeeded
from cloister.cli.keys import purposes_of
from cloister.cli.launch import refuse_taken_ports
from cloister.cli.options import parse_assignment
from cloister.cli.policyfile import PolicyDraft
from cloister.cli.report import CertificateRow, RunReport, ServiceEvidence, render_report
from cloister.cli.sealedfiles import Step, stoppable
from cloister.cli.stack import last_words, readable
from cloister.cli.stackconfig import StackOptions
from cloister.cli.state import StateDirectory
from cloister.errors import CloisterError, Code
from cloister.release.policy import parse_policy
from cloister.runtime.config import load_config
from cloister_attest.config import AttestConfig
from cloister_keybroker.config import Config as KeybrokerConfig
from cloister_serving.config import GatewayConfig
from cloister_trainer.config import TrainerConfig

DIGEST = "sha384:" + 48 * "ab"
OWNER = "spiffe://cloister.test/ns/demo/user/owner"


def draft(**changes: Any) -> PolicyDraft:
    values: dict[str, Any] = {
        "name": "reviews",
        "owner": OWNER,
        "key_uri": "cloister-key://demo/datasets/reviews",
        "purposes": ["train"],
        "scripts": [DIGEST],
        "identities": ["spiffe://cloister.test/ns/demo/job/*/rank/*"],
    }
    return PolicyDraft(**(values | changes))


class TestPolicies:
    def test_a_draft_is_a_policy_that_denies_simulated_evidence(self) -> None:
        policy = parse_policy(draft().to_yaml().encode())
        assert not policy.tee.simulated
        assert policy.workload.script == (bytes.fromhex(48 * "ab"),)
        assert policy.broker_nonce

    def test_simulated_evidence_passes_only_when_asked_for(self) -> None:
        assert parse_policy(draft(simulated=True).to_yaml().encode()).tee.simulated

    def test_what_the_script_runs_on_is_pinned_when_it_is_named(self) -> None:
        pins = {"environments": [DIGEST], "measurements": {"mr_td": [48 * "cd"], "rtmr2": [48 * "ef"]}}
        policy = parse_policy(draft(**pins).to_yaml().encode())
        assert policy.workload.environment == (bytes.fromhex(48 * "ab"),)
        assert policy.measurements == {"mr_td": (bytes.fromhex(48 * "cd"),), "rtmr2": (bytes.fromhex(48 * "ef"),)}
        assert parse_policy(draft().to_yaml().encode()).workload.environment is None

    def test_a_successor_names_the_policy_before(self) -> None:
        policy = parse_policy(draft(version=2, previous=DIGEST).to_yaml().encode())
        assert policy.previous == bytes.fromhex(48 * "ab")

    def test_a_value_cannot_break_out_of_its_quotes(self) -> None:
        with pytest.raises(CloisterError) as caught:
            parse_policy(draft(name='x", version: 9, owner: "y').to_yaml().encode())
        assert caught.value.code is Code.POLICY_INVALID

    def test_a_draft_without_scripts_or_identities_is_no_policy(self) -> None:
        for empty in ({"scripts": []}, {"identities": []}, {"purposes": []}):
            with pytest.raises(CloisterError):
                parse_policy(draft(**empty).to_yaml().encode())

    def test_purposes_are_the_policys_when_none_are_given(self) -> None:
        assert purposes_of(draft(purposes=["train", "serve"]).to_yaml().encode()) == ["train", "serve"]

    @pytest.mark.parametrize("text", [b"", b"a: b", b"spec: {key: {purposes: [fly]}}", b"- x", b"a: &b c"])
    def test_a_policy_without_purposes_is_refused(self, text: bytes) -> None:
        with pytest.raises(CloisterError) as caught:
            purposes_of(text)
        assert "--purpose" in caught.value.todo


class TestConfiguration:
    def test_what_is_written_is_toml(self, tmp_path: Path) -> None:
        places = stackconfig.Places(StateDirectory(tmp_path / 'a "quoted" 名'), tmp_path / "p.sock")
        digests = dict.fromkeys(stackconfig.PACKAGES, DIGEST)
        text = stackconfig.attest_config(places, StackOptions(), digests=digests, user_spki_sha256="00")
        found = tomllib.loads(text)
        assert found["service"]["state_dir"].endswith('a "quoted" 名/attest')
        assert [entry["role"] for entry in found["services"]] == ["attest", "keybroker", "trainer", "gateway"]
        assert found["trust_roots"] == [{"path": str(places.state.platform / "root.pem"), "simulated": True}]

    def test_every_service_accepts_what_is_written_for_it(self, tmp_path: Path) -> None:
        places, options = stackconfig.Places(StateDirectory(tmp_path), tmp_path / "p.sock"), StackOptions()
        attest = {"grpc": "127.0.0.1:1", "enrolment": "127.0.0.1:2"}
        digests = dict.fromkeys(stackconfig.PACKAGES, DIGEST)
        texts = {
            AttestConfig: stackconfig.attest_config(places, options, digests=digests, user_spki_sha256=64 * "0"),
            KeybrokerConfig: stackconfig.keybroker_config(
                places,
                options,
                attest_enrolment=attest["enrolment"],
                root_key=tmp_path / "root.key",
                backends=["ehsm:https://127.0.0.1:9000", "embedded:"],
            ),
            TrainerConfig: stackconfig.trainer_config(places, options, attest=attest, keybroker="127.0.0.1:3"),
            GatewayConfig: stackconfig.gateway_config(places, options, attest=attest, keybroker="127.0.0.1:3"),
        }
        for number, (model, text) in enumerate(texts.items()):
            path = tmp_path / f"{number}.toml"
            path.write_text(text, encoding="utf-8")
            load_config(path, model)

    def test_a_control_character_is_no_configuration_value(self) -> None:
        with pytest.raises(ValueError, match="control character"):
            stackconfig.render_toml({"a": {"b": "c\nd = 1"}})

    def test_everything_listens_on_loopback(self, tmp_path: Path) -> None:
        places = stackconfig.Places(StateDirectory(tmp_path), tmp_path / "p.sock")
        text = stackconfig.gateway_config(
            places, StackOptions(), attest={"grpc": "127.0.0.1:1", "enrolment": "127.0.0.1:2"}, keybroker="127.0.0.1:2"
        )
        assert not re.search(r"0\.0\.0\.0|\[::\]", text)

    def test_a_core_that_is_not_there_is_named_with_those_that_are(self) -> None:
        missing = max(os.sched_getaffinity(0)) + 7
        with pytest.raises(CloisterError) as caught:
            make_options([missing])
        assert caught.value.code is Code.CORES_INSUFFICIENT
        assert str(missing) in caught.value.what

    def test_a_tenant_is_a_name(self) -> None:
        with pytest.raises(CloisterError):
            make_options(tenant="Demo/x")

    def test_gateway_and_backends_never_share_a_core(self) -> None:
        core = min(os.sched_getaffinity(0))
        with pytest.raises(CloisterError) as caught:
            make_options(gateway_core=core, backend_core=core)
        assert caught.value.code is Code.CORES_INSUFFICIENT
        assert make_options(gateway_core=core).backend_core != core

    def test_a_taken_port_is_named_with_its_option(self) -> None:
        import socket

        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(CloisterError) as caught:
                refuse_taken_ports(StackOptions(https_port=port))
        assert caught.value.code is Code.PORT_TAKEN
        assert str(port) in caught.value.what
        refuse_taken_ports(StackOptions(https_port=port))


class TestLogs:
    def test_a_json_record_becomes_its_event_and_fields(self) -> None:
        assert readable('{"event": "rank failed", "level": "error", "rank": 1}') == "rank failed  rank=1"
        assert readable("plain words \n") == "plain words"

    def test_last_words_are_the_last_lines(self, tmp_path: Path) -> None:
        log = tmp_path / "x.log"
        log.write_text("".join(f"line {number}\n" for number in range(9)) + "\n")
        assert last_words(log) == ["line 5", "line 6", "line 7", "line 8"]
        assert last_words(tmp_path / "none.log") == []

    def test_what_was_printed_behind_the_last_record_says_more_than_the_record(self, tmp_path: Path) -> None:
        log = tmp_path / "x.log"
        log.write_text('{"event": "started"}\n{"event": "stopped by an error"}\nCLO-1001: bad\nwhy\ntodo\n')
        assert last_words(log) == ["CLO-1001: bad", "why", "todo"]
        log.write_text('{"event": "started"}\n{"event": "ended", "code": 1}\n')
        assert last_words(log) == ["started", "ended  code=1"]


def event(rank: int = 0, **kind: Any) -> trainer_pb2.Event:
    return trainer_pb2.Event(sequence=1, time_unix_ms=5, rank=rank, **kind)


class TestJobs:
    def test_events_make_the_view(self) -> None:
        view = JobView()
        running = trainer_pb2.StateChanged(state=trainer_pb2.JobState.JOB_STATE_RUNNING)
        assert view.apply(event(-1, state_changed=running)) == "job running"
        enrolled = trainer_pb2.RankMessage(phase="enrolled", elapsed_s=0.5)
        assert view.apply(event(1, message=enrolled)) == "rank 1: enrolled  (0.50 s)"
        for rank, loss in ((0, 0.5), (1, 9.0)):
            progress = trainer_pb2.Progress(epoch=1, epochs=2, step=3, steps=6, loss=loss, samples_per_s=10, eta_s=4)
            assert view.apply(event(rank, progress=progress)) == ""
        assert view.curve == [(3, 0.5)]
        assert view.progress_line() == "epoch 1/2  step 3/6  loss 0.5000  rank 0 10/s  rank 1 10/s  ETA 4 s"
        assert view.phase_seconds("enrolled") == [0.5]
        assert view.apply(event(metrics=trainer_pb2.MetricsLogged(step=3, values={"dev_accuracy": 0.9})))
        assert view.metrics == [(3, {"dev_accuracy": 0.9})]

    def test_success_raises_nothing(self) -> None:
        raise_unless_succeeded(JobView(state="succeeded"), "j")

    @pytest.mark.parametrize(("state", "code"), [("failed", Code.JOB_FAILED), ("cancelled", Code.JOB_ENDED)])
    def test_the_reason_of_a_job_reaches_its_owner(self, state: str, code: Code) -> None:
        with pytest.raises(CloisterError) as caught:
            raise_unless_succeeded(JobView(state=state, reason="CLO-1303: the key is disabled"), "j")
        assert caught.value.code is code
        assert "disabled" in caught.value.why

    def test_an_input_is_a_name_and_a_directory(self) -> None:
        assert parse_assignment("reviews=/a=b", option="--input") == ("reviews", "/a=b")
        for text in ("reviews", "=x", "reviews=", ""):
            with pytest.raises(CloisterError):
                parse_assignment(text, option="--input")


class TestCharts:
    @pytest.mark.parametrize(("low", "high"), [(0, 1), (0.2, 0.7), (0, 4312), (-3, 3), (5, 5), (0, 0), (1e-6, 2e-6)])
    def test_ticks_enclose_the_values_at_equal_distances(self, low: float, high: float) -> None:
        found = ticks(low, high, 5)
        assert found[0] <= low <= high <= found[-1]
        assert 2 <= len(found) <= 12

    def test_a_chart_says_in_words_what_it_shows(self) -> None:
        svg = line_chart([(1, 2.0), (9, 0.5)], title="Loss <x>", x_label="step", y_format=lambda y: f"{y:.1f}")
        assert "Loss &lt;x&gt;: from 2.0 at 1 to 0.5 at 9" in svg

    def test_no_points_and_points_that_are_no_numbers_make_no_chart(self) -> None:
        for points in ([], [(1.0, float("nan"))]):
            assert "<svg" not in line_chart(points, title="t", x_label="x", y_format=str)

    def test_many_points_are_thinned_and_keep_their_ends(self) -> None:
        svg = line_chart([(x, x) for x in range(10_000)], title="t", x_label="x", y_format=str)
        assert len(svg) < 12_000
        assert "at 9,999" in svg


class TestReport:
    HOSTILE = '<script>alert(1)</script>\x1b"'

    def report(self) -> RunReport:
        check = {"name": self.HOSTILE, "ok": False, "wanted": self.HOSTILE, "got": "<img src=x>"}
        verdict = {"role": "rank", "spiffe_id": self.HOSTILE, "accepted": False, "time": "t", "checks": [check]}
        decision = {"index": 7, "granted": True, "action": "release", "key_uri": "k", "caller": "c", "blocks": [check]}
        return RunReport(
            title="T",
            made="now",
            simulated=True,
            headline=[("test accuracy", "98.00%")],
            steps=[("sealing", 0.25)],
            facts=[("arguments", self.HOSTILE)],
            curve=[(1, 0.7), (2, 0.1)],
            accuracy=[(2, 0.98)],
            evidence=[ServiceEvidence("attest", [check], [("MRTD", "00ff")])],
            verdicts=[verdict],
            decisions=[decision],
            certificates=[CertificateRow("you", "spiffe://x", "1a", "2b", "later")],
            predictions=[{"text": self.HOSTILE, "label": "positive", "probability": 0.9, "over": "gRPC"}],
            policies=[("k", "spec: <b>")],
        )

    def test_nothing_in_it_runs_or_is_fetched(self) -> None:
        html = render_report(self.report())
        assert "<script" not in html
        assert "<img" not in html
        assert not re.search(r"<[^>]*(?:src|href)\s*=|@import|url\(", html)
        assert "\x1b" not in html
        assert "default-src &#39;none&#39;" in html or "default-src 'none'" in html

    def test_it_shows_every_part(self) -> None:
        html = render_report(self.report())
        for part in ("98.00%", "sealing", "00ff", "✗ failed", "✓ granted", "#7", "spiffe://x", "Simulated platform"):
            assert part in html
        assert html.count("<svg") == 2
        assert "prefers-color-scheme:dark" in html


class TestCutShort:
    async def test_ctrl_c_ends_long_work_at_its_next_step(self) -> None:
        started, ended = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def work(step: Step) -> None:
            try:
                while True:
                    loop.call_soon_threadsafe(started.set)
                    step(1, 2, "file")
            finally:
                ended.set()

        task = asyncio.ensure_future(stoppable(work, lambda _done: None))
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended.is_set()

    async def test_work_that_fails_raises_its_own_error(self) -> None:
        def work(_step: Step) -> None:
            raise CloisterError(Code.DISK_FULL, what="full")

        with pytest.raises(CloisterError):
            await stoppable(work, lambda _done: None)


class TestSearchForPlaintext:
    TEXTS = ("房间很干净，服务也好".encode(), b"a long enough english sentence")

    def test_ciphertext_passes(self, tmp_path: Path) -> None:
        (tmp_path / "train.tsv.sealed").write_bytes(os.urandom(10_000))
        (tmp_path / "cloister-manifest.json").write_bytes(b"{}")
        assert demodata.require_only_ciphertext(tmp_path, self.TEXTS) == 10_002

    def test_a_text_in_the_middle_of_a_sealed_file_is_found(self, tmp_path: Path) -> None:
        (tmp_path / "x.sealed").write_bytes(os.urandom(5_000) + self.TEXTS[0] + os.urandom(50))
        with pytest.raises(CloisterError) as caught:
            demodata.require_only_ciphertext(tmp_path, self.TEXTS)
        assert caught.value.code is Code.NOT_SEALED

    def test_a_file_of_another_form_is_refused_whatever_is_in_it(self, tmp_path: Path) -> None:
        (tmp_path / "train.tsv").write_bytes(os.urandom(10))
        with pytest.raises(CloisterError):
            demodata.require_only_ciphertext(tmp_path, self.TEXTS)

    def test_only_what_the_demo_made_is_removed(self, tmp_path: Path) -> None:
        theirs, own = tmp_path / "theirs", tmp_path / "own"
        for directory in (theirs, own):
            directory.mkdir()
        demodata.DemoData(theirs, {}, "sample", own=False).remove()
        demodata.DemoData(own, {}, "sample", own=True).remove()
        assert theirs.exists()
        assert not own.exists()

    def test_data_without_its_three_files_is_refused_by_name(self, tmp_path: Path) -> None:
        (tmp_path / "train.tsv").write_text("label\ttext_a\n1\tx\n")
        with pytest.raises(CloisterError, match=r"dev\.tsv, test\.tsv"):
            demodata.prepare(tmp_path, tmp_path / "scratch", rows=24)

    def test_the_sample_is_checked_and_its_texts_are_known(self, tmp_path: Path) -> None:
        data = demodata.prepare(None, tmp_path, rows=72)
        assert sum(data.rows.values()) == len(data.texts()) == 72
