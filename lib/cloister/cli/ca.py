# SPDX-License-Identifier: Apache-2.0
"""`cloister attest epochs|new-epoch|retire-epoch|recover|workloads|close`: the workload CA, for its operators.

And for those who hold shares of its recovery key: `recover` verifies an attest on this machine, then gives it a share.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.collateralsource import Directory, Root
from cloister.cli.options import Json, State, existing_file, in_session, run_async, state_directory
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.api.attest.v1 import attest_pb2
    from cloister.cli.session import Session
    from cloister.guest.evidence import EvidenceVerifier
    from cloister.guest.recoverca import Given

_COLUMNS = ("epoch", "state", "started", "issues", "ends")


def register(app: typer.Typer) -> None:
    """Add the commands to `cloister attest`."""
    app.command("epochs")(epochs)
    app.command("new-epoch")(new_epoch)
    app.command("retire-epoch")(retire_epoch)
    app.command("recover")(recover)
    app.command("workloads")(workloads)
    app.command("close")(close)


def epochs(state: State = None, json: Json = False) -> None:
    """List the epochs of the workload CA, newest first. For operators."""
    from cloister.api.attest.v1 import attest_pb2

    found = in_session(state, lambda session: _call(session, "ListEpochs", attest_pb2.ListEpochsRequest()))
    output = Output(as_json=json)
    rows = [_epoch(one) for one in found.epochs]
    facts = {
        "kept": found.kept,
        "generation": found.generation,
        "sequence": found.sequence,
        "trust_bundle": found.trust_bundle_digest.hex(),
    }
    if json:
        output.item(facts | {"epochs": rows})
        return
    output.rows("epochs", rows, _COLUMNS, empty="no epochs")
    output.item(facts)


def new_epoch(state: State = None, json: Json = False) -> None:
    """Begin a new epoch beside the present one: announced now, issuing in a few minutes. For operators.

    Nothing that runs is interrupted. The old epoch ends when all that it issued has run out.
    """
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.StartEpochRequest()
    answer = in_session(state, lambda session: _call(session, "StartEpoch", request))
    Output(as_json=json).item(_epoch(answer.epoch))


def retire_epoch(
    epoch: Annotated[str, typer.Argument(metavar="EPOCH", help="Of `cloister attest epochs`.")],
    state: State = None,
    json: Json = False,
) -> None:
    """End an epoch now: nothing that was issued under it is trusted any more. For operators.

    Services learn of it within seconds, and enrol anew. Without haste, `new-epoch` comes first.
    """
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.RetireEpochRequest(epoch=epoch)
    answer = in_session(state, lambda session: _call(session, "RetireEpoch", request))
    Output(as_json=json).item({"retired": epoch, "issuing": answer.issuing.epoch})


def workloads(
    closed: Annotated[bool, typer.Option("--closed", help="Closed ones, too.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """List the jobs and backends that services have registered, newest first. For operators."""
    from cloister.api.attest.v1 import attest_pb2

    request = attest_pb2.ListWorkloadsRequest(closed=closed)
    found = in_session(state, lambda session: _call(session, "ListWorkloads", request))
    rows = [
        {"kind": "job", "name": job.job_id, "tenant": job.tenant, "ranks": job.world_size, **_registration(job)}
        for job in found.jobs
    ] + [
        {"kind": "backend", "name": f"{one.model}/{one.backend_id}", "tenant": one.tenant, "ranks": 1}
        | _registration(one)
        for one in found.backends
    ]
    columns = ("kind", "name", "tenant", "ranks", "open", "registered_by", "registered")
    Output(as_json=json).rows("workloads", rows, columns, empty="nothing is registered")


def close(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A job, or <tenant>/<model>/<backend>.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Let no more ranks of a job, or a backend, enrol; its name is not used again. For operators."""
    from cloister.api.attest.v1 import attest_pb2

    parts = name.split("/")
    if len(parts) not in (1, 3):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{name[:200]!r} names no workload",
            why="wanted a job's name, or <tenant>/<model>/<backend>",
            todo="`cloister attest workloads` lists them",
        )
    request = attest_pb2.CloseWorkloadRequest()
    if len(parts) == 1:
        request.job.job_id = name
    else:
        request.backend.tenant, request.backend.model, request.backend.backend_id = parts
    in_session(state, lambda session: _call(session, "CloseWorkload", request))
    Output(as_json=json).item({"closed": name})


