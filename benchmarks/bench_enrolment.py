# SPDX-License-Identifier: Apache-2.0
"""Enrolments against a running attest: how many a second, in a burst, and under a flood of garbage. Loopback only.

    python benchmarks/bench_enrolment.py [--seconds 6] [--burst 1000] [--json]

Attest and the simulated platform are processes of their own, as users run them. The TDs are objects of this process
with their keys made beforehand; each enrolment is what the guest library does: challenge, quote, request, two fresh TLS
connections, and every check of the answer. Client and attest share the machine's cores, so attest's own CPU time stands
beside its rate.

steady  1, 16, 128 TDs that enrol over and over; the rate limit is out of the way
burst   1,000 TDs that start together behind one address, with the rate limit as it is delivered
flood   one address sends 32, 200, 500, 1,000 quotes at once that verify and are over something else, and others as soon
        as they are answered; or such quotes with event logs of 800 KB; or as many connections, each with the first
        message of a handshake and then another one.
        Limits as delivered; the enrolment that is timed comes from another address (127.0.0.2, through a relay, with
        and without the flood)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import resource
import ssl
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.api.common.v1 import evidence_pb2
from cloister.errors import CloisterError
from cloister.guest.enrol import Identity
from cloister.guest.guest import Guest
from cloister.identity import Role
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import invoke, open_enrolment_channel
from cloister.tdx.eventlog import Event, EventLog
from cloister_sim.platform import SimulatedPlatform
from fakes.attest_harness import SCRIPT, AttestProcess, TdProvider, measure

IN_FLIGHT = (1, 16, 128)
NO_LIMIT = {"calls_per_s": 10_000, "calls_burst": 100_000}
FLOODS = (*(("calls", number) for number in (32, 200, 500, 1000)), ("large calls", 200), ("connections", 1000))
FLOOD_S, TIMED = 5.0, 60
_TICK = os.sysconf("SC_CLK_TCK")


class Bench:
    """One attest with TDs to enrol."""

    def __init__(self, attest: AttestProcess) -> None:
        self._attest = attest
        self._platform = SimulatedPlatform.create(attest.directory / "platform")
        self.endpoint = attest.endpoints["enrolment"]
        self.bundle: TrustBundle = attest.bundle
        self._pid = attest.pid("cloister_attest")

    def tds(self, count: int) -> list[Guest]:
        guests = [Guest(TdProvider(self._platform)) for _ in range(count)]
        for guest in guests:
            measure(guest, Role.TRAINER, bundle=self.bundle.digest, script=SCRIPT)
        return guests

    def garbage(self, *, large: bool) -> bytes:
        """Return evidence that is in order but for its quote, which is a genuine platform's over something else."""
        (guest,) = self.tds(1)
        audience = f"spiffe://{self.bundle.trust_domain}/service/attest"
        evidence = guest.evidence(nonce=bytes(32), audience=audience, trust_domain=self.bundle.trust_domain)
        if large:
            event = Event(2, 0x0000000D, "", bytes(20), bytes(48))
            evidence.event_log = EventLog((event,) * 4000).to_json()
        return evidence.SerializeToString()

    async def enrol(self, guest: Guest, endpoint: str = "") -> float:
        """Enrol once; return the seconds that it took."""
        start = time.perf_counter()
        await Identity.enrol(guest, attest_endpoint=endpoint or self.endpoint, bundle=self.bundle)
        return time.perf_counter() - start

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def peak_mib(self) -> float:
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024


@asynccontextmanager
async def bench(**options: int) -> AsyncIterator[Bench]:
    with tempfile.TemporaryDirectory(prefix="clo-") as directory:
        attest = AttestProcess(Path(directory), **options)
        try:
            await attest.start_platform()
            attest.write_config()
            await attest.start()
            yield Bench(attest)
        finally:
            await attest.stop_all()


async def steady(bench: Bench, in_flight: int, seconds: float) -> dict[str, Any]:
    """Keep so many enrolments in flight for so long."""
    guests, times, failures = bench.tds(in_flight), [], Counter[str]()
    end = time.perf_counter() + seconds

    async def one(guest: Guest) -> None:
        while time.perf_counter() < end:
            try:
                times.append(await bench.enrol(guest))
            except CloisterError as error:
                failures[error.code.name] += 1

    cpu, start = bench.cpu_s(), time.perf_counter()
    await asyncio.gather(*map(one, guests))
    took = time.perf_counter() - start
    cpu_ms = (bench.cpu_s() - cpu) / len(times) * 1000
    return {"in_flight": in_flight, "per_s": len(times) / took, "cpu_ms": cpu_ms, "errors": dict(failures)} | _of(times)


