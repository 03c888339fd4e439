# SPDX-License-Identifier: Apache-2.0
"""`cloister measure`: the digests and registers that policies name, computed as a TD computes them."""

from __future__ import annotations

import enum
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.options import JOB_ARGUMENTS, Json, WithJobArguments, existing_file, parse_assignment
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from rich.console import Console

    from cloister.cli.expected import Parts


class WorkloadRole(enum.StrEnum):
    """Roles of TDs."""

    ATTEST = "attest"
    KEYBROKER = "keybroker"
    TRAINER = "trainer"
    GATEWAY = "gateway"
    RANK = "rank"
    BACKEND = "backend"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=WithJobArguments)(measure)


def measure(
    context: typer.Context,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A job script or a handler.")] = None,
    role: Annotated[
        WorkloadRole | None, typer.Option("--role", help="Print the registers of a whole workload of this role.")
    ] = None,
    trust_bundle: Annotated[Path | None, typer.Option("--trust-bundle", help="The bundle it will trust.")] = None,
    environment: Annotated[
        str, typer.Option("--environment", metavar="sha384:...", help="What it runs on; default: this installation.")
    ] = "",
    config: Annotated[Path | None, typer.Option("--config", help="A service's configuration file.")] = None,
    archive: Annotated[Path | None, typer.Option("--archive", help="A backend's model archive.")] = None,
    tenant: Annotated[str, typer.Option("--tenant", help="Of a rank or a backend.")] = "",
    job: Annotated[str, typer.Option("--job", help="Of a rank: the job's id.")] = "",
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="Of a rank: which one.")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Of a rank: how many there are.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of a rank, as submitted.")] = 1,
    input: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME=DIR", help="Of a rank, as submitted, in that order.")
    ] = None,
    output_key: Annotated[str, typer.Option("--output-key", metavar="URI", help="Of a rank, as submitted.")] = "",
    model: Annotated[str, typer.Option("--model", help="Of a backend: the model's name.")] = "",
    backend: Annotated[str, typer.Option("--backend", help="Of a backend: its id.")] = "",
    boot_log: Annotated[
        Path | None, typer.Option("--boot-log", help="Print RTMR0 to RTMR2 as well: a CCEL log or a JSON event log.")
    ] = None,
    json: Json = False,
) -> None:
    """Print digests and registers as they stand in evidence and in policies, before anything runs.

    With FILE alone: its digest. With nothing: those of the built-in job script and handler, of this installation's
    environment, and of the services' packages. With --role: RTMR3 of a whole workload once it is sealed, and all that
    goes into it; arguments of a job's script stand behind `--`.
    """
    output = Output(as_json=json)
    if role is not None:
        from cloister.cli.expected import Parts
        from cloister.identity import Role

        named = dict(parse_assignment(text, option="--input") for text in input or [])
        parts = Parts(
            role=Role(role.value),
            file=file,
            trust_bundle=trust_bundle,
            environment=environment,
            config=config,
            archive=archive,
            tenant=tenant,
            job=job,
            rank=rank,
            nodes=nodes,
            seed=seed,
            inputs={name: Path(path) for name, path in named.items()},
            output_key=output_key,
            model=model,
            backend=backend,
            args=tuple(context.meta[JOB_ARGUMENTS]),
        )
        output.result(*_workload(parts, boot_log))
        return
    if boot_log is not None:
        output.item(_boot_registers(boot_log))
        return
    if file is not None:
        path = existing_file(file, what="the script")
        output.result({"digest": digest_of_file(path)}, lambda console: console.print(digest_of_file(path)))
        return
    from cloister.cli.stackconfig import PACKAGES
    from cloister.guest.measure import digest_of_package

    output.item(
        {"job-script": digest_of_file(job_script_path()), "handler": digest_of_file(handler_path())}
        | {"environment": environment_digest()}
        | {service: f"sha384:{digest_of_package(package).hex()}" for service, package in PACKAGES.items()}
    )


def _workload(parts: Parts, boot_log: Path | None) -> tuple[dict[str, Any], Callable[[Console], None]]:
    """Return the registers of a workload and the events of RTMR3, for machines and for people."""
    from cloister.cli.expected import plan_workload

    plan = plan_workload(parts)
    registers = (_boot_registers(boot_log) if boot_log else {}) | {"rtmr3": plan.rtmr3.hex()}
    events = [
        {"event": event.name, "payload": event.payload.hex(), "digest": event.digest.hex()} for event in plan.events
    ]
    digests = {name: f"sha384:{getattr(plan, name).hex()}" for name in ("environment", "script", "config")}
    digests |= {"trust-bundle": f"sha384:{plan.trust_bundle.hex()}"}
    digests |= {f"dataset {claim.name}": f"sha384:{claim.manifest_digest.hex()}" for claim in plan.datasets}

    def render(console: Console) -> None:
        lines = registers | digests
        width = max(map(len, lines))
        for name, value in lines.items():
            console.print(f"{name:<{width}}  {value}", markup=False, soft_wrap=True)

    return {"role": str(plan.role), **registers, "digests": digests, "events": events}, render


def _boot_registers(path: Path) -> dict[str, str]:
    from cloister.cli.expected import read_boot_log

    return {f"rtmr{number}": value.hex() for number, value in enumerate(read_boot_log(path).replay()[:3])}


def digest_of_file(path: Path) -> str:
    """Return "sha384:<hex>" over a file's bytes."""
    return f"sha384:{hashlib.sha384(path.read_bytes()).hexdigest()}"


def environment_digest() -> str:
    """Return "sha384:<hex>" of this installation: what ranks and backends of the same release run on."""
    from cloister.guest.measure import digest_of_environment

    return f"sha384:{digest_of_environment().hex()}"


def job_script_path() -> Path:
    """Return where the built-in job script lies."""
    return _file_of("cloister.train", "scripts/text_classifier.py", extra="train")


def handler_path() -> Path:
    """Return where the built-in serving handler lies."""
    return _file_of("cloister_serving", "handlers/text_classifier.py", extra="serve")


def _file_of(package: str, relative: str, *, extra: str) -> Path:
    """Find a file of a package without importing the package."""
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / relative
        if path.is_file():
            return path
    raise CloisterError(
        Code.PREREQUISITE_MISSING,
        what=f"{package}/{relative} is not installed",
        why="this installation of cloister lacks it",
        todo=f"pip install 'cloister[{extra}]'",
    )
