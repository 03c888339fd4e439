# SPDX-License-Identifier: Apache-2.0
"""Releases of data keys by a running broker, beside the cryptography that a release cannot do without. Loopback only.

    python benchmarks/bench_keybroker.py [--seconds 8] [--records 1000000] [--keys 10000] [--releases 100000] [--json]

The broker is a process of its own on one core: mutual TLS, embedded back end, a store that syncs every commit, its log
lines written as in production. A test CA stands in for attest. The load comes from another process on another core; a
release is BeginRelease and Release over an open connection, for a data key that exists. Rates are per second of the
broker's own CPU time, so that neither the load generator nor a busy machine counts against it; times are wall-clock.

floor   what a release must compute, in the broker's process and on its core: verify one ES256 signature (not where the
        token was seen before), open the wrapping key and the data key (AES-256-GCM), HPKE-seal (X25519+ML-KEM-768),
        sign a receipt (Ed25519)
rate    with tokens seen before (warm) and new ones (cold), 1, 16 and 64 in flight
scale   the same with 10,000 keys and 1,000,000 records; what an append, a proof and a start take as the log grows
memory  resident memory over 100,000 releases
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random  # noqa: TID251 - chooses keys to ask for
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import grpc
import uvloop
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cloister import hpke
from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.ear import Ear, issue
from cloister.errors import CloisterError
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import open_channel
from cloister.runtime.credentials import StaticCredentials, TlsMaterial
from cloister.runtime.logging import configure
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister.transparency.entry import Entry
from fakes.certs import TRUST_DOMAIN
from fakes.ear_sample import sample_ear
from fakes.keybroker_harness import KEY, TENANT, Broker, Clock, a_served_broker, leaf_sha256, policy_document

IN_FLIGHT = (1, 16, 64)
SIZES = (1_000, 10_000, 100_000, 1_000_000)
LEASE = timedelta(minutes=4)  # of a token
RANK = SpiffeId.of_rank(TRUST_DOMAIN, tenant=TENANT, job="bench", rank=0)
POLICY = {"evidence": {"max_age": "5m", "nonce": "verifier"}}
_TICK = os.sysconf("SC_CLK_TCK")


class RealTime(Clock):
    """The clock of a broker in production."""

    def __call__(self) -> datetime:
        return datetime.now(UTC)


def key_uri(number: int) -> KeyUri:
    return KEY if number == 0 else KeyUri.parse(f"cloister-key://{TENANT}/datasets/number-{number}")


# The broker's process.


async def as_broker(directory: Path) -> None:
    """Serve; hand the load generator what attest would have given it; answer commands."""
    configure("keybroker", "json")
    async with a_served_broker(directory, RealTime()) as (broker, endpoint):
        with contextlib.suppress(CloisterError):  # the store may have it
            await broker.create_key(policy_document(**POLICY))
        material = broker.ca.material(RANK)
        hello = {
            "endpoint": endpoint,
            "private_key": material.private_key_pem.reveal().decode(),
            "chain": material.chain_pem.decode(),
            "bundle": material.bundle.to_bytes().decode(),
            "token_key": broker.ca.token_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            "token_key_id": broker.ca.token_key_id,
        }
        print(json.dumps(hello), flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while command := (await reader.readline()).decode().strip():
            if command == "floor":
                print(json.dumps(floor()), flush=True)
            elif command == "log":
                print(json.dumps(await log_times(broker)), flush=True)


def floor() -> dict[str, float]:
    """Return the microseconds of each step of a release's own cryptography, medians."""
    private = ec.generate_private_key(ec.SECP256R1())
    message = secrets.token_bytes(2000)
    signature = private.sign(message, ec.ECDSA(hashes.SHA256()))
    public = private.public_key()
    recipient = HpkeKeyPair.generate().public_bytes
    secret = SecretBytes(secrets.token_bytes(32))
    receipt = Ed25519PrivateKey.generate()
    handle, wrapped = gcm_box(), gcm_box()

    def unwrap() -> None:
        handle()
        wrapped()

    return {
        "token_us": microseconds(lambda: public.verify(signature, message, ec.ECDSA(hashes.SHA256()))),
        "unwrap_us": microseconds(unwrap),
        "seal_us": microseconds(lambda: hpke.seal(recipient, secret, info=message[:400])),
        "receipt_us": microseconds(lambda: receipt.sign(message[:600])),
    }


