# SPDX-License-Identifier: Apache-2.0
"""`cloister identity`: who the user is to the services, and, for operators, who is nobody to them any more."""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.options import Json, State, in_session, run_async, state_directory
from cloister.cli.output import Output

if TYPE_CHECKING:
    from cloister.cli.session import Session

app = typer.Typer(help="Your own certificate, and who gets none.", no_args_is_help=True)


class Kind(enum.StrEnum):
    """What can be revoked."""

    IDENTITY = "identity"
    PLATFORM = "platform"
    MEASUREMENT = "measurement"


_Kind = Annotated[Kind, typer.Argument(help="What VALUE is.")]
_Value = Annotated[str, typer.Argument(help="SPIFFE id; FMSPC, PIID or PPID; digest. From a verdict.")]


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


@app.command()
def revoke(
    kind: _Kind,
    value: _Value,
    reason: Annotated[str, typer.Option(help="For whoever reads the list.")] = "",
    state: State = None,
    json: Json = False,
) -> None:
    """Give an identity, a platform or a measurement no certificate any more. For operators."""
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.DenyRequest(kind=_number(kind), value=value, reason=reason)
    in_session(state, lambda session: _call(session, "Deny", request, "revoking"))
    Output(as_json=json).item({"revoked": value, "kind": str(kind)})


@app.command()
def readmit(kind: _Kind, value: _Value, state: State = None, json: Json = False) -> None:
    """Undo a revocation. For operators."""
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.ReadmitRequest(kind=_number(kind), value=value)
    answer = in_session(state, lambda session: _call(session, "Readmit", request, "readmitting"))
    Output(as_json=json).item({"readmitted": value, "kind": str(kind), "was_revoked": answer.was_denied})


@app.command("list")
def list_revoked(state: State = None, json: Json = False) -> None:
    """List what is revoked. For operators."""
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.ListDenialsRequest()
    answer = in_session(state, lambda session: _call(session, "ListDenials", request, "listing revocations"))
    rows = [
        {
            "kind": attest_pb2.DenialKind.Name(found.kind).removeprefix("DENIAL_KIND_").lower(),
            "value": found.value,
            "reason": found.reason,
            "operator": found.operator,
            "time": datetime.fromtimestamp(found.time_unix_ms / 1000, UTC).isoformat(timespec="seconds"),
        }
        for found in answer.denials
    ]
    columns = ("kind", "value", "reason", "operator", "time")
    Output(as_json=json).rows("revoked", rows, columns, empty="nothing is revoked")


async def _call(session: Session, method: str, request: Any, what: str) -> Any:
    from cloister.api.attest.v1 import attest_pb2_grpc

    stub = attest_pb2_grpc.IdentityServiceStub(session.channel("attest"))
    return await session.call(getattr(stub, method), request, what=what)


def _number(kind: Kind) -> Any:
    from cloister.api.attest.v1 import attest_pb2

    return attest_pb2.DenialKind.Value(f"DENIAL_KIND_{kind.name}")


def _document(certificate: object) -> dict[str, object]:
    from cloister.cli.login import UserCertificate

    assert isinstance(certificate, UserCertificate)
    return {
        "spiffe_id": certificate.spiffe_id,
        "not_after": certificate.not_after.isoformat(timespec="seconds"),
        "serial": f"{certificate.leaf.serial_number:x}",
    }
