# SPDX-License-Identifier: Apache-2.0
"""`cloister dev`: a stack on this machine, on a simulated platform."""

from __future__ import annotations

import asyncio
import enum
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli import devehsm
from cloister.cli.options import Json, State, run_async, state_directory
from cloister.cli.output import Output
from cloister.cli.stackconfig import Kms, StackOptions
from cloister.errors import EXIT_CODE, CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.launch import Event
    from cloister.cli.state import Stack, StateDirectory

app = typer.Typer(help="A local stack: attest, keybroker, trainer and gateway.", no_args_is_help=True)

devehsm.register(app)

_FOLLOW_INTERVAL_S: Final = 0.2


class LogName(enum.StrEnum):
    """Whose log to show."""

    ATTEST = "attest"
    KEYBROKER = "keybroker"
    TRAINER = "trainer"
    GATEWAY = "gateway"
    PLATFORM = "platform"
    EHSM = "ehsm"
    STACK = "stack"


@app.command()
def up(
    detach: Annotated[
        bool, typer.Option("--detach/--foreground", help="Return when it is up, or stay until Ctrl-C.")
    ] = False,
    rank_core: Annotated[list[int] | None, typer.Option(help="Cores for training ranks; default: all.")] = None,
    gateway_core: Annotated[int | None, typer.Option(help="Core of the gateway; default: the first.")] = None,
    backend_core: Annotated[int | None, typer.Option(help="Core of model backends; default: the second.")] = None,
    gateway_port: Annotated[int, typer.Option(min=0, max=65535, help="gRPC port of the gateway; 0: any free.")] = 0,
    https_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTPS port of the gateway; 0: any free.")] = 0,
    tenant: Annotated[str, typer.Option(help="Your tenant: the owner in key URIs.")] = "demo",
    kms: Annotated[Kms, typer.Option(help="Where the key broker keeps new keys.")] = Kms.EMBEDDED,
    state: State = None,
    json: Json = False,
) -> None:
    """Start a stack. Keys, root and platform are made once, readable by you only; nothing listens beyond loopback."""
    from cloister.cli.launch import StackProcess
    from cloister.cli.state import read_stack

    directory = state_directory(state)
    options = make_options(rank_core or [], gateway_core, backend_core, gateway_port, https_port, tenant, kms)
    output = Output(as_json=json)
    printer = StartPrinter(output)

    async def work() -> None:
        process = await StackProcess.start(directory, options)
        keep = False
        try:
            await process.ready(printer.show)
            output.item(stack_document(directory, read_stack(directory)))
            if detach:
                process.release()
                keep = True
            else:
                output.note("Ctrl-C stops the stack.")
                error = await process.failed()
                if error is not None:
                    raise error
        finally:
            if not keep:
                await process.stop()
                output.note("The stack is stopped; nothing of it runs.")

    run_async(work())


@app.command()
def down(state: State = None, json: Json = False) -> None:
    """Stop the stack; nothing of it stays running. Keys and data stay where they are."""
    from cloister.cli.launch import stop_running

    directory = state_directory(state)
    began = time.monotonic()
    pid = stop_running(directory)
    Output(as_json=json).item({"stopped": pid, "seconds": round(time.monotonic() - began, 2)})


@app.command()
def status(state: State = None, json: Json = False) -> None:
    """Show what runs, where it listens, and whether each service completes a mutual-TLS handshake."""
    from cloister.cli.state import SERVICES, read_stack

    directory = state_directory(state)
    stack = read_stack(directory)
    problems = run_async(handshakes(directory, stack))
    services = [
        {
            "service": name,
            "ok": not problems[name],
            "pid": stack.process_ids.get(name, 0),
            "ready_after_s": stack.timings_s.get(name, 0.0),
            "endpoints": dict(stack.endpoints.get(name, {})),
            "problem": problems[name],
        }
        for name in SERVICES
    ]
    output = Output(as_json=json)
    if json:
        output.item(stack_document(directory, stack) | {"services": services})
    else:
        output.rows("services", services, ("service", "ok", "pid", "ready_after_s", "endpoints", "problem"), empty="")
    if any(problems.values()) and json:
        raise typer.Exit(EXIT_CODE[Code.UNREACHABLE.kind])  # the services are the one document on stdout
    if any(problems.values()):
        raise CloisterError(
            Code.UNREACHABLE,
            what=f"not every service answers: {', '.join(name for name in SERVICES if problems[name])}",
            why=next(text for text in problems.values() if text),
            todo="cloister dev logs SERVICE, or restart the stack",
        )


