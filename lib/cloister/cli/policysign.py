# SPDX-License-Identifier: Apache-2.0
"""`cloister policy sign | approve | submit | approvals`: signatures under policies and for releases.

sign and approve are offline: a signing key need never be on a machine that reaches the broker.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.keys import PurposeName
from cloister.cli.options import Json, State, existing_file, in_session, state_directory
from cloister.cli.output import Output
from cloister.cli.policy import PolicyFile, read_policy
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from cloister.cli.session import Session
    from cloister.keyuri import KeyUri

SigningKey = Annotated[
    Path | None,
    typer.Option("--signing-key", metavar="PEM", help="Ed25519 key; default: that of your state directory."),
]
_DURATION: Final = re.compile(r"([1-9][0-9]{0,4})([mhd])", re.ASCII)
_UNITS: Final = {"m": "minutes", "h": "hours", "d": "days"}


def register(app: typer.Typer) -> None:
    """Add the commands to `cloister policy`."""
    app.command()(sign)
    app.command()(approve)
    app.command()(submit)
    app.command()(approvals)


def sign(
    file: PolicyFile,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Envelope to write; default: FILE.signed."),
    ] = None,
    signing_key: SigningKey = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Sign a policy, or add a signature to one that others have signed. Offline.

    Its owner signs, and so do those whom `spec.change` of the policy in force names; the broker gets one envelope.
    """
    from cloister.atomicfile import write_atomically
    from cloister.policyblocks import digest_text
    from cloister.provisioning import is_envelope, owner_envelope
    from cloister.release.cases import check_cases

    data = existing_file(file, what="the policy").read_bytes()
    signed = owner_envelope(data, _signing_key(signing_key, state))
    check_cases(signed.policy, datetime.now(UTC))
    target = output or (file if is_envelope(data) else file.with_name(f"{file.name}.signed"))
    write_atomically(target, signed.envelope)
    Output(as_json=json).item(
        {
            "file": str(target),
            "key": str(signed.policy.key),
            "version": signed.policy.version,
            "digest": digest_text(signed.policy.digest),
            "signers": sorted(signed.signers),
        }
    )


def approve(
    file: PolicyFile,
    output: Annotated[Path, typer.Option("--output", "-o", help="Approval to write.")],
    job: Annotated[str, typer.Option("--job", help="Job id, as `cloister train list` shows it.")] = "",
    model: Annotated[str, typer.Option("--model", help="Or the name of a deployed model.")] = "",
    purpose: Annotated[
        PurposeName | None, typer.Option("--purpose", help="Default: train for a job, serve for a model.")
    ] = None,
    lasting: Annotated[str, typer.Option("--for", metavar="TIME", help="How long it counts: 30m, 8h, 7d.")] = "8h",
    signing_key: SigningKey = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Approve of one job's, or one model's, data keys under a policy, as one of those whom it asks. Offline.

    It counts for this job, purpose and policy only; give the file to anybody who can `cloister policy submit` it.
    """
    from cloister.atomicfile import write_atomically
    from cloister.release.approvals import ReleaseApproval, SignedApproval, check_approval
    from cloister.release.keys import Purpose

    policy, now = read_policy(file), datetime.now(UTC)
    usual = Purpose.SERVE if model else Purpose.TRAIN
    expires = now + _duration(lasting)
    statement = ReleaseApproval(
        key_uri=policy.key,
        purpose=Purpose(purpose) if purpose else usual,
        job=_job(policy.key, job, model),
        policy_digest=policy.digest,
        expires_ms=int(expires.timestamp() * 1000),
    )
    approval = SignedApproval.verified(statement.signed(_signing_key(signing_key, state)))
    check_approval(approval, policy, now)
    write_atomically(output, approval.envelope)
    Output(as_json=json).item(
        {
            "file": str(output),
            "key": str(policy.key),
            "job": statement.job,
            "purpose": statement.purpose.value,
            "policy": f"{policy.name} version {policy.version}",
            "until": expires.isoformat(timespec="seconds"),
            "approver": next(iter(approval.approvers)),
        }
    )


def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `cloister policy approve` wrote.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Hand an approval in; anybody of the tenant may."""
    envelope = existing_file(file, what="the approval").read_bytes()

    async def work(session: Session) -> dict[str, Any]:
        from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc

        stub = keybroker_pb2_grpc.ApprovalServiceStub(session.channel("keybroker"))
        request = keybroker_pb2.SubmitApprovalRequest(envelope=envelope)
        answer = await session.call(stub.SubmitApproval, request, what="handing the approval in")
        return {"approvals": answer.have, "needed": answer.need, "enough": answer.have >= answer.need}

    Output(as_json=json).item(in_session(state, work))


def approvals(
    uri: Annotated[str, typer.Argument(metavar="URI", help="cloister-key://<tenant>/<path>")],
    state: State = None,
    json: Json = False,
) -> None:
    """List the approvals for a key that have not expired."""

    async def work(session: Session) -> list[dict[str, Any]]:
        from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc

        stub = keybroker_pb2_grpc.ApprovalServiceStub(session.channel("keybroker"))
        request = keybroker_pb2.ListApprovalsRequest(key_uri=uri)
        answer = await session.call(stub.ListApprovals, request, what="listing the approvals")
        return [
            {
                "job": approval.job,
                "purpose": keybroker_pb2.Purpose.Name(approval.purpose).removeprefix("PURPOSE_").lower(),
                "approver": approval.approver,
                "until": datetime.fromtimestamp(approval.expires_unix_ms / 1000, UTC).isoformat(timespec="seconds"),
                "policy_digest": f"sha384:{approval.policy_digest.hex()}",
            }
            for approval in answer.approvals
        ]

    columns = ("job", "purpose", "approver", "until")
    Output(as_json=json).rows("approvals", in_session(state, work), columns, empty="no approvals")


def _signing_key(path: Path | None, state: Path | None) -> Ed25519PrivateKey:
    from cloister.cli import signer

    return signer.read_signing_key(path) if path else signer.signing_key(state_directory(state).create())


def _job(key: KeyUri, job: str, model: str) -> str:
    if bool(job) == bool(model):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="an approval is for one job or for one model",
            why="both were named" if job else "neither was named",
            todo="give --job ID or --model NAME",
        )
    return f"{key.tenant}/job/{job}" if job else f"{key.tenant}/model/{model}"


def _duration(text: str) -> timedelta:
    found = _DURATION.fullmatch(text)
    if found is None:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"--for {text}: not a time",
            why="it is a number and m, h or d",
            todo="write for example 30m, 8h or 7d",
        )
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
