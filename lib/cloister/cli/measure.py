# SPDX-License-Identifier: Apache-2.0
"""`cloister measure`: the digests that policies name, computed as a TD computes them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.options import Json, existing_file
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(measure)


def measure(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="A job script or a handler.")] = None,
    json: Json = False,
) -> None:
    """Print the digest of a script as it stands in RTMR3 and in policies.

    Without FILE: of the built-in job script, of the built-in handler, of this installation's environment, and of the
    services' packages.
    """
    output = Output(as_json=json)
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