def gcm_box() -> Callable[[], bytes]:
    key, nonce, aad = secrets.token_bytes(32), secrets.token_bytes(12), secrets.token_bytes(100)
    sealed = AESGCM(key).encrypt(nonce, secrets.token_bytes(32), aad)
    return lambda: AESGCM(key).decrypt(nonce, sealed, aad)


def microseconds(work: Callable[[], object], *, rounds: int = 400) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


async def log_times(broker: Broker) -> dict[str, float]:
    """Return what an append and proofs take in the store as it is (microseconds, no sync in them)."""
    size = await broker.store.read(lambda t: t.log.head().size)

    def appends(transaction: Any) -> float:
        return microseconds(lambda: transaction.append(an_entry(0), time_ms=1), rounds=300)

    def proofs(transaction: Any) -> tuple[float, float]:
        chosen = random.Random(1)
        return (
            microseconds(lambda: transaction.proofs.inclusion(chosen.randrange(size)), rounds=300),
            microseconds(lambda: transaction.proofs.consistency(chosen.randrange(1, size)), rounds=300),
        )

    inclusion, consistency = await broker.store.read(proofs)
    return {
        "records": size,
        "inclusion_us": inclusion,
        "consistency_us": consistency,
        "append_us": await broker.store.write(appends),
    }


def an_entry(number: int) -> Entry:
    """Return an entry of the size that a granted release has."""
    blocks = tuple(Block(f"tee.block-{n}", True, "sha384:" + "ab" * 20, "sha384:" + "ab" * 20) for n in range(20))
    return Entry(
        action="release",
        tenant=f"tenant-{number % 97}",
        key_uri=str(key_uri(number % 10_000)),
        caller=str(RANK),
        granted=True,
        blocks=blocks,
        key_version=1,
        purpose="train",
        job=f"{TENANT}/job/{number // 100}",
        channel="TLSv1.3, X25519MLKEM768",
        policy_digest=sha384(b"policy"),
        evidence_digest=sha384(b"token"),
        wrapped_digest=sha384(b"wrapped"),
        request_id="0123456789abcdef",
    )


async def as_builder(directory: Path, records: int, keys: int) -> None:
    """Make a store of so many keys and records."""
    configure("keybroker", "json")
    async with a_served_broker(directory, RealTime()) as (broker, _):
        await broker.create_key(policy_document(**POLICY))
        for chunk in chunks(1, keys, 100):
            await asyncio.gather(*(broker.create_key(policy_document(key_uri(n), **POLICY), key_uri(n)) for n in chunk))
        have = await broker.store.read(lambda t: t.log.head().size)
        for begin in range(have, records, 5_000):
            end = min(begin + 5_000, records)

            def append(transaction: Any, begin: int = begin, end: int = end) -> None:
                for number in range(begin, end):
                    transaction.append(an_entry(number), time_ms=number)

            await broker.store.write(append)


def chunks(begin: int, end: int, size: int) -> Iterator[range]:
    for first in range(begin, end, size):
        yield range(first, min(first + size, end))


# The load.


@dataclass
class Load:
    """A rank that asks for keys, with everything made beforehand that attest and the TD would make."""

    stub: rpc.KeyReleaseServiceStub
    token_key: ec.EllipticCurvePrivateKey
    token_key_id: str
    certificate_sha256: bytes
    hpke: HpkeKeyPair
    process: asyncio.subprocess.Process
    wrapped: dict[int, bytes] = field(default_factory=dict)

    def token(self, at: datetime | None = None) -> str:
        now = at or datetime.now(UTC)
        found = sample_ear(role=Role.RANK, now=now)
        ear: Ear = replace(
            found,
            spiffe_id=str(RANK),
            token_id=secrets.token_hex(16),
            certificate_sha256=self.certificate_sha256,
            hpke_key_digest=sha384(self.hpke.public_bytes),
            workload=replace(found.workload, tenant=TENANT, job="bench", rank=0),
        )
        return issue(ear, key=self.token_key, key_id=self.token_key_id)

    async def release(self, token: str, number: int = 0) -> float:
        """Begin and release; return the seconds that it took."""
        start = time.perf_counter()
        uri = str(key_uri(number))
        begun = await self.stub.BeginRelease(
            pb.BeginReleaseRequest(key_uri=uri, purpose=pb.PURPOSE_TRAIN, attestation_result=token)
        )
        request = pb.ReleaseRequest(
            attestation_result=token,
            key_uri=uri,
            key_version=1,
            purpose=pb.PURPOSE_TRAIN,
            client_nonce=secrets.token_bytes(32),
            broker_nonce=begun.nonce,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=self.hpke.public_bytes,
        )
        wrapped = self.wrapped.get(number)
        if wrapped is None:
            request.generate.SetInParent()
        else:
            request.wrapped = wrapped
        answer = await self.stub.Release(request)
        self.wrapped[number] = answer.data_key.wrapped
        return time.perf_counter() - start

    async def command(self, name: str) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{name}\n".encode())
        return json.loads(await self.process.stdout.readline())

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def resident_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024


