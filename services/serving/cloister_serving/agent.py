# SPDX-License-Identifier: Apache-2.0
"""The agent of one deployed model: a TD workload that starts the worker and gets it the model's key.

1. unpack the archive (ciphertext and handler) into a directory of its own, and check that it is the one asked for
2. start the stock worker, pinned; it imports torch meanwhile and waits for its first message
3. measure environment, trust bundle, handler, archive, identity and model manifest; seal; enrol as this backend
4. get the model's data key released to this TD's own HPKE key
5. hand it to the worker, once, when the handler asks; then stay, because the worker dies with its parent
6. renew the lease on the key; when it ends, the worker ends

What it tells the gateway goes through an inherited pipe (`reports`). The end of the other pipe, the lifeline, ends it,
and a byte there says that the model is ready. No secret is in its arguments, its environment or its directory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import hmac
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from cloister.atomicfile import file_error
from cloister.data.archive import Archive, extract_sealed, read_archive
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.guest import Guest
from cloister.guest.keys import KeyClient
from cloister.guest.measure import digest_of_environment, read_measured
from cloister.identity import Role
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.config import ConfigModel
from cloister.runtime.logging import configure, get_logger
from cloister.runtime.process import harden
from cloister.sealed.directory import Peek, SealedDirectory
from cloister.tdx.workload import BackendClaim, DatasetClaim, WorkloadPlan
from cloister.tlv import sha384
from cloister_serving import stockworker
from cloister_serving.keysocket import KeySocket, key_message
from cloister_serving.reports import Failed, Milestone, Reached, Reporter, WorkerStarted
from cloister_serving.stockworker import OutputTail, ProcessIdentity

MODEL_DIRECTORY: Final = "model"
READY_BYTE: Final = b"r"
_LAST_RESORT_S: Final = 5.0  # what an orderly end may take before the process ends anyway


class AgentSpec(ConfigModel):
    """What the gateway asks for; a file, because it is longer than an argument should be. No secrets."""

    provider: str
    attest_endpoint: str
    keybroker_endpoint: str
    trust_bundle: Path
    tenant: str
    model: str
    backend: str
    archive: Path
    archive_digest: str  # hexadecimal
    cores: tuple[int, ...]
    directory: Path
    log_format: Literal["json", "text"] = "json"


async def run(spec: AgentSpec, reporter: Reporter, stop: asyncio.Event, tail: OutputTail) -> None:
    """Serve one model until `stop` or the worker's end; raise CloisterError when it cannot, or can no longer."""
    archive = _unpack(spec)  # 1
    peek = SealedDirectory.peek(spec.directory / MODEL_DIRECTORY)
    reporter.send(Reached(Milestone.UNPACKED))
    key_socket = KeySocket(spec.directory, stockworker.KEY_SOCKET_NAME)
    handler_fd = stockworker.handler_memfd(archive.handler_name, archive.handler_source)
    process = await stockworker.start(spec.directory, handler_fd=handler_fd, cores=spec.cores)  # 2
    os.close(handler_fd)
    assert process.stdout is not None
    draining = asyncio.create_task(tail.drain(process.stdout))
    worker = ProcessIdentity.of(process.pid)
    reporter.send(WorkerStarted(process.pid))
    serving = asyncio.create_task(_provide_key(spec, archive, peek, key_socket, worker, reporter))
    stopping = asyncio.create_task(stop.wait())
    exited = asyncio.create_task(process.wait())
    try:
        waiting: set[asyncio.Task[None] | asyncio.Task[bool] | asyncio.Task[int]] = {serving, stopping, exited}
        while not (stopping.done() or exited.done()):
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                waiting.discard(serving)
                serving.result()
        if exited.done() and not stopping.done():
            await asyncio.wait({draining}, timeout=1)
            raise _ended(exited.result(), tail)
    except CloisterError as error:
        reporter.send(Failed(error))  # before the worker ends: that is the reason, and not what the gateway sees of it
        raise
    finally:
        key_socket.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the handler started, too
        await exited
        for task in (serving, stopping, draining):
            task.cancel()
        await asyncio.gather(serving, stopping, draining, return_exceptions=True)


def _unpack(spec: AgentSpec) -> Archive:
    try:
        with spec.archive.open("rb") as file:
            _check_digest(file, bytes.fromhex(spec.archive_digest))
            archive = read_archive(file)
            target = spec.directory / MODEL_DIRECTORY
            target.mkdir(mode=0o700)
            extract_sealed(file, archive, target)
    except OSError as error:
        raise file_error(error, what="the stored model archive cannot be unpacked") from error
    return archive


def _check_digest(file: io.BufferedReader, wanted: bytes) -> None:
    found = hashlib.file_digest(file, "sha384").digest()
    if not hmac.compare_digest(found, wanted):
        raise CloisterError(
            Code.ARCHIVE_INVALID,
            what="the stored archive is not the one that was uploaded",
            why=f"its SHA-384 begins with {found.hex()[:16]}, not with {wanted.hex()[:16]}",
            todo="upload the archive again",
        )


