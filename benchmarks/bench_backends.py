# SPDX-License-Identifier: Apache-2.0
"""What a data key costs at each back end: one unwrap after the other, and sixteen at once. Loopback only.

    python benchmarks/bench_backends.py [--seconds 2] [--json]

embedded is arithmetic; pkcs11 is SoftHSM2 through its one thread; ehsm (the development server) and transit (the server
of the tests) are over TLS, in this process, so their own time is in the figure. Compare with embedded of the same run:
what counts is the round trip.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.factory import open_backends
from cloister_keybroker.rootkey import RootKey
from fakes.ehsm_place import EhsmPlace
from fakes.softhsm_token import SoftToken
from fakes.transit_server import TransitServer

REF = KeyRef(KeyUri("bench", "key"), 1, KeyState.ENABLED, frozenset({Purpose.TRAIN}))


async def measured(uri: str, directory: Path, seconds: float, at_once: int) -> dict[str, float]:
    """Unwrap for so long; return unwraps a second and the times of one (milliseconds)."""
    root = RootKey(SecretBytes(secrets.token_bytes(32)))
    backend = await open_backends(uri, (), root, state_dir=directory, clock=lambda: datetime.now(UTC))
    handle = await backend.create(REF)
    fresh = await backend.generate(REF, handle)
    times: list[float] = []
    until = time.perf_counter() + seconds

    async def one_after_the_other() -> None:
        while (begun := time.perf_counter()) < until:
            await backend.unwrap(REF, handle, fresh.wrapped)
            times.append(time.perf_counter() - begun)

    await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
    await backend.aclose()
    cuts = statistics.quantiles(times, n=100)
    return {"per_s": len(times) / seconds, "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000}


async def run(seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    async with AsyncExitStack() as stack:
        token = SoftToken()
        stack.callback(token.close)
        server = await stack.enter_async_context(TransitServer())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place = await stack.enter_async_context(EhsmPlace(directory / "ehsm"))
        uris = {"embedded": "embedded:", "ehsm": place.uri, "pkcs11": token.uri, "transit": server.uri}
        return {
            name: {str(n): await measured(uri, directory, seconds, n) for n in (1, 16)} for name, uri in uris.items()
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Unwraps at each back end.")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = asyncio.run(run(arguments.seconds))
    if arguments.json:
        print(json.dumps(found))
        return
    floor = found["embedded"]["1"]["per_s"]
    print(f"{'back end':<10} {'at once':>7} {'unwraps/s':>10} {'of embedded':>12} {'p50 ms':>8} {'p99 ms':>8}")
    for name, by_number in found.items():
        for number, it in by_number.items():
            share = it["per_s"] / floor
            print(
                f"{name:<10} {number:>7} {it['per_s']:>10.0f} {share:>12.3f} {it['p50_ms']:>8.3f} {it['p99_ms']:>8.3f}"
            )


if __name__ == "__main__":
    main()
