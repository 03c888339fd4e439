# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  (RPCs keep the names that the protocol gives them)
"""gRPC in and out for operators: who is not let in any more. Operators are users that the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any, Final

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.caller import current_caller
from cloister.runtime.guard import CallerTable
from cloister.runtime.logging import get_logger
from cloister.runtime.server import Mounted
from cloister_attest.denylist import MAX_REASON, Denial, DenialKind, DenyList, Fact, facts_of, parse_value

_SERVICE: Final = "cloister.api.attest.v1.IdentityService"
IDENTITY_CALLERS: Final[CallerTable] = {
    f"/{_SERVICE}/{method}": frozenset({Role.USER}) for method in ("Deny", "Readmit", "ListDenials")
}
_KINDS: Final = {
    attest_pb2.DENIAL_KIND_IDENTITY: DenialKind.IDENTITY,
    attest_pb2.DENIAL_KIND_PLATFORM: DenialKind.PLATFORM,
    attest_pb2.DENIAL_KIND_MEASUREMENT: DenialKind.MEASUREMENT,
}
_WIRE: Final = {kind: number for number, kind in _KINDS.items()}


class IdentityServicer(attest_pb2_grpc.IdentityServiceServicer):
    """The deny-list, for operators."""

    def __init__(
        self,
        denials: DenyList,
        operators: Collection[str],
        *,
        own_facts: Callable[[], Collection[Fact]],
        clock: Callable[[], datetime],
    ) -> None:
        """`operators` are SPIFFE ids of users; none named means nobody may. `own_facts` are about attest itself."""
        self._denials = denials
        self._operators = frozenset(operators)
        self._own_facts = own_facts
        self._clock = clock

    async def Deny(self, request: attest_pb2.DenyRequest, _context: Any) -> attest_pb2.DenyResponse:
        operator = await self._operator()
        kind = _kind(request.kind)
        value = parse_value(kind, request.value)
        if value == operator or (kind, value) in self._own_facts():
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="neither operators nor attest deny themselves",
                why="nobody might be left to undo it",
                todo="have another operator do it; to end attest, stop it",
            )
        if len(request.reason) > MAX_REASON or not request.reason.isprintable():
            raise CloisterError(
                Code.ARGUMENT_INVALID, what=f"a reason is printable text of at most {MAX_REASON} characters"
            )
        await self._denials.add(Denial(kind, value, request.reason, operator, self._clock()))
        get_logger().warning("denied", kind=str(kind), value=value, operator=operator, reason=request.reason)
        return attest_pb2.DenyResponse()

    async def Readmit(self, request: attest_pb2.ReadmitRequest, _context: Any) -> attest_pb2.ReadmitResponse:
        operator = await self._operator()
        kind = _kind(request.kind)
        value = parse_value(kind, request.value)
        removed = await self._denials.remove(kind, value)
        if removed:
            get_logger().warning("readmitted", kind=str(kind), value=value, operator=operator)
        return attest_pb2.ReadmitResponse(was_denied=removed)

    async def ListDenials(
        self, _request: attest_pb2.ListDenialsRequest, _context: Any
    ) -> attest_pb2.ListDenialsResponse:
        await self._operator()
        return attest_pb2.ListDenialsResponse(
            denials=[
                attest_pb2.Denial(
                    kind=_WIRE[found.kind],
                    value=found.value,
                    reason=found.reason,
                    operator=found.by,
                    time_unix_ms=int(found.time.timestamp() * 1000),
                )
                for found in await self._denials.all()
            ]
        )

    async def _operator(self) -> str:
        """Return the caller, an operator who is not denied; raise CloisterError(CALLER_NOT_ALLOWED)."""
        caller = current_caller().spiffe_id
        if str(caller) not in self._operators or await self._denials.first(facts_of(caller)) is not None:
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what="only operators may see and change the deny-list",
                why=f"{caller} is none",
                todo="set operator = true for this user in attest's configuration",
            )
        return str(caller)


def identity_services(servicer: IdentityServicer) -> list[Mounted]:
    """Return what the mutual-TLS port serves operators; its callers are IDENTITY_CALLERS."""
    return [Mounted(_SERVICE, attest_pb2_grpc.add_IdentityServiceServicer_to_server, servicer)]


def _kind(number: attest_pb2.DenialKind.ValueType) -> DenialKind:
    kind = _KINDS.get(number)
    if kind is None:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="kind is not allowed",
            why="allowed: identity, platform, measurement",
            todo="name one of these",
        )
    return kind
