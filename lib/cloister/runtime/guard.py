# SPDX-License-Identifier: Apache-2.0
"""The guard around every handler: who calls, may they, for how long, and what leaves when it fails.

In this order, for each call:
  1. a request id, the caller's or a new one, bound for logs and for calls to other services
  2. the caller, from the certificate; absent, expired or ambiguous is a refusal
  3. the caller's quota, if there is one; the caller table: role against method; a method without a row is for nobody
  4. the handler, under the caller's deadline or the server's cap, whichever is nearer
  5. CloisterError becomes google.rpc.Status; anything else is logged and becomes INTERNAL without its text
  6. when trust changes while calls run, those of callers who are none any more end
  7. one log line and the metrics: method, caller, code, duration; never a payload
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias

import grpc
import structlog

from cloister.errors import GRPC_STATUS, CloisterError, Code
from cloister.identity import Role
from cloister.runtime.caller import (
    REQUEST_ID_KEY,
    Caller,
    bind_caller,
    bind_request_id,
    caller_of_grpc,
    is_revoked,
    no_longer_in_force,
)
from cloister.runtime.credentials import CredentialSource
from cloister.runtime.limits import Limits
from cloister.runtime.logging import get_logger
from cloister.runtime.metrics import RpcMetrics
from cloister.runtime.quota import IdentityQuota
from cloister.runtime.status import internal_error, to_status

CallerTable: TypeAlias = Mapping[str, frozenset[Role]]
Handlers: TypeAlias = "Mapping[str, grpc.RpcMethodHandler[Any, Any]]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_STATUS_NAMES: Final = {status.value[0]: status.name for status in grpc.StatusCode}
_QUIET_SERVICES: Final = frozenset({"grpc.health.v1.Health"})  # probes ask every few seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What the guard of one server knows."""

    credentials: CredentialSource
    callers: CallerTable
    anonymous: bool  # enrolment: TLS authenticates the server only, and the table says which methods that opens
    limits: Limits
    metrics: RpcMetrics
    quota: IdentityQuota | None = None  # of each caller; health is free
    watchers: set[asyncio.Task[Any]] = field(default_factory=set)  # health watches never end by themselves
    released: set[asyncio.Task[Any]] = field(default_factory=set)
    running: dict[asyncio.Task[Any], Caller] = field(default_factory=dict)
    revoked: set[asyncio.Task[Any]] = field(default_factory=set)  # cancelled because of their caller

    def release_watchers(self) -> None:
        """End what would hold up a drain until its grace is over."""
        self.released.update(self.watchers)
        for task in self.released:
            task.cancel()

    def recheck(self) -> None:
        """End the running calls of callers whose certificate is not in force any more. On the server's event loop."""
        trusted, now = self.credentials.current(), datetime.now(UTC)
        for task, caller in tuple(self.running.items()):
            if is_revoked(caller, trusted, now):
                self.revoked.add(task)
                task.cancel()

    def wrap(self, service: str, handlers: Handlers) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """Return the handlers of a service behind the guard; raise TypeError for one that is not async."""
        return {name: self._wrap_one(service, name, handler) for name, handler in handlers.items()}

    def _wrap_one(
        self, service: str, name: str, handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        call = _Method(self, service, name, bool(handler.request_streaming), bool(handler.response_streaming))
        inner = _behaviour(handler)
        wrapped: Callable[[Any, Any], Any]
        if inspect.isasyncgenfunction(inner):

            async def generate(request: Any, context: _Context) -> AsyncIterator[Any]:
                async with call.guarded(context):
                    async for response in inner(request, context):
                        yield response

            wrapped = generate
        elif inspect.iscoroutinefunction(inner):

            async def answer(request: Any, context: _Context) -> Any:
                async with call.guarded(context):
                    return await inner(request, context)

            wrapped = answer
        else:
            raise TypeError(f"{call.path}: the handler must be an async function or an async generator")
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[call.request_streaming, call.response_streaming]
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


@dataclass(frozen=True, slots=True)
class _Method:
    guard: Guard
    service: str
    name: str
    request_streaming: bool
    response_streaming: bool

    @property
    def path(self) -> str:
        return f"/{self.service}/{self.name}"

    @property
    def kind(self) -> str:
        """The call kind as go-grpc-prometheus spells it."""
        kinds = {(False, False): "unary", (False, True): "server_stream", (True, False): "client_stream"}
        return kinds.get((self.request_streaming, self.response_streaming), "bidi_stream")

    @asynccontextmanager
    async def guarded(self, context: _Context) -> AsyncIterator[None]:
        started = time.monotonic()
        outcome = _Outcome()
        task = asyncio.current_task()
        if task is not None and self.service in _QUIET_SERVICES:
            self.guard.watchers.add(task)
            task.add_done_callback(self.guard.watchers.discard)
        timer = asyncio.timeout(self._time_allowed(context))
        self.guard.metrics.started(self.kind, self.service, self.name)
        request_id = bind_request_id(_metadata(context, REQUEST_ID_KEY))
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            self._identify(context, outcome)
            with self._quota(outcome):
                self._admit(outcome)
                if task is not None and outcome.caller is not None:
                    self.guard.running[task] = outcome.caller
                async with timer:
                    yield
            outcome.code = _code_set_by_handler(context)
        except grpc.aio.AbortError:  # the handler has sent its own status
            outcome.code = _code_set_by_handler(context)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome.code = "CANCELLED"
            if task in self.guard.released:  # by ourselves: gRPC would send no status, and wait for one
                await self._abort(context, _stopping(), request_id, outcome)
            if task in self.guard.revoked:
                await self._abort(context, no_longer_in_force(), request_id, outcome)
            raise
        except CloisterError as error:
            await self._abort(context, error, request_id, outcome)
        except Exception as error:  # noqa: BLE001 - the one place that does: see 5 above
            if timer.expired() and isinstance(error, TimeoutError):
                await self._abort(context, _too_late(), request_id, outcome)
            get_logger().error("handler failed", method=self.path, exc_info=error)
            await self._abort(context, internal_error(request_id), request_id, outcome)
        finally:
            if task is not None:
                self.guard.running.pop(task, None)
                self.guard.revoked.discard(task)
            self._report(outcome, time.monotonic() - started)

    def _identify(self, context: _Context, outcome: _Outcome) -> None:
        if self.guard.anonymous:
            bind_caller(None)
            return
        trusted = self.guard.credentials.current()
        now = datetime.now(UTC)
        caller = caller_of_grpc(context.auth_context(), context.peer(), trusted.bundle, now, revoked=trusted.revoked)
        outcome.caller = caller
        bind_caller(caller)

    def _admit(self, outcome: _Outcome) -> None:
        allowed = self.guard.callers.get(self.path)
        if self.guard.anonymous:
            if allowed is None:
                raise _not_allowed(self.path, "an anonymous caller")
            return
        role = outcome.caller.spiffe_id.role if outcome.caller else None
        if role not in (allowed or ()):
            raise _not_allowed(self.path, f"the role {role}")

    def _quota(self, outcome: _Outcome) -> AbstractContextManager[None]:
        if self.guard.quota is None or outcome.caller is None or self.service in _QUIET_SERVICES:
            return nullcontext()
        return self.guard.quota.admitted(str(outcome.caller.spiffe_id))

    def _time_allowed(self, context: _Context) -> float:
        streaming = self.request_streaming or self.response_streaming
        cap = self.guard.limits.max_stream_s if streaming else self.guard.limits.max_unary_s
        wanted = context.time_remaining()
        return cap if wanted is None else min(wanted, cap)

    async def _abort(self, context: _Context, error: CloisterError, request_id: str, outcome: _Outcome) -> None:
        outcome.code, outcome.error = GRPC_STATUS[error.kind], error
        await context.abort_with_status(to_status(error, request_id))

    def _report(self, outcome: _Outcome, seconds: float) -> None:
        self.guard.metrics.handled(self.kind, self.service, self.name, outcome.code, seconds)
        facts: dict[str, Any] = {"method": self.path, "code": outcome.code, "duration_ms": round(seconds * 1000, 2)}
        if outcome.caller:
            facts["caller"] = str(outcome.caller.spiffe_id)
            facts["key_exchange_group"] = outcome.caller.key_exchange_group
        if outcome.error:
            facts |= {"error": outcome.error.code.text, "what": outcome.error.what, "why": outcome.error.why}
        quiet = self.service in _QUIET_SERVICES and outcome.code in ("OK", "CANCELLED")
        log = get_logger()
        (log.debug if quiet else log.info)("rpc", **facts)


@dataclass(slots=True)
class _Outcome:
    code: str = "UNKNOWN"
    caller: Caller | None = None
    error: CloisterError | None = None


class Recorder:
    """Stand in for a server while generated code registers, so that we learn a service's methods before any call."""

    def __init__(self) -> None:
        self.services: dict[str, Handlers] = {}

    def add_registered_method_handlers(self, service_name: str, method_handlers: Handlers) -> None:
        self.services[service_name] = method_handlers

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Any) -> None:
        """Ignore the older form of the same registration."""