async def burst(bench: Bench, count: int) -> dict[str, Any]:
    """Enrol so many TDs that start together."""
    guests, before = bench.tds(count), bench.peak_mib()
    start = time.perf_counter()
    outcomes = await asyncio.gather(*map(bench.enrol, guests), return_exceptions=True)
    took = time.perf_counter() - start
    failures = Counter(
        outcome.code.name if isinstance(outcome, CloisterError) else type(outcome).__name__
        for outcome in outcomes
        if isinstance(outcome, BaseException)
    )
    times = [outcome for outcome in outcomes if isinstance(outcome, float)]
    return {
        "tds": count,
        "seconds": took,
        "errors": dict(failures),
        "peak_mib": [before, bench.peak_mib()],
    } | _of(times)


async def flood(bench: Bench) -> dict[str, Any]:
    """Time enrolments from another address, without a flood and with one."""
    (guest,) = bench.tds(1)
    found: dict[str, Any] = {"floods": []}
    async with relay(bench.endpoint, "127.0.0.2") as endpoint:
        await bench.enrol(guest, endpoint)
        for kind, in_flight in FLOODS:
            # Right before each flood: what else runs on the machine changes.
            quiet = statistics.median([await bench.enrol(guest, endpoint) for _ in range(TIMED)])
            times: list[float] = []
            async with flooder(bench, kind, in_flight) as answers:
                end = time.perf_counter() + FLOOD_S
                while time.perf_counter() < end:
                    times.append(await bench.enrol(guest, endpoint))
            flooded = statistics.median(times)
            row = {"kind": kind, "in_flight": in_flight, "flooded_ms": flooded * 1000, "ratio": flooded / quiet}
            found["floods"].append(row | {"quiet_ms": quiet * 1000, "answers": answers})
    return found


@asynccontextmanager
async def flooder(bench: Bench, kind: str, in_flight: int) -> AsyncIterator[dict[str, float]]:
    """Run a flood in a process of its own; how often it was answered, and how, is known at the end."""
    spec = {
        "kind": kind,
        "endpoint": bench.endpoint,
        "bundle": bench.bundle.to_bytes().decode(),
        "evidence": bench.garbage(large=kind == "large calls").hex(),
        "in_flight": in_flight,
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(spec))
        file.flush()
        async with _flooder(file.name) as answers:
            yield answers


@asynccontextmanager
async def _flooder(spec_file: str) -> AsyncIterator[dict[str, float]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--as-flooder", spec_file,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    answers: dict[str, float] = {}
    try:
        await process.stdout.readline()  # it floods
        yield answers
    finally:
        process.stdin.close()
        answers |= json.loads(await process.stdout.readline() or "{}")
        await process.wait()


async def run_flooder(kind: str, endpoint: str, bundle: str, evidence: str, in_flight: int) -> None:
    """Send garbage until standard input ends, for a limited time at most; then tell how it was answered."""
    answers, stop = Counter[str](), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), stop.set)
    loop.call_later(3 * FLOOD_S, stop.set)
    start = time.perf_counter()
    if kind != "connections":
        garbage = evidence_pb2.Evidence.FromString(bytes.fromhex(evidence))
        await flood_with_calls(endpoint, TrustBundle.parse(bundle.encode()), garbage, in_flight, answers, stop)
    else:
        await flood_with_connections(endpoint, in_flight, answers, stop)
    took = time.perf_counter() - start
    print(json.dumps({name: count / took for name, count in answers.items()}), flush=True)


