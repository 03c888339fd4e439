# SPDX-License-Identifier: Apache-2.0
"""`cloister doctor`: what is missing or broken on this machine, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

import typer

from cloister.cli.options import Json, State, run_async, state_directory
from cloister.cli.output import Output
from cloister.errors import EXIT_CODE, CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.state import StateDirectory

_PACKAGES: Final = {
    "grpcio": "",
    "cryptography": "",
    "apsw": "",
    "torch": "train",
    "transformers": "train",
    "safetensors": "train",
    "torchserve": "serve",
    "torch-model-archiver": "serve",
    "aiohttp": "serve",
}
_MIN_FREE_BYTES: Final = 2 << 30  # a demo writes some 100 MB; less than 2 GB free ends in surprises elsewhere
_MIN_MEMORY_BYTES: Final = 3 << 30  # two ranks and a backend take 0.7 GB each


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    todo: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(doctor)


def doctor(state: State = None, json: Json = False) -> None:
    """Look for what is missing on this machine, and, when a stack runs, at each of its TLS handshakes."""
    directory = state_directory(state)
    findings = [*machine_findings(directory), *packages(), *stack_findings(directory)]
    columns = ("name", "ok", "found", "todo")
    Output(as_json=json).rows("findings", [asdict(finding) for finding in findings], columns, empty="")
    bad = [finding for finding in findings if not finding.ok]
    if bad and json:
        raise typer.Exit(EXIT_CODE[Code.PREREQUISITE_MISSING.kind])  # the findings are the one document on stdout
    if bad:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what=f"{len(bad)} of {len(findings)} checks failed: {', '.join(finding.name for finding in bad)}",
            why=f"{bad[0].name}: {bad[0].found}",
            todo=bad[0].todo,
        )


def machine_findings(directory: StateDirectory) -> Iterator[Finding]:
    """Look at interpreter, cores, memory, disk and the state directory."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")
    cores = sorted(os.sched_getaffinity(0))
    yield Finding(
        "cores", len(cores) >= 2, ", ".join(map(str, cores)), "two cores are needed to pin gateway and backend apart"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("memory", memory >= _MIN_MEMORY_BYTES, f"{memory / 2**30:.1f} GiB", "3 GiB are needed for two ranks")
    place = directory.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    yield Finding("disk", free >= _MIN_FREE_BYTES, f"{free / 2**30:.1f} GiB free at {place}", "free 2 GiB")
    if not directory.root.exists():
        yield Finding("state directory", True, f"{directory.root} is not made yet")
        return
    try:
        directory.refuse_strangers()
        yield Finding("state directory", True, str(directory.root))
    except CloisterError as error:
        yield Finding("state directory", False, error.why, error.todo)


def packages() -> Iterator[Finding]:
    """Look for the Python packages of every part."""
    for name, extra in _PACKAGES.items():
        install = f"pip install 'cloister[{extra}]'" if extra else "pip install cloister"
        try:
            yield Finding(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, False, "not installed", install)


def stack_findings(directory: StateDirectory) -> Iterator[Finding]:
    """Look at the running stack, when there is one: certificate, and a handshake with each service."""
    from cloister.cli.dev import handshakes
    from cloister.cli.login import UserCertificate
    from cloister.cli.state import read_stack

    try:
        stack = read_stack(directory)
    except CloisterError as error:
        if error.code is Code.STACK_NOT_RUNNING:
            yield Finding("stack", True, f"none runs in {directory.root}")
        else:
            yield Finding("stack", False, error.why, error.todo)
        return
    yield Finding("stack", True, f"process {stack.supervisor_pid}")
    try:
        problems = run_async(handshakes(directory, stack))
    except CloisterError as error:
        yield Finding("your certificate", False, f"{error.what}: {error.why}", error.todo)
        return
    certificate = UserCertificate.read(directory)
    if certificate is not None:
        until = certificate.not_after.isoformat(timespec="seconds")
        yield Finding("your certificate", True, f"{certificate.spiffe_id} until {until}")
    for service, problem in problems.items():
        yield Finding(service, not problem, problem or "mutual TLS works", f"cloister dev logs {service}")
