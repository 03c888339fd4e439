# SPDX-License-Identifier: Apache-2.0
"""`cloister model`: sealed models on attested backends."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import Json, State, existing_directory, existing_file, in_session
from cloister.cli.output import Output

if TYPE_CHECKING:
    from cloister.cli.session import Session

app = typer.Typer(help="Models behind the gateway.", no_args_is_help=True)

_CHUNK_BYTES: Final = 1 << 20  # UploadArchiveRequest takes at most 1 MiB
_DEPLOY_TIMEOUT_S: Final = 180.0
_COLUMNS: Final = ("name", "state", "cores", "backend_process_id", "archive", "created", "reason")
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name the model is called by.")]


@app.command()
def deploy(
    directory: Annotated[
        Path, typer.Argument(metavar="SEALED_DIR", help="Sealed model, such as a job's OUTPUT/model.")
    ],
    name: Annotated[str, typer.Option("--name", help="Name to call it by, [a-z0-9-].")],
    handler: Annotated[Path | None, typer.Option("--handler", help="TorchServe handler; default: text.")] = None,
    core: Annotated[list[int] | None, typer.Option("--core", help="Cores of the backend.")] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Build a TorchServe archive from a sealed model, upload it, and start an attested backend for it."""
    from cloister.cli.measure import handler_path

    source = existing_file(handler, what="the handler") if handler else handler_path()
    sealed = existing_directory(directory, what="the sealed model")
    output = Output(as_json=json)

    async def work(session: Session) -> dict[str, Any]:
        return await deploy_model(
            session, sealed, name=name, handler_source=source.read_bytes(), cores=core or [], output=output
        )

    output.item(in_session(state, work))


@app.command(name="list")
def list_(state: State = None, json: Json = False) -> None:
    """List your models."""

    found = in_session(state, list_models)
    Output(as_json=json).rows("models", found, _COLUMNS, empty="no models yet: cloister model deploy --help")


@app.command()
def remove(name: NameArgument, state: State = None, json: Json = False) -> None:
    """Stop a model's backend and forget the model."""

    async def work(session: Session) -> dict[str, Any]:
        await remove_model(session, name)
        return {"removed": name}

    Output(as_json=json).item(in_session(state, work))


async def list_models(session: Session) -> list[dict[str, Any]]:
    """Return the caller's models as documents."""
    from cloister.api.serving.v1 import serving_pb2, serving_pb2_grpc

    stub = serving_pb2_grpc.ModelServiceStub(session.channel("gateway"))
    answer = await session.call(stub.ListModels, serving_pb2.ListModelsRequest(), what="listing models")
    return [model_document(model) for model in answer.models]


async def remove_model(session: Session, name: str) -> None:
    """Stop a model's backend and forget the model."""
    from cloister.api.serving.v1 import serving_pb2, serving_pb2_grpc

    stub = serving_pb2_grpc.ModelServiceStub(session.channel("gateway"))
    request = serving_pb2.RemoveModelRequest(name=name)
    await session.call(stub.RemoveModel, request, what="removing the model", timeout_s=60.0)


async def deploy_model(
    session: Session, sealed: Path, *, name: str, handler_source: bytes, cores: list[int], output: Output
) -> dict[str, Any]:
    """Build, upload and deploy; return the model's document."""
    from cloister.api.serving.v1 import serving_pb2, serving_pb2_grpc
    from cloister.data.archive import build_archive

    stub = serving_pb2_grpc.ModelServiceStub(session.channel("gateway"))
    with tempfile.TemporaryDirectory(prefix="cloister-archive-") as scratch:
        archive = Path(scratch) / f"{name}.mar"
        build_archive(sealed, archive, handler_source=handler_source)
        with output.progress(f"uploading {name}.mar", archive.stat().st_size) as advance:
            uploaded = await session.call(
                stub.UploadArchive, _chunks(archive, advance), what="uploading the archive", timeout_s=600.0
            )
    answer = await session.call(
        stub.DeployModel,
        serving_pb2.DeployModelRequest(name=name, archive_digest=uploaded.archive_digest, cores=cores),
        what="deploying the model",
        timeout_s=_DEPLOY_TIMEOUT_S,
    )
    return model_document(answer.model)


async def _chunks(archive: Path, advance: Any) -> AsyncIterator[Any]:
    from cloister.api.serving.v1 import serving_pb2

    sent = 0
    with archive.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            yield serving_pb2.UploadArchiveRequest(chunk=chunk)
            sent += len(chunk)
            advance(sent)


def model_document(model: Any) -> dict[str, Any]:
    """Return a model as JSON output shows it."""
    from cloister.api.serving.v1 import serving_pb2

    created = datetime.fromtimestamp(model.created_unix_ms / 1000, UTC).isoformat(timespec="milliseconds")
    return {
        "name": model.name,
        "state": serving_pb2.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        "reason": model.reason,
        "archive": f"sha384:{model.archive_digest.hex()}",
        "cores": list(model.cores),
        "backend_process_id": model.backend_process_id,
        "created": created,
        "timings_s": {name: round(seconds, 3) for name, seconds in sorted(model.timings_s.items())},
    }