async def flood_with_calls(
    endpoint: str,
    bundle: TrustBundle,
    garbage: evidence_pb2.Evidence,
    in_flight: int,
    answers: Counter[str],
    stop: asyncio.Event,
) -> None:
    """Keep so many enrolments in flight, over four connections."""

    async def one(stub: attest_pb2_grpc.EnrolmentServiceStub) -> None:
        while not stop.is_set():
            try:
                challenge = await invoke(
                    stub.Challenge, attest_pb2.ChallengeRequest(role="trainer"), timeout_s=10, what="ask"
                )
                request = attest_pb2.AttestRequest(evidence=garbage, challenge_nonce=challenge.nonce)
                request.evidence.nonce = challenge.nonce
                await invoke(stub.Attest, request, timeout_s=10, what="attest")
            except CloisterError as error:
                answers[error.code.name] += 1

    async with AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(open_enrolment_channel(endpoint, bundle=bundle)) for _ in range(4)]
        stubs = [attest_pb2_grpc.EnrolmentServiceStub(channel) for channel in channels]
        tasks = [asyncio.create_task(one(stubs[number % 4])) for number in range(in_flight)]
        print("floods", flush=True)
        await asyncio.gather(*tasks)


async def flood_with_connections(endpoint: str, in_flight: int, answers: Counter[str], stop: asyncio.Event) -> None:
    """Keep so many connections open, each until its handshake was answered: what costs a caller least."""
    host, _, port = endpoint.rpartition(":")
    context, hello = ssl.create_default_context(), ssl.MemoryBIO()
    context.set_alpn_protocols(["h2"])
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="attest").do_handshake()
    first = hello.read()

    async def one() -> None:
        while not stop.is_set():
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(first)
                found = await asyncio.wait_for(reader.read(1), 10)
                answers["answered" if found else "closed"] += 1
                writer.close()
            except (OSError, TimeoutError) as error:
                answers[type(error).__name__] += 1

    tasks = [asyncio.create_task(one()) for _ in range(in_flight)]
    print("floods", flush=True)
    await asyncio.gather(*tasks)


@asynccontextmanager
async def relay(endpoint: str, source: str) -> AsyncIterator[str]:
    """Pass connections on to `endpoint`, from another address."""
    host, _, port = endpoint.rpartition(":")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port), local_addr=(source, 0))
        await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _of(times: Sequence[float]) -> dict[str, float]:
    if len(times) < 2:
        return {"p50_ms": 0.0, "p99_ms": 0.0}
    return {"p50_ms": statistics.median(times) * 1000, "p99_ms": statistics.quantiles(times, n=100)[98] * 1000}


async def run(seconds: float, count: int) -> dict[str, Any]:
    async with bench(**NO_LIMIT) as open_attest:
        await open_attest.enrol(open_attest.tds(1)[0])
        rows = [await steady(open_attest, in_flight, seconds) for in_flight in IN_FLIGHT]
    async with bench() as attest:
        flooded = await flood(attest)
    async with bench() as attest:
        return {"steady": rows, "flood": flooded, "burst": await burst(attest, count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each steady run")
    parser.add_argument("--burst", type=int, default=1000, help="TDs that start together")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-flooder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.as_flooder:
        asyncio.run(run_flooder(**json.loads(Path(arguments.as_flooder).read_text())))
        return
    # Every TD of the burst has its own connection.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096 + 4 * arguments.burst)), hard))
    results = asyncio.run(run(arguments.seconds, arguments.burst))
    if arguments.json:
        print(json.dumps(results))
        return
    print(f"{'TDs in flight':>14} {'enrolments/s':>13} {'p50':>9} {'p99':>9} {'attest CPU':>11}  errors")
    for row in results["steady"]:
        print(
            f"{row['in_flight']:14} {row['per_s']:13.1f} {row['p50_ms']:6.1f} ms {row['p99_ms']:6.1f} ms"
            f" {row['cpu_ms']:8.1f} ms  {row['errors'] or 'none'}"
        )
    found, (before, after) = results["burst"], results["burst"]["peak_mib"]
    print(
        f"burst of {found['tds']}: {found['seconds']:.1f} s, p50 {found['p50_ms'] / 1000:.1f} s,"
        f" p99 {found['p99_ms'] / 1000:.1f} s; errors: {found['errors'] or 'none'};"
        f" attest's peak memory {before:.0f} -> {after:.0f} MiB"
    )
    for row in results["flood"]["floods"]:
        answers = ", ".join(f"{name} {rate:.0f}/s" for name, rate in row["answers"].items())
        print(
            f"flood of {row['kind']}, {row['in_flight']} in flight: {row['flooded_ms']:.1f} ms instead of"
            f" {row['quiet_ms']:.1f} ms, {row['ratio']:.2f} x (wanted: <= 2 x); answered {answers}"
        )


if __name__ == "__main__":
    main()
