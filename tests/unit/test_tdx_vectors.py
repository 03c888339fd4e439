# SPDX-License-Identifier: Apache-2.0
"""Claims about real quotes and real event logs: Intel's platforms, not ours.

What they are, and where they are found: fakes.real_vectors.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.errors import CloisterError
from cloister.tdx.ccel import CcelLog
from cloister.tdx.collateral import Collateral
from cloister.tdx.conformance import run_case
from cloister.tdx.eventlog import EventLog, EventLogRejected
from cloister.tdx.pckchain import verify_pck_chain
from cloister.tdx.quote import Quote, QuoteRejected, parse_quote
from cloister.tdx.show import describe
from cloister.tdx.verifier import Verifier
from cloister.tdx.verify import TrustRoot, verify_quote, verify_with_collateral
from cloister.tdx.workload import read_workload
from fakes.real_vectors import DIRECTORY, MANIFEST, needs_vectors

TDS = [vector for vector in MANIFEST["vectors"] if vector["tee"] == "TDX"]
SGX = [vector for vector in MANIFEST["vectors"] if vector["tee"] == "SGX"]
SECTIONS = {"header", "TD", "enclave", "quoting enclave", "signature"}
# They end in the first edition of Intel's root, of path length 0, which is not the one that is pinned.
OLD_ROOT = {f"sgx_v3_00906ea10000_{name}" for name in ("44724863", "74433285", "f1ff3893")}
ALL = MANIFEST["vectors"]
VERIFICATIONS = [
    {**vector, "verification": verification, "name": f"{vector['name']}-{number}"}
    for vector in ALL
    for number, verification in enumerate(vector["verifications"])
]
CCEL_LOGS = [log for log in MANIFEST["eventlogs"] if log["format"].startswith("TCG2")]
JSON_LOGS = [log for log in MANIFEST["eventlogs"] if log["format"].startswith("json")]


def by_name(vectors: list[dict[str, Any]]) -> Any:
    missing = [pytest.param({}, marks=needs_vectors, id="none")]
    return pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in vectors] or missing)


def read(vector: dict[str, Any]) -> bytes:
    return (DIRECTORY / vector["quote_file"]).read_bytes()


def unix(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def collateral_of(vector: dict[str, Any]) -> Collateral:
    return Collateral.parse((DIRECTORY / vector["verification"]["collateral_file"]).read_bytes())


def times(vector: dict[str, Any]) -> list[datetime]:
    return [datetime.fromtimestamp(v["verification_time"], UTC) for v in vector["verifications"]]


@pytest.fixture(scope="module")
def root() -> TrustRoot:
    return TrustRoot((DIRECTORY / "root_ca.der").read_bytes(), simulated=False)


@needs_vectors
def test_there_are_all_of_the_real_quotes() -> None:
    assert (len(ALL), len(VERIFICATIONS)) >= (43, 74)
    assert len(JSON_LOGS) + len(CCEL_LOGS) >= 8


def in_another_process(**environment: str) -> str:
    """Collect and run one of these tests where there are no vectors; return what pytest says."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:randomly"]
    command += [f"{__file__}::test_there_are_all_of_the_real_quotes"]
    variables = {name: value for name, value in os.environ.items() if name != "CI"}
    variables |= {"CLOISTER_TEST_VECTORS": "/nowhere"} | environment
    ran = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    return f"exit code {ran.returncode}: {ran.stdout}"


def test_without_the_real_quotes_tests_are_skipped_and_say_so() -> None:
    said = in_another_process()
    assert "1 skipped" in said
    assert "no real quotes in /nowhere/tdx; set CLOISTER_TEST_VECTORS" in said


def test_without_the_real_quotes_ci_fails() -> None:
    said = in_another_process(CI="true")
    assert not said.startswith("exit code 0")
    assert "no real quotes in /nowhere/tdx; set CLOISTER_TEST_VECTORS" in said


@by_name(ALL)
def test_a_real_quote_is_read_and_written_byte_for_byte(vector: dict[str, Any]) -> None:
    quote = parse_quote(read(vector))
    assert quote.to_bytes() == read(vector)
    assert quote.version == vector["quote_version"]
    fields: dict[str, object] = {}
    if isinstance(quote, Quote):
        fields = {f"rtmr{n}": rtmr.hex() for n, rtmr in enumerate(quote.body.rtmrs)}
    for name, wanted in vector["expected_fields"].items():
        if name not in fields:
            value = getattr(quote.body, name)
            fields[name] = value.hex() if isinstance(wanted, str) else int.from_bytes(value, "little")
    assert fields == vector["expected_fields"]
    assert [row for row in describe(quote) if row[0] not in SECTIONS] == []


@by_name(VERIFICATIONS)
def test_a_real_quote_gets_the_verdict_that_it_must(vector: dict[str, Any], root: TrustRoot) -> None:
    expected, now = vector["verification"]["expected"], unix(vector["verification"]["verification_time"])
    collateral = collateral_of(vector)
    for verify in (
        lambda: verify_with_collateral(read(vector), collateral, roots=[root], now=now),
        lambda: Verifier([root]).verify(read(vector), collateral, now=now),
    ):
        if expected["verify"] == "reject":
            with pytest.raises(QuoteRejected) as caught:
                verify()
            assert caught.value.check == ("P2" if vector["name"][:-2] in OLD_ROOT else "T10")
            continue
        verdict = verify()
        assert verdict.status == expected["status"]
        if expected["advisories"] is not None:
            assert list(verdict.advisories) == sorted(expected["advisories"])
        assert verdict.earliest_expiry >= now
        assert all(check.ok for check in verdict.checks)


# What a policy finds first, in the manifest's words.
REASONS = {"Debug mode is enabled": "A1", "SEPT_VE_DISABLE is not enabled": "A3", "Invalid MR service TD": "A8"}


