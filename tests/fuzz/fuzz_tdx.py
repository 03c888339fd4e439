# SPDX-License-Identifier: Apache-2.0
"""Fuzz quotes and event logs with coverage guidance: whatever comes in, only the format's one error comes out.

    python tests/fuzz/fuzz_tdx.py quote -max_total_time=600
    python tests/fuzz/fuzz_tdx.py log corpus-directory/

Arguments after the target are libFuzzer's. Needs `atheris` (extra `dev`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["cloister"]):
    from cloister.tdx.eventlog import EventLog, EventLogRejected
    from cloister.tdx.quote import Quote, QuoteRejected
    from cloister.tdx.show import describe
    from cloister.tdx.verify import TrustRoot, verify_quote
    from cloister.tdx.workload import read_workload

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"
ROOT = TrustRoot.from_pem((VECTORS / "root.pem").read_bytes(), simulated=True)
NOW = datetime.fromisoformat(json.loads((VECTORS / "expected.json").read_text())["verification_time"])


def one_quote(data: bytes) -> None:
    try:
        quote = Quote.parse(data)
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


TARGETS = {"quote": (one_quote, "quote.bin"), "log": (one_log, "eventlog.json")}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer arguments]")
    target, seed = TARGETS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as corpus:
        (Path(corpus) / seed).write_bytes((VECTORS / seed).read_bytes())
        atheris.Setup([*sys.argv, corpus, "-max_len=66000"], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
