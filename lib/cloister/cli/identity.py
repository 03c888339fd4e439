# SPDX-License-Identifier: Apache-2.0
"""`cloister identity`: who the user is to the services."""

from __future__ import annotations

import typer

from cloister.cli.options import Json, State, run_async, state_directory
from cloister.cli.output import Output

app = typer.Typer(help="Your own certificate.", no_args_is_help=True)


@app.command()
def login(state: State = None, json: Json = False) -> None:
    """Fetch a new certificate for your key from attest.

    Every other command does so by itself when half of the present one's life is over.
    """
    from cloister.cli import login as logins
    from cloister.cli.state import read_stack

    directory = state_directory(state)
    stack = read_stack(directory)
    certificate = run_async(
        logins.ensure_certificate(directory, enrolment=stack.endpoint("attest", "enrolment"), force=True)
    )
    Output(as_json=json).item(_document(certificate))


@app.command()
def show(state: State = None, json: Json = False) -> None:
    """Show your present certificate."""
    from cloister.cli import login as logins
    from cloister.errors import CloisterError, Code

    directory = state_directory(state)
    certificate = logins.UserCertificate.read(directory)
    if certificate is None:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"there is no certificate in {directory.user}",
            why="none was fetched yet",
            todo="cloister dev up, or cloister identity login",
        )
    Output(as_json=json).item(_document(certificate))


def _document(certificate: object) -> dict[str, object]:
    from cloister.cli.login import UserCertificate

    assert isinstance(certificate, UserCertificate)
    return {
        "spiffe_id": certificate.spiffe_id,
        "not_after": certificate.not_after.isoformat(timespec="seconds"),
        "serial": f"{certificate.leaf.serial_number:x}",
    }