@by_name(VERIFICATIONS)
def test_a_real_quote_gets_the_answer_of_a_conformance_suite(vector: dict[str, Any]) -> None:
    expected = vector["verification"]["expected"]
    case = {
        "id": vector["name"],
        "quote_hex": read(vector).hex(),
        "collateral": json.loads((DIRECTORY / vector["verification"]["collateral_file"]).read_text()),
        "root_der_b64": base64.b64encode((DIRECTORY / "root_ca.der").read_bytes()).decode(),
        "now": vector["verification"]["verification_time"],
    }
    verify = json.loads(run_case(json.dumps(case | {"policy": "verify"}).encode()))
    default = json.loads(run_case(json.dumps(case | {"policy": "default"}).encode()))
    assert (verify["verdict"], verify["status"]) == (expected["verify"], expected.get("status"))
    if expected["verify"] == "reject":
        assert default == verify
    elif expected["default_policy"] == "policy decides on status":
        assert (default["verdict"], default["check"]) == ("reject", "status")
    else:
        assert default["verdict"] == expected["default_policy"]
        assert default["check"] == REASONS.get(expected["policy_reason"])


@by_name(VERIFICATIONS)
def test_a_real_quote_is_refused_outside_its_collaterals_time(vector: dict[str, Any], root: TrustRoot) -> None:
    if vector["verification"]["expected"]["verify"] == "reject":
        return
    verifier, collateral = Verifier([root]), collateral_of(vector)
    end = verifier.verify(
        read(vector), collateral, now=unix(vector["verification"]["verification_time"])
    ).earliest_expiry
    assert verifier.verify(read(vector), collateral, now=end)
    for moment in (end + timedelta(seconds=1), end + timedelta(days=3650), end - timedelta(days=400)):
        with pytest.raises(QuoteRejected):
            verifier.verify(read(vector), collateral, now=moment)


@by_name(CCEL_LOGS)
def test_a_real_firmware_log_replays(vector: dict[str, Any]) -> None:
    log = CcelLog.parse((DIRECTORY / vector["file"]).read_bytes())
    replayed = log.replay()
    assert len(log.events) == vector["events"]
    assert [rtmr.hex() for rtmr in replayed] == vector["replayed_rtmrs"]
    if vector["quote_file"] is not None:
        assert Quote.parse(read(vector)).body.rtmrs == replayed


@by_name(TDS)
def test_a_real_quote_verifies_under_intels_root(vector: dict[str, Any], root: TrustRoot) -> None:
    for now in times(vector):
        verified = verify_quote(read(vector), roots=[root], now=now)
        assert not verified.simulated
        assert verified.fmspc.hex() == vector["pck"]["fmspc"]
        assert verified.pceid.hex() == vector["pck"]["pceid"]
        assert all(check.ok for check in verified.checks)


@by_name(TDS)
def test_a_real_quote_does_not_verify_before_its_certificate(vector: dict[str, Any], root: TrustRoot) -> None:
    before = datetime.fromisoformat(vector["pck"]["not_before"]).replace(year=2019)
    with pytest.raises(QuoteRejected) as caught:
        verify_quote(read(vector), roots=[root], now=before)
    assert caught.value.check == "P6"


@by_name(SGX)
def test_an_enclaves_quote_is_no_tds(vector: dict[str, Any], root: TrustRoot) -> None:
    with pytest.raises(QuoteRejected) as caught:
        verify_quote(read(vector), roots=[root], now=times(vector)[0])
    assert caught.value.check == "H5"


@by_name(SGX)
def test_its_pck_chain_is_read_as_a_tds_is(vector: dict[str, Any], root: TrustRoot) -> None:
    pem = read(vector)[read(vector).index(b"-----BEGIN") :]
    if vector["name"] in OLD_ROOT:
        with pytest.raises(QuoteRejected) as caught:
            verify_pck_chain(pem, roots=[root], now=times(vector)[0])
        assert caught.value.check == "P2"
        return
    chain = verify_pck_chain(pem, roots=[root], now=times(vector)[0])
    assert chain.pck.fmspc.hex() == vector["pck"]["fmspc"]
    assert chain.pck.tcb_components.hex() == vector["pck"]["cpu_svn"]
    assert chain.pck.pce_svn == vector["pck"]["pce_svn"]


@by_name(JSON_LOGS)
def test_a_real_event_log_replays_to_its_quote(vector: dict[str, Any]) -> None:
    log = EventLog.parse((DIRECTORY / vector["file"]).read_bytes())
    replayed = log.replay()
    assert len(log.events) == vector["events"]
    assert [rtmr.hex() for rtmr in replayed] == vector["replayed_rtmrs"]
    assert vector["match"] == [True] * 4
    assert Quote.parse(read(vector)).body.rtmrs == replayed
    assert EventLog.parse(log.to_json()) == log


@by_name(JSON_LOGS)
def test_another_systems_log_is_no_workload_of_ours(vector: dict[str, Any]) -> None:
    log = EventLog.parse((DIRECTORY / vector["file"]).read_bytes())
    with pytest.raises(EventLogRejected, match=r"cloister\.environment"):
        read_workload(log)


@needs_vectors
def test_a_real_root_is_not_a_development_root(root: TrustRoot) -> None:
    assert root.fingerprint.hex() == "44a0196b2b99f889b8e149e95b807a350e7424964399e885a7cbb8ccfab674d3"
    leaf = x509.load_pem_x509_certificates(Quote.parse(read(TDS[0])).signature.pck_chain_pem.rstrip(b"\0"))[0]
    with pytest.raises(CloisterError):
        TrustRoot(leaf.public_bytes(Encoding.DER), simulated=False)
