# SPDX-License-Identifier: Apache-2.0
"""Fuzz quotes, event logs and collateral with coverage guidance: whatever comes in, one error per format comes out.

    python tests/fuzz/fuzz_tdx.py quote -max_total_time=600
    python tests/fuzz/fuzz_tdx.py log corpus-directory/
    python tests/fuzz/fuzz_tdx.py ccel|tcb-info|qe-identity|crl|collateral|case

Arguments after the target are libFuzzer's. Needs `atheris` (extra `dev`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import struct
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cloister"]):
    from cloister.tdx.ccel import CcelLog
    from cloister.tdx.collateral import Collateral
    from cloister.tdx.conformance import run_case
    from cloister.tdx.crl import to_der, verify_crl
    from cloister.tdx.eventlog import EventLog, EventLogRejected
    from cloister.tdx.quote import QuoteRejected, parse_quote
    from cloister.tdx.show import describe
    from cloister.tdx.tcbinfo import QeIdentity, TcbInfo
    from cloister.tdx.verify import TrustRoot, verify_quote, verify_with_collateral
    from cloister.tdx.workload import read_workload

from cloister_sim import SimulatedPlatform

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"
ROOT = TrustRoot.from_pem((VECTORS / "root.pem").read_bytes(), simulated=True)
PLATFORM = SimulatedPlatform.create(tempfile.mkdtemp())
COLLATERAL = PLATFORM.collateral(datetime.now(UTC))
PLATFORM_ROOT = TrustRoot.from_pem(PLATFORM.root_pem, simulated=True)
PLATFORM_QUOTE = PLATFORM.launch(bytes(48)).quote(b"r" * 64)
NOW = datetime.fromisoformat(json.loads((VECTORS / "expected.json").read_text())["verification_time"])


def one_quote(data: bytes) -> None:
    try:
        quote = parse_quote(data)
        if quote.to_bytes() != data:
            raise AssertionError("not written as it was read")
        describe(quote)
        verify_quote(data, roots=[ROOT], now=NOW)
    except QuoteRejected:
        pass


def one_log(data: bytes) -> None:
    try:
        log = EventLog.parse(data)
        if EventLog.parse(log.to_json()) != log:
            raise AssertionError("not written as it was read")
        read_workload(log)
    except EventLogRejected:
        pass


def one_firmware_log(data: bytes) -> None:
    with contextlib.suppress(EventLogRejected):
        CcelLog.parse(data).replay()


def one_tcb_info(data: bytes) -> None:
    with contextlib.suppress(QuoteRejected):
        TcbInfo.parse(data)


def one_qe_identity(data: bytes) -> None:
    with contextlib.suppress(QuoteRejected):
        QeIdentity.parse(data)


def one_crl(data: bytes) -> None:
    with contextlib.suppress(QuoteRejected):
        verify_crl(to_der(data, "list"), PLATFORM_ROOT.certificate, check="R1", what="list")


def one_collateral(data: bytes) -> None:
    try:
        collateral = Collateral.parse(data)
        verify_with_collateral(PLATFORM_QUOTE, collateral, roots=[PLATFORM_ROOT], now=datetime.now(UTC))
    except QuoteRejected:
        pass


def one_case(data: bytes) -> None:
    json.loads(run_case(data))


def a_case() -> bytes:
    return json.dumps(
        {
            "id": "seed",
            "quote_hex": PLATFORM_QUOTE.hex(),
            "collateral": json.loads(COLLATERAL.to_json()),
            "root_der_b64": base64.b64encode(PLATFORM_ROOT.certificate_der).decode(),
            "now": int(datetime.now(UTC).timestamp()),
            "policy": "default",
        }
    ).encode()


CCEL_SEED = (
    struct.pack("<II20sI", 1, 3, bytes(20), 33)
    + b"Spec ID Event03\0"
    + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 12, 48, 0)
    + struct.pack("<IIIH48sI", 3, 13, 1, 12, b"d" * 48, 4)
    + b"grub"
)
TARGETS = {
    "quote": (one_quote, (VECTORS / "quote.bin").read_bytes()),
    "log": (one_log, (VECTORS / "eventlog.json").read_bytes()),
    "ccel": (one_firmware_log, CCEL_SEED),
    "tcb-info": (one_tcb_info, COLLATERAL.tcb_info),
    "qe-identity": (one_qe_identity, COLLATERAL.qe_identity),
    "crl": (one_crl, COLLATERAL.root_ca_crl),
    "collateral": (one_collateral, COLLATERAL.to_json()),
    "case": (one_case, a_case()),
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer arguments]")
    target, seed = TARGETS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / "seed").write_bytes(seed)
        atheris.Setup([*sys.argv, corpus, "-max_len=66000"], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