def recover(
    share: Annotated[Path, typer.Option("--share", help="Your sealed share, which attest made when the CA began.")],
    holder_key: Annotated[Path, typer.Option("--holder-key", help="Your private key, which opens it.")],
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="HOST:PORT", help="Where attest waits (ca.recovery_listen).")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="SHA384", help="Accept this configuration of attest, which has changed."),
    ] = None,
    generation: Annotated[
        int, typer.Option("--generation", min=0, help="Refuse an older state: `cloister attest epochs` told it.")
    ] = 0,
    root: Root = None,
    directory: Directory = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Give attest your share of the workload CA, after verifying it on this machine.

    Enough shares, and attest goes on with the CA it had: certificates that are out stay valid.
    """
    from cloister.guest.measure import digest_of_package
    from cloister.guest.recoverca import Wanted, give_share
    from cloister.holderkey import SealedShare, read_holder_key
    from cloister.identity import Role, SpiffeId

    sealed = SealedShare.parse(existing_file(share, what="the share").read_bytes())
    words = sealed.open(read_holder_key(existing_file(holder_key, what="the key")))
    service = SpiffeId.parse(sealed.broker_id)
    if service.role is not Role.ATTEST:
        raise CloisterError(
            Code.SHARE_INVALID,
            what="this is no share of a workload CA",
            why=f"it was made for {service}",
            todo="for the key broker: cloister broker unseal",
        )
    wanted = Wanted(
        trust_domain=service.trust_domain,
        scripts=[digest_of_package("cloister_attest")],
        config=_digest(config) if config else None,
        generation=generation,
    )
    place = endpoint or _endpoint(state)

    async def work() -> Given:
        verifier = _verifier(root, directory, state)
        return await give_share(place, words, wanted, verifier=verifier, now=datetime.now(UTC))

    given = run_async(work())
    waiting = given.waiting
    Output(as_json=json).item(
        {
            "number": given.number,
            "missing": given.missing,
            "threshold": waiting.threshold,
            "share_set": waiting.share_set,
            "generation": waiting.generation,
            "sealed_at": waiting.sealed_at.isoformat(timespec="seconds"),
            "epoch": waiting.bundle.epoch,
            "configuration": waiting.evidence.workload.config.hex(),
            "simulated": waiting.evidence.verdict.simulated,
            "checks": len(waiting.checks),
        }
    )


async def _call(session: Session, method: str, request: Any) -> Any:
    from cloister.api.attest.v1 import attest_pb2_grpc

    stub = attest_pb2_grpc.OperatorServiceStub(session.channel("attest"))
    return await session.call(getattr(stub, method), request, what="asking attest")


def _epoch(one: attest_pb2.Epoch) -> dict[str, Any]:
    from cloister.api.attest.v1 import attest_pb2

    return {
        "epoch": one.epoch,
        "state": attest_pb2.EpochState.Name(one.state).removeprefix("EPOCH_STATE_").lower(),
        "started": _time(one.started_unix_s),
        "issues": _time(one.issues_unix_s),
        "ends": _time(one.ends_unix_s),
        "root_sha256": one.root_sha256.hex(),
    }


def _registration(one: attest_pb2.RegisteredJob | attest_pb2.RegisteredBackend) -> dict[str, Any]:
    return {
        "open": one.open,
        "registered_by": one.registered_by,
        "registered": _time(one.registered_unix_ms // 1000),
        "script": one.script_digest.hex(),
        "config": one.config_digest.hex(),
    }


def _time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="seconds") if unix_s else ""


def _digest(text: str) -> bytes:
    try:
        value = bytes.fromhex(text.removeprefix("sha384:"))
    except ValueError:
        value = b""
    if len(value) != 48:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"--config {text[:120]!r} is no digest",
            why="wanted 96 hexadecimal digits",
            todo="`cloister measure` computes it from attest's files",
        )
    return value


def _endpoint(state: Path | None) -> str:
    from cloister.runtime.endpoints import read_endpoints

    # Where an attest of this state directory says that it waits.
    return read_endpoints(state_directory(state).service_directory("attest") / "recovery.json")["recovery"]


def _verifier(root: Path | None, directory: Path | None, state: Path | None) -> EvidenceVerifier:
    from cloister.cli.collateralsource import choose_place
    from cloister.collateral.offline import OfflineCollateral
    from cloister.guest.evidence import EvidenceVerifier

    platform = state_directory(state).platform
    if root is None and (platform / "root.pem").exists():  # a local stack's own
        root, directory = platform / "root.pem", directory or platform / "collateral"
    place = choose_place(root=root, directory=directory, pccs=None, pccs_ca=None, state=state)
    return EvidenceVerifier(place.root, OfflineCollateral(place.directory, root=place.root))