async def _provide_key(
    spec: AgentSpec, archive: Archive, peek: Peek, key_socket: KeySocket, worker: ProcessIdentity, reporter: Reporter
) -> None:
    bundle = TrustBundle.parse(read_measured(spec.trust_bundle).data)
    guest = await asyncio.to_thread(Guest.open, spec.provider)
    await asyncio.to_thread(_measure, guest, bundle, spec, archive, peek)  # 3
    reporter.send(Reached(Milestone.MEASURED))
    identity = await Identity.enrol(guest, attest_endpoint=spec.attest_endpoint, bundle=bundle)
    get_logger().info("enrolled", spiffe_id=str(identity.spiffe_id))
    reporter.send(Reached(Milestone.ENROLLED))
    keys = KeyClient(identity, spec.keybroker_endpoint)
    released = await keys.release(peek.key_uri, "serve", wrapped=peek.wrapped, key_version=peek.key_version)  # 4
    message = key_message(
        data_key=released.secret,
        wrapped=released.wrapped,
        key_uri=released.key_uri,
        key_version=released.key_version,
        manifest=peek.manifest_digest,
    )
    del released
    reporter.send(Reached(Milestone.KEY_RELEASED))
    keeping = asyncio.create_task(keys.keep_leases())  # 6
    try:
        await key_socket.hand_out(worker, message, on_denied=_log_denied)  # 5
        reporter.send(Reached(Milestone.KEY_HANDED_OVER))
        await keeping
    finally:
        keeping.cancel()


def _log_denied(pid: int) -> None:
    get_logger().warning("key denied to a process that is not the worker", pid=pid)


def _measure(guest: Guest, bundle: TrustBundle, spec: AgentSpec, archive: Archive, peek: Peek) -> None:
    guest.run_as(
        WorkloadPlan(
            role=Role.BACKEND,
            environment=digest_of_environment(),
            trust_bundle=bundle.digest,
            script=sha384(archive.handler_source),
            config=bytes.fromhex(spec.archive_digest),
            backend=BackendClaim(spec.tenant, spec.model, spec.backend),
            datasets=(DatasetClaim(MODEL_DIRECTORY, peek.manifest_digest),),
        )
    )


def _ended(code: int, tail: OutputTail) -> CloisterError:
    how = f"signal {signal.Signals(-code).name} ended it" if code < 0 else f"it ended with status {code}"
    said = tail.last_exception()
    return CloisterError(
        Code.MODEL_LOAD_FAILED,
        what="the model's worker ended",
        why=f"{how}; the last exception it printed: {said}" if said else how,
        todo="check the archive's handler and the model's files, then deploy again",
    )


def _watch_lifeline(descriptor: int, *, ready: Callable[[], object], gone: Callable[[], object]) -> None:
    """Follow the gateway's end of the pipe, in a thread: also when the event loop is stuck, this process ends."""

    def follow() -> None:
        while os.read(descriptor, 1):
            ready()
        gone()
        time.sleep(_LAST_RESORT_S)
        os._exit(1)

    threading.Thread(target=follow, name="lifeline", daemon=True).start()


async def _main(spec: AgentSpec, reporter: Reporter, lifeline_fd: int) -> int:
    loop = asyncio.get_running_loop()
    stop, tail = asyncio.Event(), OutputTail()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    _watch_lifeline(
        lifeline_fd,
        ready=lambda: loop.call_soon_threadsafe(tail.forget),
        gone=lambda: loop.call_soon_threadsafe(stop.set),
    )
    try:
        await run(spec, reporter, stop, tail)
    except CloisterError as error:
        get_logger().warning("backend ended", error=error.code.text, what=error.what, why=error.why)
        reporter.send(Failed(error))  # of what came before the worker; a second report of the same changes nothing
        return 1
    finally:
        shutil.rmtree(spec.directory, ignore_errors=True)
    return 0


def main() -> int:
    """Read the arguments and run; the gateway is the only one that starts this."""
    parser = argparse.ArgumentParser(prog="cloister-serving-agent", description="Agent of one model's backend.")
    parser.add_argument("--spec", type=Path, required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--lifeline-fd", type=int, required=True)
    arguments = parser.parse_args()
    try:
        spec = AgentSpec.model_validate_json(arguments.spec.read_bytes())
    except (OSError, ValidationError) as error:
        sys.stderr.write(f"the agent's specification cannot be read: {type(error).__name__}\n")
        return 2
    configure("serving-agent", spec.log_format, sys.stderr)
    harden()
    os.umask(0o077)
    for descriptor in (arguments.report_fd, arguments.lifeline_fd):
        os.set_inheritable(descriptor, False)
    return asyncio.run(_main(spec, Reporter(arguments.report_fd), arguments.lifeline_fd))


if __name__ == "__main__":
    sys.exit(main())