@asynccontextmanager
async def a_broker(directory: Path, core: int) -> AsyncIterator[tuple[Load, float]]:
    """Start a broker on one core; give a load for it, and the seconds until it was ready."""
    start = time.perf_counter()
    with (directory / "bench.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            "taskset", "-c", str(core), sys.executable, __file__, "--as-broker", str(directory),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, limit=1 << 20,
        )  # fmt: skip
    assert process.stdout
    assert process.stdin
    try:
        line = await process.stdout.readline()
        ready = time.perf_counter() - start
        hello = json.loads(line)
        bundle = TrustBundle.parse(hello["bundle"].encode())
        chain = hello["chain"].encode()
        material = TlsMaterial(
            private_key_pem=SecretBytes(hello["private_key"].encode()),
            chain_pem=chain,
            bundle=bundle,
            spiffe_id=RANK,
            not_after=datetime.now(UTC) + timedelta(hours=1),
        )
        token_key = load_pem_private_key(hello["token_key"].encode(), None)
        assert isinstance(token_key, ec.EllipticCurvePrivateKey)
        credentials = StaticCredentials(material)
        async with open_channel(hello["endpoint"], role=Role.KEYBROKER, credentials=credentials) as channel:
            stub = rpc.KeyReleaseServiceStub(channel)
            certificate = leaf_sha256(chain)
            yield Load(stub, token_key, hello["token_key_id"], certificate, HpkeKeyPair.generate(), process), ready
    finally:
        process.stdin.close()
        await process.wait()


async def rate(load: Load, in_flight: int, seconds: float, *, cold: bool, keys: int = 1) -> dict[str, Any]:
    """Keep so many releases in flight for so long."""
    chosen = random.Random(in_flight)
    warm = load.token()
    fresh = [load.token() for _ in range(int(1500 * seconds))] if cold else []
    for number in range(min(keys, 4)):
        await load.release(warm, number)
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def one() -> None:
        while time.perf_counter() < end and (fresh or not cold):
            token = fresh.pop() if cold else warm
            times.append(await load.release(token, chosen.randrange(keys)))

    cpu, start = load.cpu_s(), time.perf_counter()
    await asyncio.gather(*(one() for _ in range(in_flight)))
    took = time.perf_counter() - start
    cpu_s = load.cpu_s() - cpu
    return {
        "in_flight": in_flight,
        "cold": cold,
        "per_s": len(times) / took,
        "per_cpu_s": len(times) / cpu_s,
        "cpu_us": cpu_s / len(times) * 1e6,
    } | _of(times)


def _of(times: Sequence[float]) -> dict[str, float]:
    return {"p50_ms": statistics.median(times) * 1000, "p99_ms": statistics.quantiles(times, n=100)[98] * 1000}


async def floor_under_load(load: Load) -> dict[str, float]:
    """Measure the floor while this core is as busy as it is under load: two cores may be one core's two threads."""
    waiting = asyncio.ensure_future(load.command("floor"))
    while not waiting.done():
        await asyncio.sleep(0)
    found: dict[str, float] = await waiting
    return found


