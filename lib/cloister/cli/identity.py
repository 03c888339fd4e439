# SPDX-License-Identifier: Apache-2.0
"""`cloister identity`: who the user is to the services; for administrators and operators, who else is, or is not."""

from __future__ import annotations

import enum
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.options import Json, State, existing_file, in_session, run_async, state_directory
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.api.attest.v1 import attest_pb2
    from cloister.cli.session import Session

app = typer.Typer(help="Your own certificate, and who else gets one.", no_args_is_help=True)


class Standing(enum.StrEnum):
    """What a user may do at attest."""

    USER = "user"
    ADMINISTRATOR = "administrator"
    OPERATOR = "operator"


class Kind(enum.StrEnum):
    """What can be revoked."""

    IDENTITY = "identity"
    PLATFORM = "platform"
    MEASUREMENT = "measurement"


_IDENTITY = ("spiffe_id", "standing", "revoked", "added_by", "added")
_DENIAL = ("kind", "value", "reason", "operator", "time")
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
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Private key to make; the request is FILE.csr.")],
    json: Json = False,
) -> None:
    """Make a key for a user. Keep FILE; give FILE.csr to an administrator of your tenant."""
    from cloister.cli.login import write_user_key

    private, request = write_user_key(file.resolve())
    Output(as_json=json).item({"private": str(private), "request": str(request)})


@app.command()
def issue(
    name: Annotated[str, typer.Argument(metavar="NAME", help="User of your tenant, or the whole SPIFFE id.")],
    key_file: Annotated[Path, typer.Option("--key", help="The user's FILE.csr, or public key (PEM).")],
    standing: Annotated[Standing, typer.Option(help="What the user may do at attest.")] = Standing.USER,
    replace: Annotated[
        bool, typer.Option("--replace", help="In place of the user's present key; that one ends.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the certificate chain (PEM).")] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Register a user's key in your tenant. For administrators and operators.

    With a request (FILE.csr) it gets a certificate now; with any registered key, its holder fetches one at any time.
    """
    from cloister.api.attest.v1 import attest_pb2
    from cloister.atomicfile import write_atomically
    from cloister.cli.login import read_key_or_request
    from cloister.identity import SpiffeId

    spki, csr = read_key_or_request(existing_file(key_file, what="the key"))
    if out is not None and not csr:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="--out goes with a request only",
            why="a public key does not prove that somebody holds it",
            todo="give FILE.csr, or have the user fetch the certificate: cloister identity login",
        )

    async def work(session: Session) -> tuple[str, attest_pb2.IssueIdentityResponse]:
        mine = SpiffeId.parse(session.stack.user)
        who = name if "://" in name else str(SpiffeId.of_user(mine.trust_domain, tenant=mine.tenant, user=name))
        request = attest_pb2.IssueIdentityRequest(
            spiffe_id=who,
            standing=attest_pb2.Standing.Value(f"STANDING_{standing.name}"),
            spki_der=spki,
            csr_der=csr,
            replace=replace,
        )
        return who, await _call(session, "IssueIdentity", request, "registering a user")

    who, answer = in_session(state, work)
    document = {"spiffe_id": who, "standing": str(standing), "spki_sha256": answer.spki_sha256.hex()}
    if answer.certificate_chain_pem:
        document["not_after"] = _time(answer.certificate_not_after_unix_s)
    if out is not None:
        write_atomically(out.resolve(), answer.certificate_chain_pem, mode=0o644)
        document["certificate"] = str(out.resolve())
    Output(as_json=json).item(document)


@app.command("list")
def list_identities(
    revoked: Annotated[bool, typer.Option("--revoked", help="What is revoked instead. For operators.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """List the registered users: of your tenant for administrators, of all tenants for operators."""
    from cloister.api.attest.v1 import attest_pb2

    output = Output(as_json=json)
    if revoked:
        denials = attest_pb2.ListDenialsRequest()
        found = in_session(state, lambda session: _call(session, "ListDenials", denials, "listing revocations"))
        output.rows("revoked", [_denial(one) for one in found.denials], _DENIAL, empty="nothing is revoked")
        return
    request = attest_pb2.ListIdentitiesRequest()
    answer = in_session(state, lambda session: _call(session, "ListIdentities", request, "listing users"))
    rows = [
        {
            "spiffe_id": one.spiffe_id,
            "standing": attest_pb2.Standing.Name(one.standing).removeprefix("STANDING_").lower(),
            "revoked": one.denied,
            "added_by": one.added_by or "configuration",
            "added": _time(one.added_unix_ms // 1000) if one.added_unix_ms else "",
            "spki_sha256": one.spki_sha256.hex(),
        }
        for one in answer.identities
    ]
    output.rows("identities", rows, _IDENTITY, empty="nobody is registered")


@app.command()
def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="User of your tenant, or the whole SPIFFE id.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Strike a registered user; its certificates end. For administrators and operators."""
    from cloister.api.attest.v1 import attest_pb2
    from cloister.identity import SpiffeId

    async def work(session: Session) -> tuple[str, attest_pb2.RemoveIdentityResponse]:
        mine = SpiffeId.parse(session.stack.user)
        who = name if "://" in name else str(SpiffeId.of_user(mine.trust_domain, tenant=mine.tenant, user=name))
        request = attest_pb2.RemoveIdentityRequest(spiffe_id=who)
        return who, await _call(session, "RemoveIdentity", request, "removing a user")

    who, answer = in_session(state, work)
    Output(as_json=json).item({"removed": who, "certificates": answer.certificates})


@app.command()
def revoke(
    kind: _Kind,
    value: _Value,
    reason: Annotated[str, typer.Option(help="For whoever reads the list.")] = "",
    state: State = None,
    json: Json = False,
) -> None:
    """Give an identity, a platform or a measurement no certificate any more, and end those that are out.

    For operators; administrators may revoke users of their tenant.
    """
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.DenyRequest(kind=_number(kind), value=value, reason=reason)
    answer = in_session(state, lambda session: _call(session, "Deny", request, "revoking"))
    output = Output(as_json=json)
    output.item({"revoked": value, "kind": str(kind), "certificates": answer.certificates})
    if not answer.complete:
        output.note("there are more certificates than can be ended one by one: cloister attest retire-epoch ends all")


@app.command()
def readmit(kind: _Kind, value: _Value, state: State = None, json: Json = False) -> None:
    """Undo a revocation. For operators; administrators may readmit users of their tenant."""
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.ReadmitRequest(kind=_number(kind), value=value)
    answer = in_session(state, lambda session: _call(session, "Readmit", request, "readmitting"))
    Output(as_json=json).item({"readmitted": value, "kind": str(kind), "was_revoked": answer.was_denied})


def _denial(found: attest_pb2.Denial) -> dict[str, Any]:
    from cloister.api.attest.v1 import attest_pb2

    return {
        "kind": attest_pb2.DenialKind.Name(found.kind).removeprefix("DENIAL_KIND_").lower(),
        "value": found.value,
        "reason": found.reason,
        "operator": found.operator,
        "time": _time(found.time_unix_ms // 1000),
    }


def _time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds")


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
