# SPDX-License-Identifier: Apache-2.0
"""CloisterError on the wire: google.rpc.Status with one ErrorInfo (reason "CLO-1203", domain "cloister.dev")."""

from __future__ import annotations

from typing import Any, Final

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cloister.errors import GRPC_STATUS, CloisterError, Code, code_from_text

DOMAIN: Final = "cloister.dev"
# In UTF-8. Trailers are limited to 16 KiB; there, details grow by a third (base64) and the message up to threefold
# (percent-encoding): three texts and a message of these sizes fit.
_MAX_TEXT_BYTES: Final = 1500
_MAX_MESSAGE_BYTES: Final = 600
_MAX_BLOCK_BYTES: Final = 64


def to_status(error: CloisterError, request_id: str) -> grpc.Status:
    """Return what `abort_with_status` wants."""
    info = error_details_pb2.ErrorInfo(
        reason=error.code.text,
        domain=DOMAIN,
        metadata={
            "what": _cut(error.what, _MAX_TEXT_BYTES),
            "why": _cut(error.why, _MAX_TEXT_BYTES),
            "todo": _cut(error.todo, _MAX_TEXT_BYTES),
            "request_id": request_id,
            **({"block": _cut(error.block, _MAX_BLOCK_BYTES)} if error.block else {}),
        },
    )
    detail = any_pb2.Any()
    detail.Pack(info)
    status = status_pb2.Status(
        code=code_pb2.Code.Value(GRPC_STATUS[error.kind]),
        message=_cut(f"{error.code.text}: {error.what}", _MAX_MESSAGE_BYTES),
        details=[detail],
    )
    converted: grpc.Status = rpc_status.to_status(status)
    return converted


def internal_error(request_id: str) -> CloisterError:
    """Return what a caller may learn of an unexpected error: nothing but where to look."""
    return CloisterError(
        Code.INTERNAL,
        what="the service met an unexpected error",
        why=f"its log has it under the request id {request_id}",
        todo="report it to the operator with that request id",
    )


def from_rpc_error(error: grpc.aio.AioRpcError, *, what: str) -> CloisterError:
    """Return the CloisterError a service sent, or the one that fits a failure of transport.

    `what` is what was being done, such as "release the key of the training data".
    """
    sent = _sent_error(error)
    if sent is not None:
        return sent
    details = error.details() or ""
    match error.code():
        case grpc.StatusCode.UNAVAILABLE:
            return CloisterError(
                Code.UNREACHABLE,
                what=f"could not {what}: the service cannot be reached",
                why=details,
                todo="check that it runs and that its address is right (cloister doctor)",
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return CloisterError(
                Code.DEADLINE_EXCEEDED,
                what=f"could not {what}: no answer in time",
                why=details,
                todo="try again; if it stays, look at the service's log",
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in details:
            return CloisterError(
                Code.MESSAGE_TOO_LARGE,
                what=f"could not {what}: a message is too large",
                why=details,
                todo="send less at once",
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return CloisterError(
                Code.RATE_LIMITED,
                what=f"could not {what}: the service is busy",
                why=details,
                todo="try again a little later",
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"could not {what}: the service does not know this method",
                why=details,
                todo="use a client and a service of the same release",
            )
        case code:
            return CloisterError(
                Code.INTERNAL,
                what=f"could not {what}: {code.name}",
                why=details,
                todo="look at the service's log",
            )


def _sent_error(error: grpc.aio.AioRpcError) -> CloisterError | None:
    try:
        status: Any = rpc_status.from_call(error)
    except ValueError:  # the details contradict code or message: not written by a server of ours
        return None
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if not (detail.Is(info.DESCRIPTOR) and detail.Unpack(info)) or info.domain != DOMAIN:
            continue
        texts = {name: _cut(info.metadata.get(name, ""), _MAX_TEXT_BYTES) for name in ("what", "why", "todo")}
        texts["block"] = _cut(info.metadata.get("block", ""), _MAX_BLOCK_BYTES)
        code = code_from_text(info.reason)
        if code is None:  # a newer service: keep its text, and its code where people see it
            texts["what"] = f"{texts['what']} ({info.reason[:16]})"
        return CloisterError(code or Code.INTERNAL, **texts)
    return None


def _cut(text: str, size_bytes: int) -> str:
    return text.encode("utf-8", "replace")[:size_bytes].decode("utf-8", "ignore")
