# SPDX-License-Identifier: Apache-2.0
"""Bring up a local stack: a simulated platform and four services, each a process of its own, and keep watch.

Order, because each step needs what the one before wrote: platform socket; attest (CA, trust bundle, enrolment
endpoint); keybroker; trainer and gateway together; the user's certificate; stack.json. Whatever ends unexpectedly
ends the stack, and the reason is that process's own last words.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cloister.atomicfile import write_atomically
from cloister.cli import devehsm, login, stackconfig
from cloister.cli.state import SERVICES, Stack, StateDirectory
from cloister.errors import CloisterError, Code
from cloister.runtime.endpoints import read_endpoints
from cloister.runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from cloister.cli.stackconfig import Places, StackOptions

T = TypeVar("T")
Report = Callable[[Mapping[str, Any]], None]

_READY_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.02
_GRACE_S: Final = 5.0
_MAX_SOCKET_PATH: Final = 100  # bytes; sun_path holds 108
_LAST_WORDS: Final = 4  # lines


async def run_stack(state: StateDirectory, options: StackOptions, *, report: Report, stop: asyncio.Event) -> None:
    """Run a stack until `stop` is set; raise CloisterError when it cannot start or a process of it ends."""
    state.create()
    lock = state.lock()
    supervisor = Supervisor()
    state.stack_file.unlink(missing_ok=True)
    builder = _Builder(state, options, supervisor, report)
    try:
        death = asyncio.ensure_future(_first_death(supervisor, state))
        stopped = asyncio.ensure_future(stop.wait())
        start = asyncio.ensure_future(builder.bring_up())
        try:
            await asyncio.wait({death, stopped, start}, return_when=asyncio.FIRST_COMPLETED)
            if start.done() and not death.done() and not stopped.done():
                start.result()
                report({"event": "ready", "seconds": builder.elapsed_s})
                await asyncio.wait({death, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if death.done() and not stopped.done():
                death.result()
        finally:
            for task in (death, stopped, start):
                task.cancel()
            await asyncio.gather(death, stopped, start, return_exceptions=True)
    finally:
        state.stack_file.unlink(missing_ok=True)
        await supervisor.stop_all(_GRACE_S)
        builder.clean_up()
        lock.close()


class _Builder:
    """The steps of one start."""

    def __init__(self, state: StateDirectory, options: StackOptions, supervisor: Supervisor, report: Report) -> None:
        self._state = state
        self._options = options
        self._supervisor = supervisor
        self._report = report
        self._began = time.monotonic()
        self._socket_directory: Path | None = None
        self._endpoints: dict[str, dict[str, str]] = {}
        self._process_ids: dict[str, int] = {}
        self._timings: dict[str, float] = {}

    @property
    def elapsed_s(self) -> float:
        return round(time.monotonic() - self._began, 3)

    async def bring_up(self) -> None:
        """Start everything, in order, and write stack.json."""
        from cloister.guest.measure import digest_of_package

        state, options = self._state, self._options
        places = stackconfig.Places(state, self._platform_socket())
        key = login.make_user_key(state)
        root_key = await self._root_key()
        await self._platform(places.platform_socket)
        digests = {name: f"sha384:{digest_of_package(package).hex()}" for name, package in stackconfig.PACKAGES.items()}
        state.bundle.unlink(missing_ok=True)
        await self._service(
            "attest",
            stackconfig.attest_config(places, options, digests=digests, user_spki_sha256=login.spki_sha256(key)),
        )
        enrolment = self._endpoints["attest"]["enrolment"]
        await self._service(
            "keybroker",
            stackconfig.keybroker_config(
                places, options, attest_enrolment=enrolment, root_key=root_key, backends=await self._backends()
            ),
        )
        await self._trainer_and_gateway(places)
        certificate = await login.ensure_certificate(state, enrolment=enrolment, force=True)
        stack = Stack(
            supervisor_pid=os.getpid(),
            started_unix_s=round(time.time() - self.elapsed_s, 3),
            trust_domain=options.trust_domain,
            tenant=options.tenant,
            user=certificate.spiffe_id,
            endpoints=self._endpoints,
            process_ids=self._process_ids,
            root_certificate=str(state.platform / "root.pem"),
            collateral=str(state.platform / "collateral"),
            simulated=True,
            timings_s=self._timings,
        )
        write_atomically(state.stack_file, stack.to_json(), mode=0o600)

    async def _trainer_and_gateway(self, places: Places) -> None:
        options, attest, keybroker = self._options, self._endpoints["attest"], self._endpoints["keybroker"]["grpc"]
        trainer = stackconfig.trainer_config(places, options, attest=attest, keybroker=keybroker)
        gateway = stackconfig.gateway_config(places, options, attest=attest, keybroker=keybroker)
        await _both(self._service("trainer", trainer), self._service("gateway", gateway))

    async def _backends(self) -> list[str]:
        """Return the keybroker's back ends, started: EHSM when it is wanted, or has keys of an earlier stack."""
        wanted = self._options.kms is stackconfig.Kms.EHSM
        if not wanted and not (self._state.service_directory("keybroker") / "canary-ehsm").exists():
            return ["embedded:"]
        endpoints = self._state.endpoints_file("ehsm")
        endpoints.unlink(missing_ok=True)
        await self._start("ehsm", devehsm.arguments(self._state, "127.0.0.1:0", endpoints=endpoints))

        async def is_ready() -> bool:
            return endpoints.exists()

        await _until(is_ready, what="the EHSM development server")
        self._endpoints["ehsm"] = read_endpoints(endpoints)
        self._ready("ehsm")
        uri = devehsm.backend_uri(self._state, self._endpoints["ehsm"]["https"])
        return [uri, "embedded:"] if wanted else ["embedded:", uri]

    def _platform_socket(self) -> Path:
        """Return where the platform listens: below the state directory unless that path is too long for a socket."""
        path = self._state.run / "platform.sock"
        if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
            self._socket_directory = Path(tempfile.mkdtemp(prefix="cloister-"))
            path = self._socket_directory / "platform.sock"
        path.unlink(missing_ok=True)
        return path

    def clean_up(self) -> None:
        """Remove what only a running stack needs."""
        if self._socket_directory is not None:
            shutil.rmtree(self._socket_directory, ignore_errors=True)
        (self._state.run / "platform.sock").unlink(missing_ok=True)
        for service in (*SERVICES, "ehsm"):
            self._state.endpoints_file(service).unlink(missing_ok=True)

    async def _root_key(self) -> Path:
        """Have the keybroker make its root key and its store, once."""
        path = self._state.service_directory("keybroker") / "root.key"
        if path.exists():
            return path
        path.parent.mkdir(mode=0o700, exist_ok=True)
        process = await asyncio.create_subprocess_exec(
            *_python("cloister_keybroker", "init", "--root-key-file", str(path), "--state-dir", str(path.parent)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        _, errors = await process.communicate()
        if process.returncode:
            raise _died("keybroker init", process.returncode, errors.decode(errors="replace").splitlines(), None)
        return path

    async def _platform(self, socket: Path) -> None:
        """Start the simulated platform and wait until it answers on its socket."""
        arguments = ("--directory", str(self._state.platform), "--socket", str(socket))
        await self._start("platform", _python("cloister_sim", *arguments))

        async def answers() -> bool:
            if not socket.exists():
                return False
            try:
                _, writer = await asyncio.open_unix_connection(str(socket))
            except OSError:
                return False
            writer.close()
            return True

        await _until(answers, what="the simulated platform")
        self._ready("platform")

    async def _service(self, name: str, config: str) -> None:
        """Write a service's configuration, start it, and wait for the endpoints it writes when it is ready."""
        state = self._state
        state.service_directory(name).mkdir(mode=0o700, exist_ok=True)
        path, endpoints = state.config_file(name), state.endpoints_file(name)
        endpoints.unlink(missing_ok=True)
        write_atomically(path, config.encode(), mode=0o600)
        await self._start(name, _python(stackconfig.PACKAGES[name], "--config", str(path)))

        async def is_ready() -> bool:
            return endpoints.exists()

        await _until(is_ready, what=name)
        self._endpoints[name] = read_endpoints(endpoints)
        self._ready(name)

    async def _start(self, name: str, argv: list[str]) -> None:
        log = self._state.log_file(name)
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        child = await self._supervisor.start(name, argv, env=_environment(), log_path=log)
        self._process_ids[name] = child.pid

    def _ready(self, name: str) -> None:
        self._timings[name] = self.elapsed_s
        self._report({"event": "service", "name": name, "seconds": self.elapsed_s})


async def _first_death(supervisor: Supervisor, state: StateDirectory) -> None:
    """Wait for the first unexpected end of a process; raise it as CloisterError(PROCESS_DIED)."""
    child = await supervisor.wait_any()
    log = state.log_file(child.name)
    raise _died(child.name, child.returncode, last_words(log), log)


def _died(name: str, exit_code: int | None, words: list[str], log: Path | None) -> CloisterError:
    how = f"with exit code {exit_code}" if (exit_code or 0) >= 0 else f"by signal {-(exit_code or 0)}"
    return CloisterError(
        Code.PROCESS_DIED,
        what=f"{name} ended unexpectedly {how}; the stack was stopped",
        why=" | ".join(words) or "it said nothing",
        todo=f"its whole log: {log}" if log else "",
    )


def last_words(log: Path) -> list[str]:
    """Return the last lines of a log that say something: what was printed behind the last record, or else records."""
    try:
        with log.open("rb") as handle:
            handle.seek(max(0, log.stat().st_size - 16384))
            lines = handle.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    spoken = [line for line in lines if line.strip()]
    printed = list(itertools.takewhile(lambda line: not line.startswith("{"), reversed(spoken)))
    chosen = list(reversed(printed)) if printed else spoken
    return [readable(line) for line in chosen[-_LAST_WORDS:]]


def readable(line: str) -> str:
    """Return a log line for a person: a JSON record becomes `event  field=value ...`."""
    try:
        record = json.loads(line)
    except ValueError:
        return line.strip()
    if not isinstance(record, dict):
        return line.strip()
    left_out = {"event", "timestamp", "time", "level", "service", "logger"}
    fields = " ".join(f"{key}={value}" for key, value in record.items() if key not in left_out)
    return f"{record.get('event', '')}  {fields}".strip()


async def _until(condition: Callable[[], Awaitable[bool]], *, what: str) -> None:
    """Wait for a condition; raise CloisterError(DEADLINE_EXCEEDED) after a minute."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while not await condition():
        if time.monotonic() > deadline:
            raise CloisterError(
                Code.DEADLINE_EXCEEDED,
                what=f"{what} was not ready after {_READY_TIMEOUT_S:.0f} s",
                why="it runs, but has not written its endpoints",
                todo="cloister dev logs shows what it is doing",
            )
        await asyncio.sleep(_POLL_S)


async def _both(first: Coroutine[Any, Any, None], second: Coroutine[Any, Any, None]) -> None:
    async with contextlib.AsyncExitStack() as cleanup:
        tasks = [asyncio.ensure_future(first), asyncio.ensure_future(second)]
        for task in tasks:
            cleanup.callback(task.cancel)
        await asyncio.gather(*tasks)


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", module, *arguments]


def _environment() -> dict[str, str]:
    """Return what the services inherit: nothing that could carry a secret or change how Python finds modules."""
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "XDG_RUNTIME_DIR", "USER")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PYTHONUNBUFFERED": "1"}
