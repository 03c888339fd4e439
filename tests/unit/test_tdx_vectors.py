# SPDX-License-Identifier: Apache-2.0
"""Claims about real quotes and real event logs: Intel's platforms, not ours.

They are found in $CLOISTER_TEST_VECTORS or in ../shared/vectors beside the repository, and are not part of it.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.errors import CloisterError
from cloister.tdx.eventlog import EventLog, EventLogRejected
from cloister.tdx.pckchain import verify_pck_chain
from cloister.tdx.quote import Quote, QuoteRejected
from cloister.tdx.verify import TrustRoot, verify_quote
from cloister.tdx.workload import read_workload

DEFAULT = Path(__file__).parents[3] / "shared" / "vectors"
DIRECTORY = Path(os.environ.get("CLOISTER_TEST_VECTORS", DEFAULT)) / "tdx"


def manifest() -> dict[str, Any]:
    path = DIRECTORY / "manifest.json"
    return cast(dict[str, Any], json.loads(path.read_text())) if path.exists() else {"vectors": [], "eventlogs": []}


MANIFEST = manifest()
TDS = [vector for vector in MANIFEST["vectors"] if vector["tee"] == "TDX"]
SGX = [vector for vector in MANIFEST["vectors"] if vector["tee"] == "SGX"]
# They end in the first edition of Intel's root, of path length 0, which is not the one that is pinned.
OLD_ROOT = {f"sgx_v3_00906ea10000_{name}" for name in ("44724863", "74433285", "f1ff3893")}
JSON_LOGS = [log for log in MANIFEST["eventlogs"] if log["format"].startswith("json")]
needs_vectors = pytest.mark.skipif(not TDS, reason=f"no real quotes in {DIRECTORY}; set CLOISTER_TEST_VECTORS")


def by_name(vectors: list[dict[str, Any]]) -> Any:
    missing = [pytest.param({}, marks=needs_vectors, id="none")]
    return pytest.mark.parametrize("vector", [pytest.param(v, id=v["name"]) for v in vectors] or missing)


def read(vector: dict[str, Any]) -> bytes:
    return (DIRECTORY / vector["quote_file"]).read_bytes()


def times(vector: dict[str, Any]) -> list[datetime]:
    return [datetime.fromtimestamp(v["verification_time"], UTC) for v in vector["verifications"]]


@pytest.fixture(scope="module")
def root() -> TrustRoot:
    return TrustRoot((DIRECTORY / "root_ca.der").read_bytes(), simulated=False)


def test_ci_has_the_real_quotes() -> None:
    if os.environ.get("CI") == "true":
        assert len(TDS) >= 26, f"no real quotes in {DIRECTORY}"
        assert len(JSON_LOGS) >= 4


@by_name(TDS)
def test_a_real_quote_is_read_and_written_byte_for_byte(vector: dict[str, Any]) -> None:
    quote = Quote.parse(read(vector))
    assert quote.to_bytes() == read(vector)
    fields = {f"rtmr{n}": rtmr for n, rtmr in enumerate(quote.body.rtmrs)}
    found = {name: fields[name] if name in fields else getattr(quote.body, name) for name in vector["expected_fields"]}
    assert {name: value.hex() for name, value in found.items()} == vector["expected_fields"]


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