def _behaviour(handler: grpc.RpcMethodHandler[Any, Any]) -> Callable[[Any, Any], Any]:
    found = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    behaviour: Callable[[Any, Any], Any] = found  # type: ignore[assignment]  # each kind has its own signature
    return behaviour


def _metadata(context: _Context, key: str) -> str:
    for name, value in context.invocation_metadata() or ():
        if name == key and isinstance(value, str):
            return value
    return ""


def _code_set_by_handler(context: _Context) -> str:
    code: Any = context.code()
    return code.name if isinstance(code, grpc.StatusCode) else _STATUS_NAMES.get(code, "OK")


def _not_allowed(path: str, who: str) -> CloisterError:
    return CloisterError(
        Code.CALLER_NOT_ALLOWED,
        what=f"{path.rpartition('/')[2]} is not for this caller",
        why=f"{path} does not admit {who}",
        todo="use an identity that may, or another method",
    )


def _stopping() -> CloisterError:
    return CloisterError(Code.UNREACHABLE, what="the service is stopping", todo="try again")


def _too_late() -> CloisterError:
    return CloisterError(
        Code.DEADLINE_EXCEEDED,
        what="the call took too long",
        why="its deadline, or the longest time the server grants, has passed",
        todo="try again, or ask for less at once",
    )
