# SPDX-License-Identifier: Apache-2.0
"""`cloister predict`: texts through the gateway, over gRPC or over HTTPS, both with the user's certificate."""

from __future__ import annotations

import asyncio
import http.client
import json as jsonlib
import shlex
import socket
import ssl
import sys
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import Json, State, in_session
from cloister.cli.output import Output, clean, make_table
from cloister.errors import CloisterError, Code, code_from_text
from cloister.identity import Role, dns_name

if TYPE_CHECKING:
    from cloister.cli.session import Session

_TIMEOUT_S: Final = 30.0
_MAX_TEXTS: Final = 256  # PredictRequest.texts
_MAX_ANSWER_BYTES: Final = 4 << 20


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(predict)


def predict(
    texts: Annotated[list[str] | None, typer.Argument(metavar="TEXT...", help="Texts; none: lines of stdin.")] = None,
    model: Annotated[str, typer.Option("--model", help="Name of the model.")] = "reviews",
    http: Annotated[bool, typer.Option("--http", help="Over HTTPS instead of gRPC.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Classify texts."""
    given = texts or ([] if sys.stdin.isatty() else [line for line in sys.stdin.read().splitlines() if line.strip()])
    if not 1 <= len(given) <= _MAX_TEXTS:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{len(given)} texts cannot be sent",
            why=f"a request holds 1 to {_MAX_TEXTS}",
            todo="give texts as arguments or as lines on stdin",
        )
    output = Output(as_json=json)

    async def work(session: Session) -> dict[str, Any]:
        if http:
            output.note(curl_command(session, model, given))
        return await (predict_https if http else predict_grpc)(session, model, given)

    document = in_session(state, work)

    def render(console: Any) -> None:
        table = make_table("label", "probability", "text")
        for text, prediction in zip(given, document["predictions"], strict=True):
            table.add_row(clean(prediction["label"]), f"{prediction['probability']:.3f}", clean(text))
        console.print(table)

    output.result(document, render)


async def predict_grpc(session: Session, model: str, texts: list[str]) -> dict[str, Any]:
    """Classify texts over gRPC."""
    from cloister.api.serving.v1 import serving_pb2, serving_pb2_grpc

    answer = await session.call(
        serving_pb2_grpc.InferenceServiceStub(session.channel("gateway")).Predict,
        serving_pb2.PredictRequest(model=model, texts=texts),
        what=f"asking model {model}",
        timeout_s=_TIMEOUT_S,
    )
    return {
        "model": answer.model,
        "archive": f"sha384:{answer.archive_digest.hex()}",
        "predictions": [{"label": p.label, "probability": p.probability} for p in answer.predictions],
    }


async def predict_https(session: Session, model: str, texts: list[str]) -> dict[str, Any]:
    """Classify texts over HTTPS with the user's client certificate; trusts only the gateway's own CA."""
    return await asyncio.to_thread(_post, session, model, texts)


class _Connection(http.client.HTTPSConnection):
    """HTTPS to an address, with another name to match in the certificate."""

    def __init__(self, address: str, *, server_name: str, context: ssl.SSLContext) -> None:
        super().__init__(server_name, timeout=_TIMEOUT_S)
        self._address = address
        self._tls = context

    def connect(self) -> None:
        host, _, port = self._address.rpartition(":")
        raw = socket.create_connection((host, int(port)), timeout=_TIMEOUT_S)
        self.sock = self._tls.wrap_socket(raw, server_hostname=self.host)


def _post(session: Session, model: str, texts: list[str]) -> dict[str, Any]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cafile=str(session.state.gateway_ca))
    context.load_cert_chain(str(session.state.user_chain), str(session.state.user_key))
    address = session.stack.endpoint("gateway", "https")
    connection = _Connection(address, server_name=_server_name(session), context=context)
    try:
        body = jsonlib.dumps({"texts": texts}, ensure_ascii=False).encode()
        connection.request("POST", _path(model), body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read(_MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise CloisterError(
            Code.UNREACHABLE,
            what=f"the gateway at https://{address} did not answer",
            why=f"{type(error).__name__}: {error}",
            todo="cloister doctor tells more",
        ) from error
    finally:
        connection.close()
    return _answer(answer.status, data)


def _answer(status: int, data: bytes) -> dict[str, Any]:
    try:
        document: Any = jsonlib.loads(data)
    except ValueError:
        document = None
    if status == http.client.OK and isinstance(document, dict) and isinstance(document.get("predictions"), list):
        return document
    found = document if isinstance(document, dict) else {}
    problem = found.get("error", found)
    problem = problem if isinstance(problem, dict) else {}
    raise CloisterError(
        code_from_text(str(problem.get("code", ""))) or Code.PREDICTION_FAILED,
        what=str(problem.get("what") or f"the gateway answered with HTTP status {status}"),
        why=str(problem.get("why", "")),
        todo=str(problem.get("todo", "")),
    )


def curl_command(session: Session, model: str, texts: list[str]) -> str:
    """Return the curl command that asks the same."""
    address = session.stack.endpoint("gateway", "https")
    host, _, port = address.rpartition(":")
    name = _server_name(session)
    parts = [
        "curl",
        "--cacert", str(session.state.gateway_ca),
        "--cert", str(session.state.user_chain),
        "--key", str(session.state.user_key),
        "--resolve", f"{name}:{port}:{host}",
        "-H", "content-type: application/json",
        "-d", jsonlib.dumps({"texts": texts}, ensure_ascii=False),
        f"https://{name}:{port}{_path(model)}",
    ]  # fmt: skip
    return shlex.join(parts)


def grpcurl_command(session: Session, method: str, request: dict[str, Any] | None) -> str:
    """Return a grpcurl command for the gateway; without a request, one that lists what reflection knows."""
    parts = ["grpcurl", "-cacert", str(session.state.gateway_ca), "-cert", str(session.state.user_chain)]
    parts += ["-key", str(session.state.user_key), "-authority", _server_name(session)]
    parts += ["-d", jsonlib.dumps(request, ensure_ascii=False)] if request is not None else []
    return shlex.join([*parts, session.stack.endpoint("gateway"), method])


def _server_name(session: Session) -> str:
    return dns_name(Role.GATEWAY, session.stack.trust_domain)


def _path(model: str) -> str:
    from urllib.parse import quote

    return f"/predictions/{quote(model, safe='')}"