async def memory(load: Load, releases: int) -> list[list[float]]:
    """Return (releases so far, resident MiB) as they go on, each with a token of the last minutes."""
    found, done, counter = [], 0, Counter[str]()
    token, renew = load.token(), time.monotonic() + LEASE.total_seconds() / 2

    async def one() -> None:
        nonlocal done, token, renew
        while done < releases:
            done += 1
            if time.monotonic() > renew:
                token, renew = load.token(), time.monotonic() + LEASE.total_seconds() / 2
            try:
                await load.release(token if done % 4 else load.token())
            except grpc.aio.AioRpcError as error:
                counter[error.details() or ""] += 1
            if done % max(1, releases // 10) == 0:
                found.append([float(done), load.resident_mib()])

    await asyncio.gather(*(one() for _ in range(32)))
    assert not counter, counter
    return found


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    core = cores[-1]
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[:-1]))
    results: dict[str, Any] = {}
    base = Path(tempfile.mkdtemp(prefix="clo-"))
    try:
        (base / "small").mkdir()
        async with a_broker(base / "small", core) as (load, _):
            await rate(load, 4, 1.0, cold=True)
            results["floor"] = [await floor_under_load(load)]
            results["rate"] = [
                await rate(load, in_flight, arguments.seconds, cold=cold)
                for cold in (False, True)
                for in_flight in IN_FLIGHT
            ]
            results["floor"].append(await floor_under_load(load))
            if arguments.releases:
                results["memory"] = await memory(load, arguments.releases)
        results["scale"] = []
        for size in (*(s for s in SIZES if s < arguments.records), arguments.records):
            if not arguments.records:
                break
            keys = arguments.keys if size == arguments.records else 1
            directory = base / f"{size}"
            directory.mkdir()
            builder = [sys.executable, __file__, "--build", str(directory), str(size), str(keys)]
            with (directory / "bench.log").open("ab") as log:
                process = await asyncio.create_subprocess_exec(*builder, stderr=log, stdout=log)
                assert await process.wait() == 0, (directory / "bench.log").read_text()[-3000:]
            async with a_broker(directory, core) as (load, ready):
                row = {"keys": keys, "start_s": ready} | await load.command("log")
                row |= await rate(load, 16, arguments.seconds, cold=False, keys=keys)
                results["scale"].append(row)
            shutil.rmtree(directory)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    return results


def show(results: dict[str, Any]) -> None:
    floors = results["floor"]
    steps = {name: statistics.mean(f[name] for f in floors) for name in floors[0]}
    warm_us = sum(us for name, us in steps.items() if name != "token_us")
    floor_of = {False: warm_us, True: warm_us + steps["token_us"]}
    print("floor: " + ", ".join(f"{name.removesuffix('_us')} {us:.0f} us" for name, us in steps.items()))
    print(f"       warm {1e6 / floor_of[False]:.0f}/s, cold {1e6 / floor_of[True]:.0f}/s on one core")
    print(
        f"{'tokens':>7} {'in flight':>10} {'per core':>10} {'of floor':>9} {'wall':>8} {'p50':>9} {'p99':>9} {'CPU':>8}"
    )
    for row in results["rate"]:
        ratio = row["per_cpu_s"] * floor_of[row["cold"]] / 1e6
        print(
            f"{'cold' if row['cold'] else 'warm':>7} {row['in_flight']:10} {row['per_cpu_s']:8.0f}/s {ratio:8.0%}"
            f" {row['per_s']:6.0f}/s {row['p50_ms']:6.1f} ms {row['p99_ms']:6.1f} ms {row['cpu_us']:5.0f} us"
        )
    for row in results["scale"]:
        print(
            f"{row['records']:9,} records, {row['keys']:6,} keys: start {row['start_s']:.1f} s, append"
            f" {row['append_us']:.0f} us, inclusion {row['inclusion_us']:.0f} us, consistency"
            f" {row['consistency_us']:.0f} us, {row['per_cpu_s']:.0f} releases/s, p50 {row['p50_ms']:.1f} ms"
        )
    if results.get("memory"):
        print("memory: " + ", ".join(f"{int(done):,}: {mib:.0f} MiB" for done, mib in results["memory"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--records", type=int, default=1_000_000, help="of the largest log; 0 leaves the part out")
    parser.add_argument("--keys", type=int, default=10_000, help="in the largest store")
    parser.add_argument("--releases", type=int, default=100_000, help="of the memory run; 0 leaves it out")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--as-broker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.as_broker:
            runner.run(as_broker(arguments.as_broker))
        elif arguments.build:
            directory, records, keys = arguments.build
            runner.run(as_builder(Path(directory), int(records), int(keys)))
        else:
            results = runner.run(run(arguments))
            print(json.dumps(results)) if arguments.json else show(results)


if __name__ == "__main__":
    main()