@app.command()
def logs(
    service: Annotated[LogName | None, typer.Argument(help="Default: all of them.")] = None,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="Last lines of each.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and print what comes.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Print logs of the services; they stay after the stack has ended."""
    directory = state_directory(state)
    names = [service.value] if service else [name.value for name in LogName]
    paths = {name: directory.log_file(name) for name in names}
    if not any(path.exists() for path in paths.values()):
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"there are no logs in {directory.logs}",
            why="no stack was started with this state directory",
            todo="cloister dev up, or name another directory with --state",
        )
    output = Output(as_json=json)
    offsets = {name: _print_tail(output, name, path, lines) for name, path in paths.items()}
    while follow:
        offsets = {name: _print_from(output, name, path, offsets[name]) for name, path in paths.items()}
        time.sleep(_FOLLOW_INTERVAL_S)


def make_options(
    rank_cores: Sequence[int] = (),
    gateway_core: int | None = None,
    backend_core: int | None = None,
    gateway_port: int = 0,
    https_port: int = 0,
    tenant: str = "demo",
    kms: Kms = Kms.EMBEDDED,
) -> StackOptions:
    """Return checked options; raise CloisterError when the cores do not do or the tenant is no name."""
    import os

    from cloister.identity import is_name

    available = sorted(os.sched_getaffinity(0))
    gateway = available[0] if gateway_core is None else gateway_core
    others = [core for core in available if core != gateway]
    backend = (others or [gateway])[0] if backend_core is None else backend_core
    missing = sorted({*rank_cores, gateway, backend} - set(available))
    if missing:
        raise CloisterError(
            Code.CORES_INSUFFICIENT,
            what=f"there is no core {', '.join(map(str, missing))} for this process",
            why=f"it may use {', '.join(map(str, available))}",
            todo="choose among these with --rank-core, --gateway-core and --backend-core",
        )
    if gateway == backend:
        raise CloisterError(
            Code.CORES_INSUFFICIENT,
            what=f"gateway and backends cannot share core {gateway}",
            why=f"each is pinned to cores of its own; this process may use {', '.join(map(str, available))}",
            todo="allow this process two cores, or choose two with --gateway-core and --backend-core",
        )
    if not is_name(tenant):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{tenant!r} cannot be a tenant's name",
            why="a name is 1 to 63 characters of a-z, 0-9 and -",
            todo="choose another one with --tenant",
        )
    return StackOptions(
        tenant=tenant,
        rank_cores=tuple(rank_cores) or tuple(available),
        gateway_core=gateway,
        backend_core=backend,
        gateway_port=gateway_port,
        https_port=https_port,
        kms=kms,
    )


class StartPrinter:
    """Print one line a service as it becomes ready."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._previous_s = 0.0

    def show(self, event: Event) -> None:
        if event["event"] == "service":
            took = event["seconds"] - self._previous_s
            self._previous_s = event["seconds"]
            self._output.note(f"   {event['name']:<10} ready  {took:5.1f} s")
        elif event["event"] == "ready":
            self._output.note(f"   stack up   after  {event['seconds']:5.1f} s")


def stack_document(directory: StateDirectory, stack: Stack) -> dict[str, Any]:
    """Return a running stack as JSON output shows it."""
    return {
        "state": str(directory.root),
        "supervisor_pid": stack.supervisor_pid,
        "user": stack.user,
        "trust_domain": stack.trust_domain,
        "simulated": stack.simulated,
        "endpoints": {name: dict(endpoints) for name, endpoints in stack.endpoints.items()},
        "trust_bundle": str(directory.bundle),
    }


async def handshakes(directory: StateDirectory, stack: Stack) -> dict[str, str]:
    from cloister.cli import login
    from cloister.cli.state import SERVICES
    from cloister.identity import Role
    from cloister.runtime.credentials import FileCredentials
    from cloister.runtime.diagnose import explain_tls

    await login.ensure_certificate(directory, enrolment=stack.endpoint("attest", "enrolment"))
    credentials = FileCredentials(directory.user_key, directory.user_chain, directory.bundle)
    problems = await asyncio.gather(
        *(asyncio.to_thread(explain_tls, stack.endpoint(name), credentials, Role(name)) for name in SERVICES)
    )
    return dict(zip(SERVICES, problems, strict=True))


def _print_tail(output: Output, name: str, path: Path, count: int) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as handle:
        for line in deque(handle, maxlen=count):
            _print_line(output, name, line)
        return handle.tell()


def _print_from(output: Output, name: str, path: Path, offset: int) -> int:
    if not path.exists() or path.stat().st_size == offset:
        return offset
    with path.open("rb") as handle:
        handle.seek(offset if path.stat().st_size > offset else 0)  # a shorter file is a new one
        for line in handle:
            if not line.endswith(b"\n"):
                return handle.tell() - len(line)
            _print_line(output, name, line)
        return handle.tell()


def _print_line(output: Output, name: str, line: bytes) -> None:
    from cloister.cli.stack import readable

    text = line.decode(errors="replace").rstrip("\n")
    if output.as_json:
        output.stream({"service": name, "line": text}, "")
    else:
        output.stream({}, f"{name:<9} {readable(text)}")
    sys.stdout.flush()
