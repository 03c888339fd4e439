# SPDX-License-Identifier: Apache-2.0
"""Time to verify one quote on one core, side by side with PyPI `dcap-qvl` (Rust) in the same run.

    python benchmarks/bench_attest.py [--vectors DIRECTORY] [--rounds 400] [--json]

cold    quote and collateral seen for the first time
warm    the same platform's next quote: chain and collateral are known, and asked for their time again

Both verifiers get the same bytes: real quotes with their collateral, where there are any ($CLOISTER_TEST_VECTORS, or
../shared/vectors beside the repository), and a simulated platform's otherwise. dcap-qvl keeps nothing between quotes,
so its one figure stands beside both. The two take turns, so that what else runs on the machine slows both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cloister.tdx.collateral import Collateral
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verifier import Verifier
from cloister.tdx.verify import verify_with_collateral
from cloister_sim import SimulatedPlatform

VECTORS = Path(__file__).parents[2] / "shared" / "vectors"
WARM_MS, COLD_MS, WARM_RATIO = 0.25, 1.6, 3.0


@dataclass(frozen=True)
class Subject:
    """A quote with everything that it is verified by."""

    name: str
    quote: bytes
    collateral: Collateral
    root: TrustRoot
    now: datetime


def subjects(directory: Path) -> list[Subject]:
    """Return one accepted quote of every version, or a simulated one."""
    manifest = directory / "tdx" / "manifest.json"
    if not manifest.exists():
        return [simulated()]
    root = TrustRoot((manifest.parent / "root_ca.der").read_bytes(), simulated=False)
    found: dict[int, Subject] = {}
    for vector in json.loads(manifest.read_text())["vectors"]:
        for verification in vector["verifications"]:
            # dcap-qvl refuses debug quotes by itself.
            if verification["expected"].get("default_policy") in ("accept", "policy decides on status"):
                found.setdefault(
                    vector["quote_version"],
                    Subject(
                        f"version {vector['quote_version']}, {vector['body']}",
                        (manifest.parent / vector["quote_file"]).read_bytes(),
                        Collateral.parse((manifest.parent / verification["collateral_file"]).read_bytes()),
                        root,
                        datetime.fromtimestamp(verification["verification_time"], UTC),
                    ),
                )
    return [found[version] for version in sorted(found)]


def simulated() -> Subject:
    now = datetime.now(UTC)
    with tempfile.TemporaryDirectory() as directory:
        platform = SimulatedPlatform.create(directory)
        quote = platform.launch(bytes(48)).quote(b"r" * 64)
        root = TrustRoot.from_pem(platform.root_pem, simulated=True)
        return Subject("simulated, version 4", quote, platform.collateral(now), root, now)


def theirs(subject: Subject) -> Callable[[], object] | None:
    try:
        dcap_qvl = importlib.import_module("dcap_qvl")
    except ImportError:
        return None
    collateral = dcap_qvl.QuoteCollateralV3.from_json(subject.collateral.to_json().decode())
    seconds, root = int(subject.now.timestamp()), subject.root.certificate_der
    return lambda: dcap_qvl.verify_with_root_ca(subject.quote, collateral, root, seconds)


def medians_ms(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Run the calls in turns; return the median of each, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) * 1000 for name, values in times.items()}


def measure(subject: Subject, rounds: int) -> dict[str, Any]:
    verifier = Verifier([subject.root])
    calls: dict[str, Callable[[], object]] = {
        "warm": lambda: verifier.verify(subject.quote, subject.collateral, now=subject.now),
        "cold": lambda: verify_with_collateral(
            subject.quote, subject.collateral, roots=[subject.root], now=subject.now
        ),
    }
    other = theirs(subject)
    if other is not None:
        try:
            other()
        except ValueError as error:
            print(f"dcap-qvl refuses {subject.name}: {error}")
        else:
            calls["dcap-qvl"] = other
    found = medians_ms(calls, rounds)
    return {"quote": subject.name, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=Path, default=Path(os.environ.get("CLOISTER_TEST_VECTORS", VECTORS)))
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    # One core: the scheduler does not move us in the middle of a measurement.
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    results = [measure(subject, arguments.rounds) for subject in subjects(arguments.vectors)]
    if arguments.json:
        print(json.dumps(results))
        return
    columns = ("warm", "cold", "dcap-qvl", "warm is", "cold is")
    print(f"{'median of ' + str(arguments.rounds):26} " + " ".join(f"{name:>9}" for name in columns))
    for row in results:
        theirs_ms = row.get("dcap-qvl")
        ratios = [f"{theirs_ms / row[kind]:7.1f} x" if theirs_ms else "-" for kind in ("warm", "cold")]
        shown = f"{theirs_ms:6.3f} ms" if theirs_ms else "-"
        print(f"{row['quote']:26} {row['warm']:6.3f} ms {row['cold']:6.3f} ms {shown:>9} {ratios[0]:>9} {ratios[1]:>9}")
    print(f"wanted: warm <= {WARM_MS} ms and {WARM_RATIO:.0f} x dcap-qvl, cold <= {COLD_MS} ms")


if __name__ == "__main__":
    main()
